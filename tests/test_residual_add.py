"""What joins the pass that makes a map, and that hooks and replaced parts are respected there."""

import copy

import hosts
import pytest
import torch
from hosts import assert_close
from torch import Tensor, nn

import dense_shortcuts as ds


def pair(**settings: object) -> tuple[nn.Module, nn.Module]:
    """The same plugged network twice, with random weights: by the compiled passes and by the plain form."""
    host = hosts.small_net("timm_basic").double()
    hosts.randomise(host, seed=3)
    net = ds.plug_in(copy.deepcopy(host), backend="native", **settings)
    plain = ds.plug_in(host, backend="plain", **settings)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=4, scale=0.5)
    for stage in ds.dense_stages(net).values():
        hosts.randomise(stage.shortcut, seed=5)
    plain.load_state_dict(net.state_dict())
    return net.eval(), plain.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_norm_in_training_mode_inside_a_network_in_evaluation_mode_updates_its_statistics():
    net, plain = pair(norm="batch")
    for one in (net, plain):
        one.layer1[1].bn2.train()
        one.layer2.shortcut.norms[0].train()
    with torch.no_grad():
        assert_close(net(images()), plain(images()), 1e-10, "output")
    for (name, found), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert_close(found.double(), wanted.double(), 1e-10, name)
    assert int(net.layer1[1].bn2.num_batches_tracked) > 0


def test_a_hook_on_a_shortcut_fires_once_a_block():
    net, _ = pair()
    seen: list[Tensor] = []
    net.layer1.shortcut.register_forward_hook(lambda m, i, y: seen.append(y[0]))
    net(images())
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["layer1.1.bn2", "layer2.0.downsample", "layer2.0.downsample.1", "layer1.0.act2"])
def test_a_forward_pass_replaced_on_one_module_is_called(name):
    net, plain = pair()
    for one in (net, plain):
        module = one.get_submodule(name)
        module.forward = lambda x, real=module.forward: real(x).square()
    with torch.no_grad():
        found = net(images())
        assert_close(found, plain(images()), 1e-10, "output")
        del plain.get_submodule(name).forward
        assert not torch.allclose(plain(images()), found)


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(
    ("kind", "norm"), [("batch", nn.BatchNorm2d(3, affine=False)), ("group", nn.GroupNorm(3, 9, affine=False))]
)
def test_a_norm_of_another_width_is_refused(kind, norm, grad):
    net, _ = pair(norm=kind)
    net.layer1.shortcut.norms[1] = norm.eval()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="8 channels"):
        net(images())


def test_steps_taken_one_by_one_start_from_the_same_state_each_time():
    stage = pair()[0].layer1
    x = torch.rand(2, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted = stage(x)
        first, *steps = iter(stage)
        begun = first(x)
        for _ in range(2):
            y = begun
            for step in steps:
                y = step(y)
            assert torch.equal(y, wanted)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_projection_of_a_stage_is_normalised_in_the_sum_unless_somebody_looks(train, monkeypatch):
    """X_0 = bn(conv(x)) is then never made, with the same numbers; a hook on the norm or on both sees it."""
    net, plain = pair()
    norm, calls = net.layer2[0].downsample[1], []
    real = type(norm).forward
    monkeypatch.setattr(
        type(norm), "forward", lambda self, x: calls.extend([1] if self is norm else []) or real(self, x)
    )
    for module in (None, norm, net.layer2[0].downsample):
        seen: list[Tensor] = []
        if module is not None:
            module.register_forward_hook(lambda m, i, y, seen=seen: seen.append(y))
        assert_close(net.train(train)(images()), plain.train(train)(images()), 1e-10, "output")
        assert len(seen) == len(calls) == (module is not None)
        calls.clear()
    for (name, found), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert_close(found.double(), wanted.double(), 1e-10, name)
