"""Folding for inference changes no output but by rounding, and leaves what it was made from alone."""

import copy

import hosts
import pytest
import timm
import torch
from torch import nn

import dense_shortcuts as ds


def trained(kind: str, **variant) -> nn.Module:
    """A plugged network in float64 whose norms and shortcuts have numbers of their own."""
    net = ds.plug_in(hosts.small_net(kind), **variant).double().eval()
    hosts.randomise(net, seed=5)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=6)
    return net.double()


def batch_norms(net: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"norm": "batch"},
        {"norm": "batch", "keep_identity": True},
        {"norm": "batch", "aggregate": "block"},
        {"aggregate": "dense_identity"},
        {"norm": None},
        {"norm": "instance"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", hosts.KINDS)
def test_a_fused_network_gives_the_output_of_the_one_it_was_made_from(kind, variant):
    net, x = trained(kind, **variant), torch.randn(3, 3, 9, 7, dtype=torch.float64)
    before, expected = copy.deepcopy(net.state_dict()), net(x)
    fused = ds.fuse(net)
    torch.testing.assert_close(fused(x), expected.detach(), rtol=1e-9, atol=1e-9)
    assert batch_norms(fused) < batch_norms(net)
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("name", ["dsnet50", "dsnet18", "ds2net50", "ds2res2net50", "se_dsnet50", "dsnet20"])
def test_the_families_fuse(name):
    net = timm.create_model(name, num_classes=5, norm="batch").double().eval()
    hosts.randomise(net, seed=1)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=2)
    net.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = ds.fuse(net)
    torch.testing.assert_close(fused(x), net(x).detach(), rtol=1e-8, atol=1e-8)
    left = batch_norms(fused)
    if name in ("dsnet50", "dsnet18", "dsnet20"):
        assert left == 0  # every one is folded away
    else:
        assert left > 0  # DS2's own norms, and those behind squeeze-excite, stay


def test_a_network_that_cannot_be_fused_is_refused_and_a_fused_one_is_not_unplugged():
    host = hosts.small_net()
    with pytest.raises(ds.DenseShortcutError, match="not plugged in"):
        ds.fuse(host)
    net = ds.plug_in(host)
    fused = ds.fuse(net)
    with pytest.raises(ds.DenseShortcutError, match="fused already"):
        ds.fuse(fused)
    with pytest.raises(ds.DenseShortcutError, match="unplug the one it was made from"):
        ds.unplug(fused)
    assert not ds.dense_stages(ds.unplug(net))
