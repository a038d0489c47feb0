"""Blocks that users write: what the trace understands equals the host, and what it cannot get right it refuses."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import hosts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hosts import assert_close
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import dense_shortcuts as ds

C = 8


class Block(nn.Module):
    """Two convolutions with a norm each and numbers of their own; subclasses say how they are joined."""

    def __init__(self, drop: float = 0.3) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv2, self.norm2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.scale = 0.5
        self.drop = drop
        self.flag = False
        self.bias = nn.Parameter(torch.randn(C, 1, 1))
        self.register_buffer("offset", torch.randn(C, 1, 1))

    def f(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))

    def g(self, x: Tensor) -> Tensor:
        return self.conv1(x).tanh()


def block(forward: Callable[..., Tensor]) -> type[Block]:
    """A class written out by its forward pass, under its own name here so that it can be pickled."""
    cls = type(forward.__name__, (Block,), {"forward": forward, "__module__": __name__})
    globals()[f"_{forward.__name__}"] = cls
    cls.__qualname__ = f"_{forward.__name__}"
    return cls


@block
def Plain(self, x):
    return x + self.f(x)


@block
def BranchFirst(self, x):
    return self.f(x) + x


@block
def InPlaceOnTheBranch(self, x):
    out = self.f(x)
    out += x
    return F.relu(out, inplace=True)


@block
def InPlaceOnTheInput(self, x):
    x += self.f(x)
    return x


@block
def MethodInPlaceOnTheInput(self, x):
    return x.add_(self.f(x))


@block
def ScaledBranch(self, x):
    return x + self.scale * self.f(x)


@block
def TwoBranches(self, x):
    return self.f(x) + x + self.g(x)


@block
def TwoAdds(self, x):
    x = x + self.f(x)
    return x + self.g(x)


@block
def BranchUsesTheInputTwice(self, x):
    return x + self.f(x) * torch.sigmoid(x)


@block
def FunctionalDropout(self, x):
    return x + F.dropout(self.f(x), self.drop, self.training)


@block
def DropoutInTrainingOnly(self, x):
    out = self.f(x)
    if self.training:
        out = F.dropout(out, self.drop)
    return out + x


@block
def AddOfAConstantBehind(self, x):
    return x + self.f(x) + 1.5


@block
def AddOfAParameter(self, x):
    return x + self.f(x) + self.bias


@block
def AddOfABuffer(self, x):
    return x + self.f(x) * self.offset.abs()


@block
def BroadcastInTheBranch(self, x):
    return x + self.f(x) * self.g(x).mean((2, 3), keepdim=True)


@block
def SubtractionInTheBranch(self, x):
    return x + (self.f(x) - self.g(x))


@block
def AlphaInTheBranch(self, x):
    return x + torch.add(self.f(x), self.g(x), alpha=2)


@block
def KeywordAndFlag(self, x, scale: float = 0.7, twice: bool = False):
    out = self.f(x)
    if twice:
        out = 2 * out
    return x + out * scale


@block
def BranchInPlaceOnACopy(self, x):
    out = F.relu_(x.clone())
    return x + self.f(out)


@block
def ActivationBehind(self, x):
    return F.leaky_relu(x + self.f(x), self.scale)


@block
def AsksForDimensions(self, x):
    n, c, h, w = x.shape
    return x + self.f(x).reshape(n, c, h * w).softmax(-1).reshape(n, c, h, w)


class Residual(nn.Module):
    """The wrapper that many hosts put around the layers of a branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.scale = branch, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


class Wrapped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Residual(nn.Sequential(self.conv1, self.norm1))
        self.mlp = Residual(nn.Sequential(nn.GELU(), self.conv2))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.mlp(self.mixer(x)))


class WrappedFirst(Block):
    """The block's input is an addend only inside its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.position = Residual(nn.Sequential(self.conv1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        return x + self.norm2(self.conv2(x))


UNDERSTOOD = [
    Wrapped,
    WrappedFirst,
    Plain,
    BranchFirst,
    InPlaceOnTheBranch,
    ScaledBranch,
    TwoBranches,
    TwoAdds,
    BranchUsesTheInputTwice,
    FunctionalDropout,
    DropoutInTrainingOnly,
    AddOfAConstantBehind,
    AddOfAParameter,
    AddOfABuffer,
    BroadcastInTheBranch,
    SubtractionInTheBranch,
    AlphaInTheBranch,
    KeywordAndFlag,
    BranchInPlaceOnACopy,
    ActivationBehind,
    AsksForDimensions,
]


def network(cls: type[Block], depth: int = 3) -> nn.Sequential:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.Sequential(*[cls() for _ in range(depth)])).double()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
    return net


def run(net: nn.Module) -> dict[str, Tensor]:
    """Output, gradients of the input and of the parameters, and buffers after it, of one pass with a seed."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    y = net(x)
    y.square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if "shortcut" not in name and p.grad is not None}
    buffers = {name: b.clone() for name, b in net.named_buffers() if "shortcut" not in name}
    net.zero_grad()
    return {"output": y.detach(), "input": x.grad} | gradients | buffers


def assert_runs_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name], value.double(), tolerance, name)


def assert_equal_to_host(cls: type[Block], backend: str) -> None:
    for options in ({"norm": None, "init": "nearest"}, {"keep_identity": True}):
        host, plugged = network(cls), ds.plug_in(network(cls), **options, backend=backend)
        assert plugged[1].segments == ((0, 3, "shortcut"),)
        for train in (True, False):
            expected = run(host.train(train))
            assert_runs_agree(run(plugged.train(train)), expected)
            if "keep_identity" in options and not train:
                assert torch.equal(run(plugged)["output"], expected["output"])


@pytest.mark.parametrize("cls", UNDERSTOOD)
def test_a_block_that_is_understood_gives_its_hosts_numbers_and_gradients(cls):
    assert_equal_to_host(cls, "plain")


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("cls", [InPlaceOnTheBranch, TwoAdds])
def test_the_cpu_back_ends_give_a_hosts_numbers_and_gradients_too(cls, backend):
    assert_equal_to_host(cls, backend)


@pytest.mark.parametrize("cls", [InPlaceOnTheInput, MethodInPlaceOnTheInput])
def test_a_block_that_adds_to_its_input_in_place_gives_its_hosts_output_and_then_trains_too(cls):
    """Its host does not: autograd refuses it."""
    same = network(Plain)
    for options in ({"norm": None, "init": "nearest"}, {"keep_identity": True}):
        plugged = ds.plug_in(network(cls), **options)
        with torch.no_grad():
            x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
            assert_close(plugged.eval()(x), network(cls).eval()(x), 1e-12, "output")
        assert_runs_agree(run(plugged), run(same.eval()))


def test_what_is_traced_is_copied_and_pickled_with_the_network():
    net = ds.plug_in(network(KeywordAndFlag), norm="batch")
    with torch.no_grad():
        for _, weight in ds.shortcut_parameters(net):
            weight.normal_()
    expected = run(copy.deepcopy(net))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_runs_agree(run(twin), expected, 0.0)
        assert twin[1][0]._dense_trace.parts is not net[1][0]._dense_trace.parts
        assert type(ds.unplug(twin)[1][0]) is KeywordAndFlag


# What cannot be right is refused --------------------------------------------------------------------------------------


@block
def ShortcutTwice(self, x):
    return x + x + self.f(x)


@block
def BranchSubtracted(self, x):
    return x - self.f(x)


@block
def AlphaOnTheSum(self, x):
    return torch.add(x, self.f(x), alpha=2)


@block
def ReluInPlaceOnTheInput(self, x):
    x = F.relu(x, inplace=True)
    return x + self.f(x)


@block
def ForgottenInPlace(self, x):
    out = self.f(x)
    out.mul_(2)
    return x + out


@block
def InPlaceBehindAnAlias(self, x):
    out = self.f(x)
    alias = out
    out *= 2
    return x + self.g(alias) + out


@block
def WritesIntoAnAddend(self, x):
    out = self.f(x)
    total = x + out
    return total + out.mul_(2)


@block
def WritesIntoASum(self, x):
    total = x + self.f(x)
    return total + torch.relu_(total)


@block
def WritesIntoAViewOfAnAddend(self, x):
    out = self.f(x)
    total = x + out
    return total + out.flatten(1).tanh_().view_as(out)


@block
def SumUsedTwice(self, x):
    total = x + self.f(x)
    return total * torch.sigmoid(total)


@block
def ActivationOfTwo(self, x):
    return F.relu(x + self.f(x)) * x


@block
def BroadcastBranch(self, x):
    return x + self.f(x).mean((2, 3), keepdim=True)


@block
def BroadcastShortcut(self, x):
    return x.mean((2, 3), keepdim=True) + self.f(x)


@block
def RandomDepth(self, x):
    if self.training and random.random() < 1e-9:
        return x
    return x + self.f(x)


@block
def RandomDepthOfTorch(self, x):
    if self.training and torch.rand(1).item() < 1e-9:
        return x
    return x + self.f(x)


@block
def RandomDepthOfNumpy(self, x):
    if self.training and np.random.rand() < 1e-9:
        return x
    return x + self.f(x)


@block
def ControlFlowOnValues(self, x):
    if x.sum() > 0:
        return x
    return x + self.f(x)


@block
def AsksForTheType(self, x):
    out = self.f(x)
    if isinstance(x, Tensor):
        out = out * 3
    return x + out


@block
def WithoutGradient(self, x):
    with torch.no_grad():
        gate = torch.sigmoid(self.g(x))
    return x + self.f(x) * gate


@block
def WithoutAutocast(self, x):
    with torch.autocast("cpu", enabled=not torch.is_autocast_enabled("cpu"), dtype=torch.bfloat16):
        out = self.f(x)
    return x + out


@block
def KeepsWhatItSaw(self, x):
    out = self.f(x)
    self.last = out
    return x + out


@block
def MakesAConstant(self, x):
    return x + self.f(x) * torch.tensor([0.5])


@block
def TwoResults(self, x):
    return x + self.f(x), x


@block
def NoShortcut(self, x):
    return self.f(x) + self.g(x)


@block
def NeedsAnotherArgument(self, x, other):
    return x + self.f(other)


REFUSED = {
    ShortcutTwice: "adds its shortcut twice",
    BranchSubtracted: "not a sum",
    AlphaOnTheSum: "not a sum",
    ReluInPlaceOnTheInput: "writes into its input",
    ForgottenInPlace: "misses some of what it does",
    InPlaceBehindAnAlias: "misses some of what it does",
    WritesIntoAnAddend: "writes into an addend",
    WritesIntoASum: "writes into an addend",
    WritesIntoAViewOfAnAddend: "writes into an addend",
    SumUsedTwice: "not a sum",
    ActivationOfTwo: "not a sum",
    BroadcastBranch: "differ in shape",
    BroadcastShortcut: "differ in shape",
    RandomDepth: "random numbers",
    RandomDepthOfTorch: "random numbers",
    RandomDepthOfNumpy: "random numbers",
    ControlFlowOnValues: "cannot be traced",
    AsksForTheType: "misses some of what it does",
    WithoutGradient: "gradients or autocast",
    WithoutAutocast: "gradients or autocast",
    KeepsWhatItSaw: "sets its attribute last",
    MakesAConstant: "makes a constant tensor",
    TwoResults: "other than one tensor",
    NoShortcut: "no sequence of residual blocks",
    NeedsAnotherArgument: "needs a second argument, other",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_a_block_that_the_trace_would_get_wrong_is_refused_with_the_reason(cls):
    net = nn.Sequential(nn.Sequential(cls(), cls()))
    attributes, before = set(vars(net[0][0])), (random.getstate(), torch.get_rng_state())
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plug_in(net)
    assert REFUSED[cls] in str(error.value) and cls.__name__ in str(error.value)
    assert type(net[0]) is nn.Sequential and type(net[0][0]) is cls and set(vars(net[0][0])) == attributes
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# Blocks that change, or are called otherwise, after plugging ----------------------------------------------------------


@block
def Configurable(self, x):
    out = self.f(x)
    if self.last is not None:
        out = self.last(out)
    return x + self.scale * out if self.flag is None else x


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a number": lambda block: setattr(block, "scale", 3.0),
    "a layer for one of the same name": lambda block: setattr(block, "norm2", nn.Identity()),
    "a layer where there was none": lambda block: setattr(block, "last", nn.Tanh()),
}


@pytest.mark.parametrize("options", [{"norm": None, "init": "nearest"}, {"keep_identity": True}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_blocks_attributes_after_plugging_acts_as_in_the_host(change, options):
    net = network(Configurable)
    for each in net[1]:
        each.flag = each.last = None
    host, plugged = copy.deepcopy(net).eval(), ds.plug_in(net, **options).eval()
    before = run(plugged)["output"]
    for each in (host[1][1], plugged[1][1]):
        CHANGES[change](each)
    expected = run(host)
    assert not torch.allclose(expected["output"], before)
    assert_runs_agree(run(plugged), expected)


WRAPPER_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a number": lambda block: setattr(block.mixer, "scale", 3.0),
    "a layer": lambda block: setattr(block.mixer, "branch", nn.Tanh()),
    "a layer in a sequence": lambda block: block.mlp.branch.append(nn.Tanh()),
}


@pytest.mark.parametrize("change", WRAPPER_CHANGES)
def test_a_change_in_a_wrapper_after_plugging_acts_as_in_the_host(change):
    host, plugged = network(Wrapped).eval(), ds.plug_in(network(Wrapped), keep_identity=True).eval()
    before = run(plugged)["output"]
    for each in (host[1][1], plugged[1][1]):
        WRAPPER_CHANGES[change](each)
    expected = run(host)
    assert not torch.allclose(expected["output"], before)
    assert_runs_agree(run(plugged), expected)


class Stage(nn.Module):
    """Not a block, though it ends with a sum, and with one of its input where its blocks project nothing."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(first, globals()["_Plain"]())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Chain(nn.Sequential):
    """A sequence under a name of its own."""


@pytest.mark.parametrize("first", [Plain, lambda: nn.Conv2d(C, C, 1)], ids=["residual", "layer"])
def test_a_stage_is_not_taken_for_a_block(first):
    for stage in (Stage(first()), Chain(first(), Plain())):
        net = nn.Sequential(nn.Sequential(stage, nn.Sequential(Plain())))
        rows = [(s.name, s.depth) for s in ds.plan(net).stages]
        inner = "0.0.blocks" if isinstance(stage, Stage) else "0.0"
        assert rows == [(f"{inner}", 2 if first is Plain else 1), ("0.1", 1)], rows


class RunsAList(nn.Module):
    """Not a block either: its blocks have to be looked into for the sum at its end."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.before, self.blocks = nn.Identity(), nn.ModuleList([Plain() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for each in self.blocks:
            x = each(x)
        return x


@pytest.mark.parametrize("depth", [2, 3])
def test_a_module_that_runs_a_list_of_blocks_is_a_stage_and_not_a_block(depth):
    net = nn.Sequential(nn.Sequential(RunsAList(depth), RunsAList(depth)))
    assert [(s.name, s.depth) for s in ds.plan(net).stages] == [("0.0.blocks", depth), ("0.1.blocks", depth)]


class Sequence(nn.Module):
    """Maps (N, C, L); `wide` channels inside."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.back = nn.Conv1d(wide, channels, 1)  # made first, so that its width is seen first
        self.conv = nn.Conv1d(channels, wide, 3, padding=1)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.back(F.relu(self.conv(x)))))


@pytest.mark.parametrize(("channels", "wide"), [(64, 16), (16, 16), (16, 64), (8, 256)])
def test_convolutions_over_a_sequence_have_their_channels_second_at_any_length(channels, wide):
    host = nn.Sequential(*[Sequence(channels, wide) for _ in range(3)]).double().eval()
    planned = ds.plan(host)
    assert planned.stages[0].channels == channels and not planned.found[0].blocks[0].tokens
    net = ds.plug_in(copy.deepcopy(host), norm=None, init="nearest")
    for length in (7, wide, channels, 50):
        x = torch.randn(2, channels, length, dtype=torch.float64)
        assert_close(net(x), host(x), 1e-12, f"length {length}")


class Volume(nn.Module):
    """Maps (N, C, D, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(channels, channels, 3, padding=1), nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Table(nn.Module):
    """Rows of numbers (N, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(channels), nn.Linear(channels, 12), nn.Linear(12, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize(("cls", "shape"), [(Volume, (2, 4, 3, 5, 2)), (Table, (7, 4))])
@pytest.mark.parametrize("norm", [None, "layer", "auto", "batch"])
def test_volumes_and_tables_are_summed_as_maps_are(norm, cls, shape, backend):
    host = nn.Sequential(*[cls(4) for _ in range(3)]).double().eval()
    net = ds.plug_in(copy.deepcopy(host), norm=norm, init="ones", backend=backend).eval()
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = [p for _, p in ds.shortcut_parameters(net)]

    def normalised(i: int, x: Tensor) -> Tensor:
        if norm is None:
            return x
        module = net.shortcut.norms[i]
        if norm == "batch" or (norm == "auto" and cls is Volume):  # by its running statistics, at their start
            return x / (1 + module.eps) ** 0.5
        if cls is Table:
            return F.layer_norm(x, x.shape[1:])
        return F.group_norm(x, module.num_groups)

    maps = [x]
    for k, block in enumerate(host):
        branch = block.norm(block.conv(maps[-1])) if cls is Volume else block(maps[-1]) - maps[-1]
        column = (4, *[1] * (len(shape) - 2))
        total = branch + sum(
            w.reshape(column) * normalised(i, m) for i, (w, m) in enumerate(zip(weights[k], maps, strict=True))
        )
        maps.append(F.relu(total) if cls is Volume else total)
    assert_close(net(x), maps[-1], 1e-10, "output")
    with torch.no_grad():
        assert_close(net(x), maps[-1], 1e-10, "output without gradients")
    leaves = [x, *weights]
    for ours, wanted in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (net(x), maps[-1])), strict=True):
        assert_close(ours, wanted, 1e-9, "gradient")


class ForOneSize(nn.Module):
    """Takes maps of 5x5 positions and no others, for it has a number for each, or for each pair of them."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
        self.register_buffer("position", torch.randn(625 if pairs else 25))
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.pairs:
            return x + y * self.position.reshape(5, 5)
        return x + (y.flatten(2) @ self.position.reshape(25, 25)).reshape(y.shape)


class InWindows(nn.Module):
    """Mixes windows of 7x7 positions, so that a side must be a multiple of 7."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = self.conv(x).reshape(n, c, h // 7, 7, w // 7, 7)
        return x + windows.flip(3, 5).reshape(n, c, h, w)


@pytest.mark.parametrize(
    ("block", "side"), [(lambda: ForOneSize(False), 5), (lambda: ForOneSize(True), 5), (InWindows, 14)]
)
def test_blocks_made_for_one_size_of_map_are_understood(block, side):
    host = nn.Sequential(block(), block()).double().eval()
    x = torch.randn(2, C, side, side, dtype=torch.float64)
    expected = host(x)
    net = ds.plug_in(nn.Sequential(host), keep_identity=True)
    assert torch.equal(net(x), expected)
    assert [stage.depth for stage in ds.plan(nn.Sequential(nn.Sequential(block(), block()))).stages] == [2]


def test_a_hook_on_a_wrapper_that_is_not_called_any_more_is_refused():
    plugged = ds.plug_in(network(Wrapped))
    plugged[1][0].mixer.branch.register_forward_hook(lambda *_: None)
    run(plugged)  # its layers are called as ever
    plugged[1][0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ds.DenseShortcutError, match="is not understood as it is now set"):
        run(plugged)


def test_a_change_that_leaves_no_residual_block_is_an_error_of_one_sentence():
    net = network(Configurable)
    for each in net[1]:
        each.flag = each.last = None
    ds.plug_in(net)[1][2].flag = True
    with pytest.raises(ds.DenseShortcutError, match="is not understood as it is now set") as error:
        run(net)
    assert "\n" not in str(error.value)


class Caller(nn.Module):
    """Gives its blocks more than their input."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks, self.given = nn.ModuleList([TakesMore() for _ in range(3)]), given

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 4, 1, 1)[:, :C]
        for each in self.blocks:
            x = each(x, **self.given)
        return x


@block
def TakesMore(self, x, gate=None, twice: bool = False, *, power: float = 1.0):
    out = self.f(x) * power
    if twice:
        out = out * 2
    if gate is not None:
        out = out * gate
    return x + out


@pytest.mark.parametrize("given", [{}, {"gate": 0}, {"twice": True}, {"gate": 0, "twice": True, "power": 0.3}], ids=str)
@pytest.mark.parametrize("options", [{"norm": None, "init": "nearest"}, {"keep_identity": True}], ids=str)
def test_further_arguments_of_a_block_act_as_in_the_host(options, given):
    if "gate" in given:
        given = given | {"gate": torch.rand(2, 1, 6, 5, dtype=torch.float64)}
    host, x = Caller(**given).double(), torch.empty(2, 3, 6, 5, dtype=torch.float64)
    plugged = ds.plug_in(copy.deepcopy(host), **options, example=x)
    for train in (True, False):
        assert_runs_agree(run(plugged.train(train)), run(host.train(train)))


@block
def HasDefaults(self, x, size=(3, 3), sizes=[1, 1], more={"scale": 0.5}, *args, **kwargs):  # noqa: B006
    return x + F.avg_pool2d(self.f(x), size, sizes[0], 1) * more["scale"]


@block
def PassesOn(self, x, *args, **kwargs):
    return x + self.g(x, *args, **kwargs)


@block
def TakesAList(self, x, size=None, scale: float = 1.0):
    out = self.f(x)
    if size is not None:
        out = F.avg_pool2d(out, size, 1, 1)
    return x + out * scale


@pytest.mark.parametrize("cls", [HasDefaults, PassesOn])
def test_defaults_of_any_kind_and_arguments_that_are_passed_on_are_understood(cls):
    assert_equal_to_host(cls, "plain")


class Gives(nn.Module):
    """Gives its blocks what it is given."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([cls() for _ in range(2)])

    def forward(self, x: Tensor, *args: Any, **given: Any) -> Tensor:
        for each in self.blocks:
            x = each(x, *args, **given)
        return x


@pytest.mark.parametrize("size", [[3, 3], (3, 3), 3], ids=str)
def test_a_list_or_tuple_that_a_block_is_given_acts_as_in_the_host(size):
    host, x = Gives(TakesAList).double().eval(), torch.randn(2, C, 6, 5, dtype=torch.float64)
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    assert torch.equal(net(x, size), host(x, size)) and torch.equal(net(x, size=size), host(x, size))
    assert torch.equal(net(x), host(x)) and not torch.equal(net(x), net(x, size))


def test_a_number_that_changes_at_each_call_is_right_and_keeps_no_more_than_a_few_cuts():
    host, x = Gives(TakesAList).double().eval(), torch.randn(1, C, 3, 3, dtype=torch.float64)
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    for n in range(40):
        assert torch.equal(net(x, scale=n / 7), host(x, scale=n / 7))
    assert len(net.blocks[0]._dense_trace.parts) <= 16


class Keyword(nn.Module):
    """Hands on what it is given to a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = globals()["_TakesMore"]()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.inner(x, **kwargs)


def test_keyword_arguments_that_a_block_passes_on_reach_its_layers():
    host, x = Gives(Keyword).double().eval(), torch.randn(2, C, 6, 5, dtype=torch.float64)
    net = ds.plug_in(copy.deepcopy(host), keep_identity=True)
    gate = torch.rand(2, 1, 6, 5, dtype=torch.float64)
    for given in ({}, {"twice": True}, {"gate": gate}, {"gate": gate, "power": 0.3}):
        assert torch.equal(net(x, **given), host(x, **given))


def test_what_a_block_cannot_be_given_is_an_error_of_one_sentence_or_its_hosts():
    net, x = ds.plug_in(Gives(TakesAList)), torch.randn(1, C, 3, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        net(x, other=1)
    with pytest.raises(ds.DenseShortcutError, match="is given a set, of which nothing can be kept"):
        net(x, size={3})
    with pytest.raises(ds.DenseShortcutError, match="give it by name"):
        ds.plug_in(Gives(PassesOn))(x, 1)


# Traced by torch.fx as part of a network ------------------------------------------------------------------------------


class Masked(nn.Module):
    """A layer that does without its mask, as attention does."""

    def forward(self, x: Tensor, mask: Tensor | None = None, power: float = 1.0) -> Tensor:
        return F.dropout(x, 0.0) if mask is None else x * mask * power


class HandsOn(Block):
    """Leaves what it is given besides to a layer, by keyword and as timm's vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = Masked()

    def forward(self, x: Tensor, mask: Tensor | None = None, power: float = 1.0) -> Tensor:
        return x + self.f(self.masked(x, mask=mask, power=power))


@block
def TakesAMask(self, x, mask=None, power: float = 1.0):
    out = self.f(x) * power
    return x + (out if mask is None else out * mask)


@block
def TakesAPair(self, x, size, mask=None, *, power: float = 1.0):
    out = F.interpolate(self.f(x) * power, size=(size[0], size[1]))
    return x + (out if mask is None else out * mask)


@block
def AsksForATensor(self, x, mask=None):
    return x + self.f(x) * (2 if isinstance(mask, Tensor) else 1)


class Hands(nn.Module):
    """A network whose blocks get its own arguments: a graph of it has a placeholder for each."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([cls() for _ in range(3)])
        self.register_buffer("own", torch.rand(1, C, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None, power: float = 1.0) -> Tensor:
        for each in self.blocks:
            x = each(x, mask=mask, power=power)
        return x


class HandsAMask(Hands):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for each in self.blocks:
            x = each(x, mask=mask)
        return x


class HandsItsBuffer(Hands):
    def forward(self, x: Tensor, mask: Tensor | None = None, power: float = 1.0) -> Tensor:
        for each in self.blocks:
            x = each(x, self.own, power=0.5)
        return x


class HandsAPair(Hands):
    def forward(self, x: Tensor, mask: Tensor | None = None, power: float = 1.0) -> Tensor:
        for each in self.blocks:
            x = each(x, (x.shape[2], x.shape[3]), mask, power=power)
        return x


@pytest.mark.parametrize("options", [{"norm": None, "init": "nearest"}, {"keep_identity": True}], ids=str)
@pytest.mark.parametrize(
    ("make", "cls"),
    [
        (Hands, HandsOn),
        (Hands, TakesAMask),
        (HandsItsBuffer, HandsOn),
        (HandsItsBuffer, TakesAMask),
        (HandsAPair, TakesAPair),
    ],
)
def test_a_block_passes_on_what_a_traced_network_gives_it(make, cls, options):
    x, mask = (torch.rand(2, C, 6, 5, dtype=torch.float64) for _ in range(2))
    host = make(cls).double()
    net = ds.plug_in(copy.deepcopy(host), **options)
    for train in (True, False):
        graph = torch.fx.symbolic_trace(copy.deepcopy(net).train(train))
        twin = torch.fx.symbolic_trace(copy.deepcopy(host).train(train))
        for given in ({"mask": mask, "power": 0.3}, {"mask": mask}):
            assert torch.equal(twin(x, **given), host.train(train)(x, **given))
            assert_close(graph(x, **given), net.train(train)(x, **given), 1e-12, "output")
        graph.graph.lint()


def test_a_cut_for_a_traced_network_serves_no_call_with_tensors():
    """A graph of the host asks a placeholder for its type too; a call with a tensor is not what was traced."""
    net, x = ds.plug_in(HandsAMask(AsksForATensor), norm=None).eval(), torch.rand(1, C, 3, 3)
    with torch.no_grad():
        assert_close(torch.fx.symbolic_trace(net)(x), net(x).double(), 1e-5, "output")
    with pytest.raises(ds.DenseShortcutError, match="misses some of what it does"):
        net(x, mask=x)


def test_the_activation_after_the_add_is_a_node_of_the_plugged_network_as_of_its_host():
    torch.manual_seed(0)
    host = torchvision.models.resnet18(num_classes=3).eval()
    nodes = [name for name in get_graph_node_names(host)[1] if name.endswith(".relu_1")]
    assert len(nodes) == 8
    x = torch.randn(2, 3, 64, 64)
    expected = create_feature_extractor(host, nodes)(x)
    found = create_feature_extractor(ds.plug_in(copy.deepcopy(host), keep_identity=True), nodes)(x)
    assert all(torch.equal(found[node], expected[node]) for node in nodes)
