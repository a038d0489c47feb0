"""What a plugged network meets at run time beside a plain batch: empty batches, hooks, odd owners, transforms."""

from collections.abc import Callable
from typing import Any

import hosts
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from hosts import assert_close
from test_plug import one_sentence
from torch import Tensor, nn

import dense_shortcuts as ds

BACKENDS = ["plain", "native", "auto"]
NORMS = ["group", "batch", "layer", "instance", None]


# Empty batches


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_batch_passes_as_through_the_host(norm, backend):
    net, x = ds.plug_in(hosts.small_net("timm_bottleneck"), norm=norm, backend=backend), torch.zeros(0, 3, 9, 7)
    net.eval()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for form in (torch.contiguous_format, torch.channels_last):
            with mode():
                assert net(x.to(memory_format=form)).shape == (0, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()(x).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is None or torch.equal(p.grad, torch.zeros_like(p)), name
    for name, value in net.state_dict().items():
        counter = name.endswith("num_batches_tracked")
        assert torch.equal(value, before[name] + 1 if counter else before[name]), name


# Hooks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["a new map", "in place"])
@pytest.mark.parametrize("norm", ["group", "batch", None])
def test_a_hook_that_changes_a_blocks_output_counts_without_gradients_too(norm, kind, backend):
    net, plain = (
        ds.plug_in(hosts.small_net("tv_basic"), norm=norm, init="ones", backend=b) for b in (backend, "plain")
    )
    hosts.randomise(net.eval(), seed=2)
    plain.eval().load_state_dict(net.state_dict())
    x, seen = torch.randn(2, 3, 9, 7), []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(len(seen))
        output = output.clone() if kind == "a new map" else output
        with torch.no_grad():
            output[:, ::2] = 0
        return output

    for each in (net, plain):
        each.layer1.blocks[0].register_forward_hook(hook)
    with torch.no_grad():
        without, expected = net(x), plain(x)
    if kind == "a new map":  # autograd has no in-place change of what a block saved
        assert_close(net(x), without.double(), 1e-5, "with gradients")
    assert_close(without, expected.double(), 1e-5, "the plain form")
    assert len(seen) == (3 if kind == "a new map" else 2)


# Owners that do more than run their blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Owner(nn.Module):
    """Runs its blocks by a function that may be exchanged after plugging, which is then seen as it runs."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.blocks, self.run = nn.Conv2d(3, 8, 1), nn.Sequential(*[Block() for _ in range(4)]), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.blocks, self.stem(x))


def with_tanh(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = torch.tanh(block(x))
    return x


def in_place(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
        with torch.no_grad():
            x.mul_(0.5)
    return x


def in_parallel(blocks: Any, x: Tensor) -> Tensor:
    return sum(block(x) for block in blocks)


def pooled(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = F.avg_pool2d(block(x), 2)
    return x


def left_out(blocks: Any, x: Tensor) -> Tensor:
    for n, block in enumerate(blocks):
        x = x if n == 1 else block(x)
    return x


def in_slices(blocks: Any, x: Tensor) -> Tensor:
    for part in (blocks[:2], blocks[2:]):
        for block in part:
            x = block(x)
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "run", [with_tanh, in_place, in_parallel, pooled, left_out, in_slices], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without"])
def test_blocks_that_are_not_run_one_after_the_other_are_refused_as_they_run(run, recorded, backend):
    net = ds.plug_in(Owner(lambda blocks, x: blocks(x)), backend=backend).train(recorded)
    net.run = run
    with torch.set_grad_enabled(recorded), pytest.raises(ds.DenseShortcutError) as error:
        net(torch.randn(2, 3, 16, 16))
    assert "leave the stage out" in one_sentence(error)


def test_a_host_that_runs_its_blocks_itself_is_served():
    def run(blocks: Any, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    net, x = Owner(run), torch.randn(2, 3, 16, 16)
    ds.plug_in(net, init="ones", norm=None).eval()
    with torch.no_grad():
        assert_close(net(x), net.blocks(net.stem(x)).double(), 1e-6, "output")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [0, 2])
def test_a_branch_of_another_shape_than_the_maps_is_refused(padding, backend):
    net = ds.plug_in(hosts.small_net("timm_basic"), backend=backend).eval()
    net.layer1.blocks[1].conv2 = nn.Conv2d(8, 8, 3, padding=padding)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), pytest.raises(ds.DenseShortcutError) as error:
            net(torch.randn(2, 3, 9, 7))
        assert "cannot be added to maps of shape" in one_sentence(error)


# Transforms of torch.func


def transformed_net(norm: str | None) -> nn.Module:
    net = ds.plug_in(hosts.small_net("timm_basic"), norm=norm, init="ones").double().eval()
    hosts.randomise(net, seed=3)
    return net


@pytest.mark.parametrize("norm", ["group", "batch", None])
def test_forward_mode_gives_the_directional_derivative(norm):
    net, x = transformed_net(norm), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    v = torch.randn_like(x)
    wanted = (net(x + 1e-6 * v) - net(x - 1e-6 * v)) / 2e-6
    assert_close(torch.func.jvp(net, (x,), (v,))[1], wanted, 1e-5, "jvp")
    with torch.no_grad(), forward_ad.dual_level():
        y = net(forward_ad.make_dual(x, v))
        assert_close(forward_ad.unpack_dual(y).tangent, wanted, 1e-5, "without gradients")


def test_gradients_for_each_sample_are_those_of_batches_of_one():
    net, x = transformed_net("group"), torch.randn(3, 3, 9, 7, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(3):
        grads = torch.autograd.grad(net(x[n : n + 1]).square().sum(), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            wanted = torch.zeros_like(parameters[name]) if grad is None else grad
            assert_close(each[name][n], wanted, 1e-9, name)


def test_a_named_back_end_says_that_it_knows_no_transforms():
    net, x = ds.plug_in(hosts.small_net(), backend="native").eval(), torch.randn(1, 3, 9, 7)
    with pytest.raises(ds.DenseShortcutError) as error:
        torch.func.jvp(net, (x,), (x,))
    assert "choose 'auto' or 'plain'" in one_sentence(error)
