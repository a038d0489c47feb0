"""Containers that do more than run their blocks one after the other, against the equations over their hosts' blocks."""

import copy
import pickle
from typing import Any

import hosts
import pytest
import reference
import timm
import torch
import torchvision
from hosts import assert_close
from reference import column
from timm.models import FeatureHookNet
from timm.models.dla import DlaBasic, DlaBottle2neck, DlaBottleneck, DlaTree
from timm.models.xception_aligned import XceptionAligned
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dense_shortcuts as ds
from dense_shortcuts.experiments.explain.cam import cam_maps


def images(channels: int, side: int, n: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(4)
    return torch.randn(n, channels, side, side, dtype=torch.float64, generator=rng)


def shaken(host: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A host in float64, in evaluation mode, with other numbers than its start's, and the same plugged in."""
    torch.manual_seed(7)
    hosts.randomise(host.double().eval(), seed=8)
    net = ds.plug_in(copy.deepcopy(host), **options)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=9)
    return host, net


def joined(net: nn.Module, name: str, k: int, maps: list[Tensor], norm: Any, tokens: bool = False) -> Tensor:
    """sum_i w_{l,i} * N(X_i) for block l = k + 1 of the row whose shortcut has this name."""
    weights = net.get_parameter(f"{name}.weights.{k}")
    assert len(weights) == len(maps)
    if tokens:
        return sum(w * norm(x) for w, x in zip(weights, maps, strict=True))
    return sum(column(w) * norm(x) for w, x in zip(weights, maps, strict=True))


# Trees: a row of two blocks, the first of which is handed a projection that is its shortcut


def dla(block: type[nn.Module], **options: Any) -> DlaTree:
    return DlaTree(1, block, 16, 32, 2, level_root=True, root_dim=64, base_width=32, cardinality=2, **options)


@pytest.mark.parametrize("shortcut", [False, True], ids=["plain root", "root with a shortcut"])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("block", [DlaBasic, DlaBottleneck, DlaBottle2neck])
def test_a_tree_of_dla_is_the_equations(block, inner, shortcut):
    if inner and block is DlaBasic:
        with pytest.raises(ds.DenseShortcutError, match="needs bottleneck blocks"):
            ds.plug_in(dla(block), inner=True)
        return
    host, net = shaken(dla(block, root_shortcut=shortcut), inner=inner)
    x, relu, norm = images(16, 8), nn.ReLU(), reference.real_norm("group", 32)
    for tree in (host.tree1, host.tree2):  # what the reference asks of timm's Res2Net block
        tree.downsample, tree.drop_block = None, nn.Identity()
    v, inner_norm = None, None
    if inner:
        v = net.get_parameter("tree2.inner.weight")
        inner_norm = reference.real_norm("group", host.tree2.conv3.in_channels)

    bottom = host.downsample(x)
    maps = [host.project(bottom)]
    maps.append(relu(reference.branch(host.tree1, x) + joined(net, "shortcut", 0, maps, norm)))
    second = reference.branch(host.tree2, maps[1], v, inner_norm)
    maps.append(relu(second + joined(net, "shortcut", 1, maps, norm)))
    expected = host.root([maps[2], maps[1], bottom])

    assert_close(net(x), expected, 1e-12, "output")
    ours = torch.autograd.grad(net(x).square().sum(), [p for _, p in ds.shortcut_parameters(net)])
    theirs = torch.autograd.grad(expected.square().sum(), [p for _, p in ds.shortcut_parameters(net)])
    for (name, _), mine, other in zip(ds.shortcut_parameters(net), ours, theirs, strict=True):
        assert_close(mine, other, 1e-10, name)
        assert other.abs().sum() > 0


def test_the_children_of_a_tree_reach_its_root():
    host, net = shaken(dla(DlaBasic, root_shortcut=True), keep_identity=True, init="zeros")
    for _, p in ds.shortcut_parameters(net):
        nn.init.zeros_(p)
    host.root.conv = net.root.conv = nn.Conv2d(112, 32, 1).double()
    more = images(32, 4)
    assert torch.equal(net(images(16, 8), None, [more]), host(images(16, 8), None, [more]))


def test_a_network_of_trees_folds_for_inference():
    torch.manual_seed(1)
    net = timm.create_model("dla34", levels=(1, 1, 1, 2, 1, 1), channels=(8, 8, 16, 16, 32, 32), num_classes=3)
    _, net = shaken(net, norm="batch", init="uniform")
    x = images(3, 64)
    assert_close(ds.fuse(net)(x), net(x), 1e-9, "output")


def test_a_tree_of_another_class_is_refused():
    class OfSomebody(DlaTree):
        def forward(self, x, shortcut=None, children=None):
            return self.tree2(self.downsample(x)) + self.tree1(x)

    with pytest.raises(ds.DenseShortcutError, match=r"OfSomebody that holds DlaBasic blocks"):
        ds.plug_in(OfSomebody(1, DlaBasic, 8, 8, 1))


# Lists with something between two of their blocks


def twins(**options: Any) -> nn.Module:
    sizes = {"embed_dims": (16, 16, 32, 32), "depths": (3, 1, 2, 4), "num_heads": (2, 2, 2, 2)}
    return timm.create_model("twins_svt_small", img_size=64, wss=(4, 4, 2, 2), num_classes=3, **sizes, **options)


def convit(**options: Any) -> nn.Module:
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 5, "num_heads": 2, "local_up_to_layer": 3}
    return timm.create_model("convit_tiny", img_size=32, num_classes=3, **sizes, **options)


def layer_norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def test_the_rows_of_twins_begin_before_and_behind_the_convolution():
    host, net = shaken(twins())
    x = images(3, 64)
    expected = x
    for n, blocks in enumerate(host.blocks):
        assert [row[:2] for row in net.blocks[n].rows] == [(0, 1), (1, len(blocks))][: len(blocks)]
        expected, size = host.patch_embeds[n](expected)
        maps = [expected]
        for j, block in enumerate(blocks):
            name, k = (f"blocks.{n}.shortcut", 0) if j == 0 else (f"blocks.{n}.shortcut2", j - 1)
            branch = block(maps[-1], size) - maps[-1]
            maps.append(branch + joined(net, name, k, maps, layer_norm, tokens=True))
            if j == 0:
                maps = [host.pos_block[n](maps[-1], size)]
        expected = maps[-1]
        if n < 3:
            expected = expected.reshape(2, *size, -1).permute(0, 3, 1, 2)
    assert_close(net.forward_features(x), host.norm(expected), 1e-11, "features")
    assert_close(net.forward_intermediates(x)[0], host.norm(expected), 1e-11, "by stages")


def test_a_row_of_convit_begins_where_the_class_token_joins():
    host, net = shaken(convit())
    assert [row[:2] for row in net.blocks.rows] == [(0, 3), (3, 5)]
    x = images(3, 32)
    maps = [host.patch_embed(x) + host.pos_embed]
    for n, block in enumerate(host.blocks):
        if n == 3:
            maps = [torch.cat([host.cls_token.expand(2, -1, -1), maps[-1]], 1)]
        name, k = ("blocks.shortcut", n) if n < 3 else ("blocks.shortcut2", n - 3)
        branch = block(maps[-1]) - maps[-1]
        maps.append(branch + joined(net, name, k, maps, layer_norm, tokens=True))
    assert_close(net.forward_features(x), host.norm(maps[-1]), 1e-11, "features")
    assert_close(net.forward_intermediates(x)[0], host.norm(maps[-1]), 1e-11, "by blocks")


def test_networks_with_such_lists_give_features():
    for make, x in ((twins, images(3, 64).float()), (convit, images(3, 32).float())):
        host = make(features_only=True).eval()
        expected = host(x)
        assert all(torch.equal(*pair) for pair in zip(ds.plug_in(host, keep_identity=True)(x), expected, strict=True))


# Blocks that are called by name


def xception_by_equations(host: nn.Module, net: nn.Module, x: Tensor) -> Tensor:
    x = host.act2(host.bn2(host.conv2(host.act1(host.bn1(host.conv1(x))))))
    rows = {"shortcut": [1], "shortcut2": [2], "shortcut3": range(3, 12), "shortcut4": [12]}
    for name, numbers in rows.items():
        for k, n in enumerate(numbers):
            block = host.get_submodule(f"block{n}")
            if k == 0:
                maps = [block.skipbn(block.skip(x))]
            norm = reference.real_norm("group", maps[0].shape[1])
            x = block.rep(x.clone()) + joined(net, name, k, maps, norm)
            maps.append(x)
    return host.act4(host.bn4(host.conv4(host.act3(host.bn3(host.conv3(x))))))


def test_blocks_that_xception_calls_by_name_are_the_equations():
    host, net = shaken(hosts.xception(3))
    x = images(3, 64)
    expected = xception_by_equations(host, net, x)
    assert_close(net.forward_features(x), expected, 1e-10, "features")
    assert_close(net.forward_intermediates(x)[0], expected, 1e-10, "by blocks")
    assert_close(net(x), host.forward_head(expected), 1e-10, "output")


def test_a_pass_knows_nothing_of_the_one_before_and_copies_are_apart():
    _, net = shaken(hosts.xception(3))
    x, other = images(3, 64), images(3, 80, 1)
    expected = net(x)
    net(other)
    assert torch.equal(net(x), expected)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)
        nn.init.zeros_(twin.get_parameter("shortcut3.weights.8"))
        assert not torch.equal(twin(x), expected) and torch.equal(net(x), expected)
        assert type(ds.unplug(twin)) is type(hosts.xception(3))


def test_the_tools_for_plugged_networks_take_one_that_is_a_stage_itself():
    _, net = shaken(hosts.xception(3))
    net, x = net.float(), images(3, 64).float()
    assert ds.check(net, (3, 64, 64)) == []
    assert cam_maps(net, x, [0, 1], "ablationcam").shape == (2, 64, 64)
    with pytest.raises(ds.DenseShortcutError, match=r"block5 is a block .* take another layer"):
        cam_maps(net, x, [0, 1], "ablationcam", "block5")
    net.shortcut3.weights[2].requires_grad_(False)
    assert ds.check(net, (3, 64, 64)) == ["shortcut3.weights.2 is frozen: call requires_grad_() on it"]
    assert str(ds.plan(ds.unplug(net))).splitlines()[1].startswith("(itself)")


def test_a_block_called_by_name_from_elsewhere_says_so():
    for net, block, width in ((hosts.xception(3), "block5", 24), (dla(DlaBasic), "tree2", 32)):
        with pytest.raises(ds.DenseShortcutError, match="called by itself"):
            ds.plug_in(net).get_submodule(block)(torch.zeros(1, width, 8, 8))


def aligned() -> nn.Module:
    """timm's features_only of an aligned Xception, whose blocks it takes out of their nn.Sequential."""
    blocks = [
        {"in_chs": 64, "out_chs": 16, "stride": 2},
        *[{"in_chs": 16, "out_chs": 16, "stride": 1} for _ in range(3)],
        {"in_chs": 16, "out_chs": 24, "stride": 2},
        {"in_chs": 24, "out_chs": (24, 24, 32), "stride": 1, "no_skip": True, "start_with_relu": False},
    ]
    torch.manual_seed(3)
    network = XceptionAligned(blocks, num_classes=3)
    return FeatureHookNet(network, out_indices=(0, 1, 2), flatten_sequential=True).double().eval()


def test_blocks_that_timm_takes_out_of_their_sequence_give_their_features():
    host, x = aligned(), images(3, 32)
    keys, expected = list(host.state_dict()), host(x)
    net = ds.plug_in(host, keep_identity=True)
    assert [row[:2] for row in net.rows] == [(2, 6), (6, 7)]
    assert all(torch.equal(*pair) for pair in zip(net(x), expected, strict=True))
    ds.unplug(net)
    assert type(net) is FeatureHookNet and list(net.state_dict()) == keys
    assert all(torch.equal(*pair) for pair in zip(net(x), expected, strict=True))


SEGMENTATION: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_blocks_that_torchvision_takes_out_of_their_sequence_give_their_features(name):
    torch.manual_seed(3)
    host, x = torchvision.models.get_model(name, **SEGMENTATION).double().eval(), images(3, 64)
    keys, expected = list(host.state_dict()), host(x)
    assert {stage.name for stage in ds.plan(host).stages} == {"backbone"}
    net = ds.plug_in(host, keep_identity=True)
    actual = net(x)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    actual["out"].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in ds.shortcut_parameters(net))
    ds.unplug(net)
    assert type(net.backbone).__name__ == "IntermediateLayerGetter" and list(net.state_dict()) == keys
    assert all(torch.equal(net(x)[key], expected[key]) for key in expected)


def test_checkpoints_of_such_features_give_the_same_gradients():
    _, net = shaken(aligned())
    runs: list[int] = []
    net.get_submodule("blocks_2.stack.conv1.conv_pw").register_forward_hook(lambda *_: runs.append(1))

    def gradients() -> list[Tensor]:
        net.zero_grad()
        sum(y.square().mean() for y in net(images(3, 32))).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    plain, counted = gradients(), len(runs)
    net.set_grad_checkpointing()
    saved = gradients()
    assert counted == 1 and len(runs) == 3  # once more where the backward pass needs it
    for one, other in zip(plain, saved, strict=True):
        assert_close(other, one, 1e-10, "gradient")


def test_a_host_that_calls_a_method_of_a_block_is_told_to_unplug():
    net = ds.plug_in(timm.create_model("xception41", num_classes=3))
    with pytest.raises(AttributeError, match="the host reads forward_with_tap: unplug the network first"):
        net.forward_intermediates(torch.zeros(1, 3, 32, 32))


def test_a_tree_compiles_in_one_graph():
    _, net = shaken(dla(DlaBasic))
    x = images(16, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(net, fullgraph=True, backend="eager")(x), net(x), 1e-12, "output")


# Which owners are seen to feed each block to the next


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class _Owner(nn.Module):
    """Four blocks in a list, or in a sequence, and other layers of the same shape."""

    list_class: Any = nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        blocks = [_Plain() for _ in range(4)]
        self.blocks = nn.Sequential(*blocks) if self.list_class is nn.Sequential else nn.ModuleList(blocks)
        self.post = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(4)])

    def halve(self, block: Any, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(block(x), 2)


class Loop(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Inherits(Loop):
    pass


class CallsItsParent(Loop):
    def forward(self, x):
        return 2 * super().forward(x)


class Enumerated(_Owner):
    def forward(self, x):
        seen = []
        for _, (block, post) in enumerate(zip(self.blocks, self.post, strict=True)):
            y: Tensor = block(x)
            x = y
            seen.append(post(x))
        return seen[-1]


class LocalList(_Owner):
    def forward(self, x):
        blocks = list(self.blocks)
        for n, block in enumerate(blocks):
            x = checkpoint(block, x, use_reentrant=False) if n % 2 else block(x)
        return x


class OfASequence(Loop):
    list_class = nn.Sequential


class CallsASequence(_Owner):
    list_class = nn.Sequential

    def forward(self, x):
        return self.blocks(x) * len(self.blocks)


class InTwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stages = nn.ModuleList([nn.ModuleList([_Plain() for _ in range(4)]) for _ in range(2)])

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
            x = x * 2
        return x


class Through(nn.Module):
    """Runs the blocks of another module's."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x):
        for block in self.owner.blocks:
            x = block(x)
        return x


CHAINS = [
    Loop, Inherits, CallsItsParent, Enumerated, LocalList, OfASequence, CallsASequence, InTwoLists,
    lambda: Through(_Owner()),
]  # fmt: skip


@pytest.mark.parametrize("make", CHAINS)
def test_owners_that_feed_each_block_to_the_next_are_plugged_and_start_as_their_host(make):
    host, x = make().double(), images(4, 6)
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    assert {(row.first, row.stop) for stage in ds.dense_stages(net).values() for row in stage.rows} == {(0, 4)}
    assert torch.equal(net(x), host(x))
    net(x).square().sum().backward()
    host(x).square().sum().backward()
    for name, p in host.named_parameters():
        if p.grad is not None:
            assert_close(net.get_parameter(name).grad, p.grad, 1e-12, name)


class AnotherLayerBetween(_Owner):
    def forward(self, x):
        for block, post in zip(self.blocks, self.post, strict=True):
            x = block(x)
            x = post(x)
        return x


class AnnotatedChange(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x: Tensor = nn.functional.avg_pool2d(x, 2)
        return x


class WalrusChange(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if (x := torch.tanh(x)) is None:
                break
        return x


class InPlaceMethod(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x[:, 0].mul_(0.5)
        return x


class InPlaceFunction(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            nn.functional.relu(x, inplace=True)
        return x


class SetsAPart(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x[:, 0] = 0
        return x


class ThroughAHelper(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = self.halve(block, x)
        return x


class Twice(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = block(x)
        return x


class AResultChanged(_Owner):
    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            y = y * 2
            x = y
        return x


class Backwards(_Owner):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


class EverySecond(_Owner):
    def forward(self, x):
        for block in self.blocks[::2]:
            x = block(x)
        return x


class ChangedInASequence(AnnotatedChange):
    list_class = nn.Sequential


class SequenceInParallel(_Owner):
    list_class = nn.Sequential

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


class SequenceByIndex(_Owner):
    list_class = nn.Sequential

    def forward(self, x):
        for n in range(4):
            x = self.blocks[n](x)
        return x


class SequenceInSlices(_Owner):
    list_class = nn.Sequential

    def forward(self, x):
        return self.blocks[2:](self.blocks[:2](x) * 2)


class SequenceByItsChildren(_Owner):
    list_class = nn.Sequential

    def forward(self, x):
        for _, block in self.blocks.named_children():
            x = block(x)
        return x


NO_CHAINS = [
    AnotherLayerBetween, AnnotatedChange, WalrusChange, InPlaceMethod, InPlaceFunction, SetsAPart, ThroughAHelper,
    Twice, AResultChanged, Backwards, EverySecond, ChangedInASequence, SequenceInParallel, SequenceByIndex,
    SequenceInSlices, SequenceByItsChildren,
]  # fmt: skip


@pytest.mark.parametrize("make", NO_CHAINS)
def test_owners_that_do_anything_else_between_their_blocks_are_refused_before_anything_is_changed(make):
    net = make()
    with pytest.raises(ds.DenseShortcutError, match="does not feed each block to the next"):
        ds.plug_in(net)
    assert not ds.dense_stages(net)


def test_a_sequence_whose_owner_calls_a_layer_before_the_blocks_by_its_index_is_plugged():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(4, 4, 1), _Plain(), _Plain())

        def forward(self, x: Tensor) -> Tensor:
            x = self.features[0](x)
            for block in self.features[1:]:
                x = block(x)
            return x

    host, x = Net(), images(4, 6).float()
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    assert_close(net(x), host(x).double(), 1e-6, "output")


def test_a_host_that_may_call_a_method_of_a_block_is_plugged_for_its_other_passes():
    net = timm.create_model("xception41", num_classes=3)
    assert [(s.row.first, s.row.stop) for s in ds.plan(net).stages] == [(0, 1), (1, 2), (2, 11), (11, 12)]
