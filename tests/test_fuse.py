"""Folding for inference changes no output but by rounding, and leaves what it was made from alone."""

import copy
from itertools import product

import hosts
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

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


def assert_same(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """Fuses a plugged network, compares outputs in float64 with gradients recorded and without, gives the fused one."""
    fused = ds.fuse(net)
    torch.testing.assert_close(fused(x), net(x).detach(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-9, atol=1e-9)
    return fused


NORMS = ("group", "batch", "layer", "instance", None)
SUMS = ({"window": 2}, {"pattern": "powers"}, {"every": 2}, {"keep_identity": True})
FUSED = [
    *product(("channel", "softmax", "gate", "attention"), NORMS, ("stage", "block"), [False], [{}]),
    *product(("channel", "gate"), ("group", "batch"), ("stage", "block"), [False, True], SUMS),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("weighting", "norm", "aggregate", "inner", "sums"),
    [case for case in FUSED if case[0] == "channel" or "keep_identity" not in case[-1]],  # others are refused
    ids=str,
)
def test_every_weighting_and_norm_fuses(weighting, norm, aggregate, inner, sums):
    torch.manual_seed(0)
    net = hosts.Net("timm_bottleneck", (5, 2), (8, 16))
    net = ds.plug_in(net, weighting=weighting, norm=norm, aggregate=aggregate, inner=inner, **sums).double().eval()
    hosts.randomise(net, seed=5)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=6)
    fused = assert_same(net.double(), torch.randn(2, 3, 9, 7, dtype=torch.float64))
    shortcuts_gone = all(not stage.shortcut.normalised for stage in ds.dense_stages(fused).values())
    assert shortcuts_gone == (norm is None or (norm == "batch" and weighting != "attention" and aggregate == "stage"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(x + self.bn(self.conv(x)))


class Host(nn.Module):
    """conv1 and bn1 stand first and a plain stem behind them; subclasses run them as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.layer1 = nn.Sequential(Block(), Block())
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.layer1(self.bn2(self.stem(self.bn1(self.conv1(x)))))


class ActsBetween(Host):
    def forward(self, x):
        return self.layer1(self.stem(self.bn1(F.relu(self.conv1(x)))))


class ConvUsedTwice(Host):
    def forward(self, x):
        y = self.conv1(x)
        return self.layer1(self.stem(self.bn1(y))) + y


class ConvCalledTwice(Host):
    def forward(self, x):
        return self.layer1(self.stem(self.bn1(self.conv1(x)))) + self.conv1(x.flip(1))


class NormCalledTwice(Host):
    def forward(self, x):
        return self.bn1(self.layer1(self.stem(self.bn1(self.conv1(x)))))


class NormIsTheLast(Host):
    def forward(self, x):
        return self.bn1(self.layer1(self.stem(self.conv1(x))))


class IteratesOverItsStem(Host):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        for layer in self.stem:
            x = F.softplus(layer(x))
        return self.layer1(x)


class UsesALayerOfItsStemAlone(Host):
    def forward(self, x):
        x = self.conv1(x)
        return self.layer1(self.bn1(self.stem(x))) + self.stem[0](x)


class ReadsAWeight(Host):
    def forward(self, x):
        return self.layer1(self.stem(self.bn1(self.conv1(x)))) * self.conv1.weight.sum() + self.bn1.running_mean.sum()


class AsksForATensor(Host):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return self.layer1(self.bn1(self.conv1(x)))
        return self.layer1(self.bn1(F.relu(self.conv1(x))))


class HasASwitch(Host):
    def forward(self, x, plain=None):
        return self.layer1(self.bn1(self.conv1(x) if plain is not None else F.relu(self.conv1(x))))


class LooksAtItsInput(Host):
    def forward(self, x):
        return self.layer1(self.bn1(F.relu(self.conv1(x)) if x.mean() < 9 else self.conv1(x)))


class CallsAChildDifferently(Host):
    def __init__(self) -> None:
        super().__init__()
        self.child = HasASwitch()

    def forward(self, x):
        return self.layer1(self.child(x)) + self.child(x, plain=True) + self.child.conv1(x)


class Shared(Host):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.conv1, nn.BatchNorm2d(8))

    def forward(self, x):
        return self.layer1(self.bn1(self.conv1(x))) + self.stem(x)


class KeepsAMap(Host):
    def forward(self, x):
        self.kept = self.bn1(self.conv1(x))
        return self.layer1(self.kept)


def host_of(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    net = cls()
    hosts.randomise(net, seed=4)
    return ds.plug_in(net, norm="group").double().eval()


FOLDED = {"layer1.0.bn", "layer1.1.bn"}


@pytest.mark.parametrize(
    ("cls", "folded"),
    [
        (Host, {"bn1", "stem.1", "bn2"}),
        (KeepsAMap, {"bn1"}),
        *((cls, {"stem.1"}) for cls in (ActsBetween, ConvUsedTwice, ConvCalledTwice, NormCalledTwice, NormIsTheLast)),
        (UsesALayerOfItsStemAlone, {"bn1"}),
        (IteratesOverItsStem, {"bn1"}),
        (ReadsAWeight, {"stem.1"}),
        *((cls, set()) for cls in (AsksForATensor, HasASwitch, LooksAtItsInput)),
        (CallsAChildDifferently, {"child.layer1.0.bn", "child.layer1.1.bn"}),
    ],
)
def test_a_norm_is_folded_only_where_it_is_seen_to_follow_its_convolution(cls, folded):
    net = host_of(cls)
    fused = ds.fuse(net)
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name for name in norms if type(fused.get_submodule(name)) is nn.Identity} == folded | FOLDED
    assert "kept" not in vars(fused), "a value of the recording was left in the network"
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), net(x).detach(), rtol=1e-9, atol=1e-9)


def test_recording_a_forward_pass_draws_no_random_numbers():
    class Draws(Host):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(1)

    net, state = host_of(Draws), torch.get_rng_state()
    ds.fuse(net)
    assert torch.equal(torch.get_rng_state(), state)


def watch_norm(net, seen):
    net.bn1.register_forward_hook(lambda *_: seen.append("bn1"))


def change_conv(net, seen):
    net.layer1[0].conv.register_forward_hook(lambda *args: seen.append("conv") or 2 * args[-1])


def replace_forward(net, seen):
    own = net.conv1.forward
    net.conv1.forward = lambda x: seen.append("conv1") or own(x)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("observe", [watch_norm, change_conv, replace_forward])
def test_what_is_hooked_stays_and_its_hook_fires(observe, norm):
    seen = []
    net = host_of(Host) if norm == "group" else ds.plug_in(ds.unplug(host_of(Host)), norm=norm).double().eval()
    observe(net, seen)
    fused = assert_same(net, torch.randn(2, 3, 6, 5, dtype=torch.float64))
    seen.clear()
    fused(torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert len(seen) == 1


def test_parametrized_and_shared_convolutions_stay_as_they_are():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    net = host_of(Host)
    parametrize.register_parametrization(net.conv1, "weight", Double())
    fused = assert_same(net, torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert parametrize.is_parametrized(fused.conv1) and type(fused.bn1) is nn.BatchNorm2d
    fused = assert_same(host_of(Shared), torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert type(fused.bn1) is nn.BatchNorm2d and fused.stem[0] is fused.conv1


def biased(hook: bool) -> nn.Module:
    """A network whose last convolutions have a bias, and a norm behind them that stays."""
    torch.manual_seed(2)
    net = hosts.Net("timm_basic", (2, 2), (8, 16))
    for block in (*net.layer1, *net.layer2):
        block.conv2 = nn.Conv2d(block.conv2.in_channels, block.conv2.out_channels, 3, padding=1)
        if not hook:
            block.bn2 = nn.GroupNorm(2, block.conv2.out_channels)
    net = ds.plug_in(net, norm="batch").double().eval()
    hosts.randomise(net, seed=5)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=6)
    if hook:
        net.layer1.blocks[0].bn2.register_forward_hook(lambda *args: 3 * args[-1])
    return net.double()


@pytest.mark.parametrize("hook", [False, True])
def test_shifts_do_not_go_into_a_convolution_whose_norm_stays(hook):
    fused = assert_same(biased(hook), torch.randn(2, 3, 9, 7, dtype=torch.float64))
    assert [stage.shortcut.normalised for stage in ds.dense_stages(fused).values()] == [True, not hook]


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "factory",
    [
        lambda c: Scaled(c, affine=False),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
    ],
    ids=["subclass", "no statistics", "affine", "synchronised"],
)
def test_a_norm_of_ones_own_fuses_where_it_is_known(factory):
    net = ds.plug_in(hosts.small_net(), norm=factory).double().eval()
    for norm in net.layer1.shortcut.norms:
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=6)
    fused = assert_same(net, torch.randn(2, 3, 9, 7, dtype=torch.float64))
    known = type(net.layer1.shortcut.norms[0]) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    known = known and net.layer1.shortcut.norms[0].running_mean is not None
    assert fused.layer1.shortcut.normalised == (not known)
