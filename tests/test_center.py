"""Norms without centring: every map divided by its root mean square, against the definition."""

import copy

import hosts
import pytest
import reference
import timm
import torch
from hosts import assert_close
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError

NORMS = ("batch", "group", "layer", "instance")
CHANNELS, WIDTH = 8, 2  # of a bottleneck's maps, and inside it


class RootMeanSquare(nn.Module):
    """x / sqrt(mean of x^2 + eps), with the running mean of squares of batch norm."""

    def __init__(self, norm: str, channels: int) -> None:
        super().__init__()
        self.norm, self.running = norm, torch.ones(channels, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "batch":
            square = x.square().mean((0, 2, 3)) if self.training else self.running
            if self.training:
                self.running = 0.9 * self.running + 0.1 * square.detach()
            return x / torch.sqrt(square + 1e-5).view(1, -1, 1, 1)
        groups = {"group": reference.default_groups(x.shape[1]), "layer": 1, "instance": x.shape[1]}[self.norm]
        parts = x.unflatten(1, (groups, -1))
        return (parts / torch.sqrt(parts.square().mean((2, 3, 4), keepdim=True) + 1e-5)).flatten(1, 2)


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("aggregate", ["stage", "block"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_sums_and_every_gradient_are_those_of_the_definition(norm, aggregate, train, backend):
    torch.manual_seed(0)
    host = nn.Sequential(hosts.make_stage("timm_bottleneck", 4, CHANNELS, in_channels=6)).double()
    hosts.randomise(host, seed=1)
    blocks = hosts.frozen_copy(host[0])
    options = {"norm": norm, "aggregate": aggregate, "inner": True, "backend": backend}
    stage = ds.plug_in(host, center=False, **options)[0]
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=2)
    norms = [RootMeanSquare(norm, CHANNELS) for _ in blocks]
    inner = [RootMeanSquare(norm, WIDTH) if block.inner is not None else None for block in stage.blocks]
    w = [weight.detach().clone().requires_grad_() for weight in stage.shortcut.weights]
    v = [
        None if block.inner is None else block.inner.weight.detach().clone().requires_grad_() for block in stage.blocks
    ]
    for module in (host, *blocks, *norms, *(n for n in inner if n is not None)):
        module.train(train)

    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    for _ in range(2):  # the second in evaluation mode has running statistics that are not those of the start
        given, other = (x.clone().requires_grad_() for _ in range(2))
        y = stage(given)
        expected = reference.stage_maps(blocks, other, w, norms, aggregate=aggregate, v=v, inner_norms=inner)[-1]
        assert_close(y, expected, 1e-12, "output")
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(stage)(x), y)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close(given.grad, other.grad, 1e-11, "gradient of the input")
    for ours, theirs in zip(stage.shortcut.weights, w, strict=True):
        assert_close(ours.grad, theirs.grad, 1e-11, "gradient of the weights")
    if norm == "batch":
        for ours, theirs in zip(stage.shortcut.norms, norms, strict=True):
            assert_close(ours.running_var, theirs.running, 1e-12, "running mean of squares")
            assert not ours.running_mean.any()


def test_maps_behind_a_relu_keep_their_direction_at_the_start():
    """With branches at zero, X_l is X_0 up to a factor for each image; centred, the next ReLU cuts a part of it."""

    def cosine(center: bool) -> float:
        torch.manual_seed(0)
        net = timm.create_model("dsnet56", norm="layer", init="nearest", center=center, zero_init_last=True).train()
        kept = {}
        net.layer1[0].register_forward_hook(lambda module, given, result: kept.update(first=result))
        net.layer1.register_forward_hook(lambda module, given, result: kept.update(last=result))
        with torch.no_grad():
            net(torch.randn(4, 3, 32, 32))
        return torch.cosine_similarity(kept["first"].flatten(1), kept["last"].flatten(1)).min().item()

    assert cosine(center=False) > 0.9999
    assert cosine(center=True) < 0.9


@pytest.mark.parametrize("keep_identity", [False, True])
@pytest.mark.parametrize("kind", ["timm_basic", "timm_bottleneck"])
def test_a_batch_norm_without_centring_folds_away(kind, keep_identity):
    net = ds.plug_in(hosts.small_net(kind), norm="batch", center=False, keep_identity=keep_identity).double()
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=3)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64)
    net(x)
    net.eval()
    fused = ds.fuse(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert_close(fused(x), net(x), 1e-10, "output")


def test_tokens_are_divided_by_their_root_mean_square():
    torch.manual_seed(0)
    host = timm.create_model("test_vit", img_size=32)
    net = ds.plug_in(copy.deepcopy(host), center=False)
    norm = net.blocks.shortcut.norms[0]
    x = torch.randn(2, 64, 3, 4)
    expected = x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(norm(x), expected)
    net(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("norm", [None, "none", nn.BatchNorm2d], ids=str)
def test_a_norm_that_has_no_mean_to_leave_out_is_refused(norm):
    with pytest.raises(DenseShortcutError, match="center=False is for a norm by name"):
        ds.plug_in(hosts.small_net(), norm=norm, center=False)
