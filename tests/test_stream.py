"""A row of blocks without gradients by the compiled kernels: that it runs, where it may not, what it leaves alone."""

import copy

import hosts
import pytest
import timm
import torch
from hosts import assert_close
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import ops
from dense_shortcuts.ops import compiled

pytestmark = pytest.mark.skipif(compiled.library()[0] is None, reason="no C++ compiler")


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks whose map a stream made, in order."""
    made: list[int] = []
    real = ops.Stream.sum

    def counted(self: ops.Stream, k: int, *given: Tensor, seen: bool) -> Tensor:
        made.append(k)
        return real(self, k, *given, seen=seen)

    monkeypatch.setattr(ops.Stream, "sum", counted)
    return made


def pair(host: nn.Module, **settings: object) -> tuple[nn.Module, nn.Module]:
    """The same plugged network twice, with random weights: as it runs here, and by the plain back end."""
    host = host.eval()
    hosts.randomise(host, seed=3)
    net = ds.plug_in(copy.deepcopy(host), **settings)
    plain = ds.plug_in(host, backend="plain", **settings)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=4, scale=0.5)
    for stage in ds.dense_stages(net).values():
        hosts.randomise(stage.shortcut, seed=5)
    plain.load_state_dict(net.state_dict())
    return net.eval(), plain.eval()


def images(dtype: torch.dtype = torch.float64, *, last: bool = True) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype, memory_format=layout)


@torch.no_grad()
def outputs(nets: tuple[nn.Module, nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    return nets[0](x), nets[1](x)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"pattern": "powers"}, {"weighting": "softmax"}], ids=str)
@pytest.mark.parametrize("norm", ["group", "batch", "layer", "instance", None])
def test_every_block_is_run_by_the_stream_and_matches_the_plain_form(norm, settings, last, sums):
    nets = pair(hosts.small_net("timm_bottleneck").double(), norm=norm, **settings)
    assert_close(*outputs(nets, images(last=last)), 1e-10, "output")
    assert sums == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_other_dtypes_match_the_plain_form_in_float64(norm, dtype, sums):
    net, plain = pair(timm.create_model("resnet18"), norm=norm)
    x = images(torch.float32)
    with torch.no_grad():
        found = net.to(dtype)(x.to(dtype))
        wanted = plain.to(dtype).double()(x.to(dtype).double())
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert sums == ([0, 1] * 4 if compiled.supports(dtype) else [])


def test_under_autocast_and_inference_mode_it_runs_too(sums):
    net, plain = pair(timm.create_model("resnet18"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = net(images(torch.float32)), plain(images(torch.float32))
    assert_close(found.float(), wanted.float(), 5e-2, "output")
    assert sums == [0, 1] * 4


def test_tokens_are_run_by_the_stream(sums):
    nets = pair(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).double(), norm="batch")
    assert_close(*outputs(nets, images()), 1e-10, "output")
    assert sums == [0, 1, 2]


def test_a_fused_network_is_run_by_the_stream(sums):
    for norm in ("group", "batch"):
        net, plain = pair(hosts.small_net("timm_bottleneck").double(), norm=norm)
        assert_close(*outputs((ds.fuse(net), plain), images()), 1e-10, norm)
    assert sums == [0, 1, 2, 0, 1] * 2


@pytest.mark.parametrize("kind", ["timm_basic_se", "timm_basic_droppath", "timm_basic_silu", "timm_bottleneck_aa"])
def test_blocks_with_more_at_their_end_match_the_plain_form(kind, sums):
    kind, extra = (kind, {}) if kind in hosts.EXTRAS else (hosts.family(kind), {})
    nets = pair(hosts.small_net(kind, **extra).double())
    assert_close(*outputs(nets, images()), 1e-10, kind)
    assert (sums == []) is kind.endswith("silu")


def test_a_block_that_the_stream_does_not_take_goes_on_from_its_maps(sums):
    net, plain = pair(hosts.small_net("timm_basic").double())
    for one in (net, plain):
        one.layer1[1].act2 = nn.SiLU()
    assert_close(*outputs((net, plain), images()), 1e-10, "output")
    assert sums == [0, 0, 1]  # block 0 of the first stage, then the second stage


def deep_pair(**settings: object) -> tuple[nn.Module, nn.Module]:
    """A network whose stage of 16 blocks is cut into groups of four."""
    torch.manual_seed(7)
    nets = pair(hosts.Net("timm_basic", (16,), (8,)).double(), **settings)
    assert ds.dense_stages(nets[0])["layer1"].shortcut.tiling.size == 4
    return nets


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("norm", ["group", "batch", None])
def test_a_deep_stage_is_run_by_the_stream_with_sums_made_ahead(norm, last, sums):
    assert_close(*outputs(deep_pair(norm=norm), images(last=last)), 1e-10, "output")
    assert sums == list(range(16))


@pytest.mark.parametrize("left", [0, 3, 4, 7, 8, 13])
def test_a_deep_stage_that_leaves_the_stream_goes_on_from_its_maps_and_sums(left, sums):
    nets = deep_pair()
    for one in nets:
        one.layer1[left].act2 = nn.SiLU()
    assert_close(*outputs(nets, images()), 1e-10, "output")
    assert sums == list(range(left))


def test_a_norm_in_training_mode_moves_its_statistics_as_ever(sums):
    net, plain = pair(hosts.small_net("timm_basic").double(), norm="batch")
    for one in (net, plain):
        one.layer1[1].bn2.train()
        one.layer2.shortcut.norms[0].train()
    assert_close(*outputs((net, plain), images()), 1e-10, "output")
    for (name, found), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert_close(found.double(), wanted.double(), 1e-10, name)
    assert int(net.layer1[1].bn2.num_batches_tracked) > 0
    assert sums == [0]


def test_what_a_hook_has_seen_is_not_overwritten(sums):
    net, plain = pair(hosts.small_net("timm_basic").double())
    seen: dict[str, Tensor] = {}
    for name, one in (("found", net), ("wanted", plain)):
        one.layer1[1].conv2.register_forward_hook(lambda m, i, y, name=name: seen.__setitem__(name, y))
    assert_close(*outputs((net, plain), images()), 1e-10, "output")
    assert_close(seen["found"], seen["wanted"], 1e-10, "branch")
    assert sums == [0, 1, 2, 0, 1]


def test_a_hook_on_a_shortcut_fires(sums):
    net, plain = pair(hosts.small_net("timm_basic").double())
    seen: list[Tensor] = []
    net.layer1.shortcut.register_forward_hook(lambda m, i, y: seen.append(y[0].clone()))
    assert_close(*outputs((net, plain), images()), 1e-10, "output")
    assert len(seen) == 3 and sums == [0, 1]


@pytest.mark.parametrize("name", ["layer1.1.bn2", "layer2.0.downsample", "layer2.0.downsample.1", "layer1.0.act2"])
def test_a_forward_pass_replaced_on_one_module_is_called(name, sums):
    net, plain = pair(hosts.small_net("timm_basic").double())
    for one in (net, plain):
        module = one.get_submodule(name)
        module.forward = lambda x, real=module.forward: real(x).square()
    found, wanted = outputs((net, plain), images())
    assert_close(found, wanted, 1e-10, "output")
    del plain.get_submodule(name).forward
    with torch.no_grad():
        assert not torch.allclose(plain(images()), found)


class ItsOwnInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_branch_that_is_an_earlier_map_is_not_overwritten(sums):
    net, plain = pair(hosts.small_net("timm_basic").double())
    for one in (net, plain):
        block = one.layer1[2]
        for name in ("conv1", "bn1", "act1", "conv2", "bn2"):
            setattr(block, name, ItsOwnInput())
    maps = {}
    net.layer1[1].register_forward_hook(lambda m, i, y: maps.update(x=y, copy=y.clone()))
    assert_close(*outputs((net, plain), images()), 1e-10, "output")
    assert torch.equal(maps["x"], maps["copy"])


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(
    ("kind", "norm"), [("batch", nn.BatchNorm2d(3, affine=False)), ("group", nn.GroupNorm(3, 9, affine=False))]
)
def test_a_norm_of_another_width_is_refused(kind, norm, grad):
    net = ds.plug_in(hosts.small_net("timm_basic"), norm=kind).eval()
    net.layer1.shortcut.norms[1] = norm.eval()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="8 channels"):
        net(images(torch.float32))


def test_steps_taken_one_by_one_do_not_share_state(sums):
    net, _ = pair(hosts.small_net("timm_basic").double())
    x = torch.rand(2, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted = net.layer1(x)
        assert sums == [0, 1, 2]
        first, *steps = iter(net.layer1)
        begun = first(x)
        for _ in range(2):  # the second run starts from the same memory
            y = begun
            for step in steps:
                y = step(y)
            assert_close(y, wanted, 1e-12, "output")
    assert sums == [0, 1, 2]


def test_the_projection_of_a_stage_is_normalised_in_the_sum_unless_somebody_looks(monkeypatch):
    """X_0 = bn(conv(x)) is then never made, with the same numbers; a hook on the norm or on both sees it."""
    for train in (True, False):
        net, plain = pair(hosts.small_net("timm_basic").double())
        norm = net.layer2[0].downsample[1]
        calls: list[int] = []
        real = type(norm).forward

        def forward(self, x, calls=calls, norm=norm, real=real):
            calls.extend([1] if self is norm else [])
            return real(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(type(norm), "forward", forward)
            for module in (None, norm, net.layer2[0].downsample):
                seen: list[Tensor] = []
                if module is not None:
                    module.register_forward_hook(lambda m, i, y, seen=seen: seen.append(y))
                found, wanted = net.train(train)(images()), plain.train(train)(images())
                assert_close(found, wanted, 1e-10, "output")
                assert len(seen) == len(calls) == (module is not None)
                calls.clear()
        for (name, found), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
            assert_close(found.double(), wanted.double(), 1e-10, name)
