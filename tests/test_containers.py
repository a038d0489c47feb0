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
    host, net = shaken(dla(block, root_shortcut=shortcut), norm="group", inner=inner)
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
        assert [row[:2] for row in net.blocks[n].segments] == [(0, 1), (1, len(blocks))][: len(blocks)]
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
    assert [row[:2] for row in net.blocks.segments] == [(0, 3), (3, 5)]
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
    host, net = shaken(hosts.xception(3), norm="group")
    x = images(3, 64)
    expected = xception_by_equations(host, net, x)
    assert_close(net.forward_features(x), expected, 1e-10, "features")
    assert_close(net.forward_intermediates(x)[0], expected, 1e-10, "by blocks")
    assert_close(net(x), host.forward_head(expected), 1e-10, "output")


def test_a_pass_knows_nothing_of_the_one_before_and_copies_are_apart():
    _, net = shaken(hosts.xception(3), norm="group")
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
    _, net = shaken(hosts.xception(3), norm="group")
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
    assert [row[:2] for row in net.segments] == [(2, 6), (6, 7)]
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


class ThroughAMethod(_Owner):
    def run(self, block, x):
        return block(x)

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


class Recursive(_Owner):
    def go(self, blocks, x):
        return self.go(blocks[1:], blocks[0](x)) if blocks else x

    def forward(self, x):
        return self.go(list(self.blocks), x)


class Enumerated(_Owner):
    def forward(self, x):
        seen = []
        for _, (block, post) in enumerate(zip(self.blocks, self.post, strict=True)):
            y = block(x)
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


class TwoPasses(CallsASequence):
    def forward(self, x):
        return super().forward(x) + super().forward(2 * x)


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


class ByATable(Loop):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"scale": [torch.full((4, 1, 1), 0.5)]}

    def forward(self, x):
        return super().forward(x * self.table["scale"][0].to(x.dtype))


CHAINS = [
    Loop, ThroughAMethod, Recursive, Enumerated, LocalList, OfASequence, CallsASequence, TwoPasses, InTwoLists,
    lambda: Through(_Owner()), ByATable,
]  # fmt: skip


@pytest.mark.parametrize("make", CHAINS)
def test_owners_that_feed_each_block_to_the_next_are_plugged_and_start_as_their_host(make):
    host, x = make().double(), images(4, 6)
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    assert {(row.first, row.stop) for stage in ds.dense_stages(net).values() for row in stage.segments} == {(0, 4)}
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


class SideBySide(_Owner):
    def forward(self, x):
        return torch.cat([block(x) for block in self.blocks[:2]]), self.blocks[2:]


class ChangedInASequence(AnotherLayerBetween):
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


class AlsoByIndex(Loop):
    def forward(self, x):
        return super().forward(x) + self.blocks[2](x)


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
    AnotherLayerBetween, InPlaceMethod, InPlaceFunction, SetsAPart, ThroughAHelper, Twice, Backwards, EverySecond,
    SideBySide, ChangedInASequence, SequenceInParallel, SequenceByIndex, AlsoByIndex, SequenceInSlices,
    SequenceByItsChildren,
]  # fmt: skip


@pytest.mark.parametrize("make", NO_CHAINS)
def test_owners_that_do_anything_else_between_their_blocks_are_refused_before_anything_is_changed(make):
    net = make()
    with pytest.raises(ds.DenseShortcutError, match="does not feed each block to the next"):
        ds.plug_in(net)
    assert not ds.dense_stages(net)


def test_a_list_of_blocks_that_are_never_called_is_refused():
    class ByTheirLayers(_Owner):
        def forward(self, x):
            for block in self.blocks:
                x = x + block.conv(x)
            return x

    with pytest.raises(ds.DenseShortcutError, match=r"could not be seen: .* \(it ran without these blocks\)"):
        ds.plug_in(ByTheirLayers())


class ChangesOnce(_Owner):
    def forward(self, x):
        for n, block in enumerate(self.blocks):
            x = block(x if n != 1 else torch.tanh(x))
        return x


class InTwoSlices(_Owner):
    def forward(self, x):
        for block in self.blocks[:1]:
            x = block(x)
        for block in self.blocks[1:]:
            x = block(x)
        return x


@pytest.mark.parametrize("make", [ChangesOnce, InTwoSlices])
def test_a_row_begins_where_an_owner_changes_the_map_and_where_it_begins_another_pass(make):
    host, x = make().double(), images(4, 6)
    net = ds.plug_in(copy.deepcopy(host), norm=None, init="ones")
    assert [tuple(row[:2]) for row in net.blocks.segments] == [(0, 1), (1, 4)]
    x = images(4, 6)
    expected = net.blocks[0].conv(x) + x
    maps = [torch.tanh(expected) if make is ChangesOnce else expected]
    for block in host.blocks[1:]:
        maps.append(block.conv(maps[-1]) + sum(maps))
    assert_close(net(x), maps[-1], 1e-12, "output")


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
    assert [(s.segment.first, s.segment.stop) for s in ds.plan(net).stages] == [(0, 1), (1, 2), (2, 11), (11, 12)]


# What the network is run on to see it


class OfWords(nn.Module):
    """Takes no images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.blocks = nn.Embedding(9, 4), nn.ModuleList([Mixes() for _ in range(3)])

    def forward(self, words: Tensor, *, scale: float) -> Tensor:
        x = self.embed(words) * scale
        for block in self.blocks:
            x = block(x)
        return x


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class LooksAtItsData(_Owner):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if x.sum() > 0 else -x


class LooksFirst(_Owner):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return Loop.forward(self, x)


class LooksFirstAtASequence(LooksFirst):
    list_class = nn.Sequential


def test_a_network_that_takes_no_images_is_plugged_with_an_example():
    host, words = OfWords().double().eval(), torch.tensor([[1, 5, 8]])
    with pytest.raises(ds.DenseShortcutError, match=r"give an input that it takes, example=x \(no input"):
        ds.plug_in(host)
    with pytest.raises(ds.DenseShortcutError, match=r"example=x \(TypeError: .*'scale'\)"):
        ds.plan(host, example=words)
    example = {"words": words, "scale": 0.5}
    assert [stage.depth for stage in ds.plan(host, example=example).stages] == [3]
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True, example=example)
    assert torch.equal(net(words, scale=0.3), host(words, scale=0.3))


def test_an_example_may_be_a_tuple_of_arguments():
    class Two(Loop):
        def forward(self, x, y):
            return super().forward(torch.cat([x, y], 1))

    x = torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4)
    assert [stage.depth for stage in ds.plan(Two(), example=x).stages] == [4]
    with pytest.raises(ds.DenseShortcutError, match="could not be seen"):
        ds.plan(Two())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_images_are_made_with_the_channels_and_axes_of_the_first_convolution(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(6, 6, 1)

        def forward(self, x):
            return x + self.conv(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = conv(5, 6, 3, 2, 1), nn.ModuleList([Block(), Block()])

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

    assert [(s.name, s.depth, s.channels) for s in ds.plan(Net()).stages] == [("blocks", 2, 6)]


@pytest.mark.parametrize("options", [{"img_size": 48}, {"in_chans": 1}, {"img_size": (32, 64), "in_chans": 2}], ids=str)
def test_networks_of_timm_are_run_on_images_that_they_were_made_for(options):
    net = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=2, **options)
    assert [(stage.name, stage.depth) for stage in ds.plan(net).stages] == [("blocks", 3)]


def test_what_a_network_does_before_it_looks_at_its_data_is_seen():
    assert [stage.depth for stage in ds.plan(LooksAtItsData()).stages] == [4]


def test_where_a_network_cannot_be_run_lists_are_refused_and_sequences_are_checked_as_they_run():
    with pytest.raises(ds.DenseShortcutError, match=r"could not be seen: give an input .* \(RuntimeError: "):
        ds.plug_in(LooksFirst())
    host, x = LooksFirstAtASequence().double(), -images(4, 6).abs()
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    assert torch.equal(net(x), host(x))

    class Changes(LooksFirstAtASequence):
        def forward(self, x):
            return AnotherLayerBetween.forward(self, x) if x.sum() < 0 else x

    with pytest.raises(ds.DenseShortcutError, match="is changed between two blocks"):
        ds.plug_in(Changes().double())(x)


def test_a_list_that_could_not_be_seen_is_named_in_the_plan_of_the_rest():
    class Net(LooksFirst):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(_Plain(), _Plain())

    told = str(ds.plan(Net())).splitlines()[-1]
    assert told.startswith("blocks.0 (_Plain) stays as it is: a list is plugged into only where")


def test_seeing_leaves_the_network_and_its_hooks_and_random_numbers_alone():
    class Remembers(Loop):
        def forward(self, x):
            self.last, self.noise = x, torch.rand(3, device="cpu")
            return super().forward(x)

    net, fired = Remembers(), []
    for module in net.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ds.plug_in(net)
    assert torch.equal(torch.rand(2), expected)
    assert not fired and not hasattr(net, "last") and net.training and "blocks" in ds.dense_stages(net)
