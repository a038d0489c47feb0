"""Passes in the way of an earlier one: that there are such, with the same numbers, and none where anything changed."""

import copy
import gc
import io
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import hosts
import pytest
import timm
import torch
from hosts import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv2 import InvertedResidual

import dense_shortcuts as ds
from dense_shortcuts import ops
from dense_shortcuts.nn.watch import Repeat
from dense_shortcuts.ops import compiled, tape

pytestmark = pytest.mark.skipif(compiled.library()[0] is None, reason="no C++ compiler")

BLOCKS = [0, 1, 2, 0, 1]  # of the network that most tests take


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks whose maps were made in the way of an earlier pass, in order."""
    made: list[int] = []
    real = ds.nn.residual_add.Join._repeat

    def counted(self: Any, *given: Any) -> Tensor | None:
        x: Tensor | None = real(self, *given)
        if x is not None:
            made.append(self.k)
        return x

    monkeypatch.setattr(ds.nn.residual_add.Join, "_repeat", counted)
    return made


def pair(kind: str = "timm_bottleneck", *, host: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, ...]:
    """A network with random weights that may repeat passes, and the same by the plain back end."""
    host = hosts.small_net(kind).double() if host is None else host
    hosts.randomise(host, seed=3)
    plain = ds.plug_in(copy.deepcopy(host), backend="plain", **settings)
    net = ds.plug_in(host, **settings)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=4, scale=0.5)
    for stage in ds.dense_stages(net).values():
        hosts.randomise(stage.shortcut, seed=5)
    plain.load_state_dict(net.state_dict())
    return net, plain


def images(seed: int = 1, *, size: int = 64, batch: int = 4, last: bool = True, dtype: torch.dtype = torch.float64):
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def backward(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, the gradients and the buffers of a training step."""
    net.zero_grad()
    y = net(x)
    y.sin().sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return grads | {"output": y.detach()} | {name: b.clone() for name, b in net.named_buffers()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert_close(found[name].double(), t.double(), tolerance, str(name))


def at_once(run: Callable[[int], Any]) -> None:
    """run(0) .. run(3), each in a thread of its own."""
    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def step(nets: tuple[nn.Module, ...], rate: float = 1e-3) -> None:
    """The same step of gradient descent for both."""
    with torch.no_grad():
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            p -= rate * p.grad
            q.copy_(p)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("settings", [{}, {"window": 2}], ids=str)
@pytest.mark.parametrize("norm", ["group", "batch", "layer", "instance"])
def test_training_steps_that_repeat_one_match_the_plain_form(norm, settings, last, repeated):
    nets = pair(norm=norm, **settings)
    for seed in range(3):
        x = images(seed, last=last)
        assert_same(backward(nets[0], x), backward(nets[1], x))
        step(nets)
    assert repeated == BLOCKS * 2


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_deeper_stages_and_other_blocks_are_repeated(norm, repeated):
    for host in (hosts.Net("timm_basic", (6,), (8,)), hosts.small_net("tv_bottleneck")):
        nets = pair(host=host.double(), norm=norm)
        for seed in range(2):
            assert_same(backward(nets[0], images(seed)), backward(nets[1], images(seed)))
    assert repeated == [0, 1, 2, 3, 4, 5, *BLOCKS]


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_repeated_step_is_the_same_bit_for_bit(norm, last, repeated):
    """A run that is resumed begins with a step that repeats none."""
    net, _ = pair(host=timm.create_model("resnet26"), norm=norm)
    again = copy.deepcopy(net)
    for seed in range(2):
        x = images(seed, last=last, dtype=torch.float32)
        found = backward(net, x)
        for stage in ds.dense_stages(again).values():
            stage.__dict__.pop("_prepared", None)
        for name, wanted in backward(again, x).items():
            assert torch.equal(found[name], wanted), name
        step((net, again))
    assert repeated == [0, 1] * 4


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_repeated_step_of_a_deeper_stage_is_the_same_bit_for_bit(norm, window, repeated):
    net, _ = pair(host=hosts.Net("timm_basic", (6,), (8,)).double(), norm=norm, window=window)
    again = copy.deepcopy(net)
    for seed in range(2):
        found = backward(net, images(seed))
        again.layer1.__dict__.pop("_prepared", None)
        for name, wanted in backward(again, images(seed)).items():
            assert torch.equal(found[name], wanted), name
    assert repeated == list(range(6))


@pytest.mark.parametrize("settings", [{}, {"weighting": "softmax"}, {"pattern": "powers"}], ids=str)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_inference_repeats_a_pass_and_sees_new_weights(norm, settings, repeated):
    nets = pair(norm=norm, **settings)
    for net in nets:
        net.eval()
    with torch.no_grad():
        for seed in range(3):
            assert_close(nets[0](images(seed)), nets[1](images(seed)), 1e-10, "output")
            for net in nets:
                for tensor in net.state_dict().values():
                    tensor.mul_(1.25) if tensor.is_floating_point() else None
    assert repeated == ([] if "weighting" in settings else BLOCKS * 2)  # of which weights are made anew each time


def test_a_deep_stage_without_gradients_is_repeated_with_its_sums_made_ahead(repeated):
    nets = pair(host=hosts.Net("timm_basic", (16,), (8,)).double())
    for net in nets:
        net.eval()
    with torch.no_grad():
        for seed in range(2):
            assert_close(nets[0](images(seed)), nets[1](images(seed)), 1e-10, "output")
    assert repeated == list(range(16))


def test_under_autocast_steps_are_repeated_in_its_dtype(repeated):
    net, plain = pair(host=timm.create_model("resnet18"))
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = net(images(seed, dtype=torch.float32)), plain(images(seed, dtype=torch.float32))
        assert_close(found.float(), wanted.float(), 5e-2, "output")
        found.float().sum().backward()
    assert repeated == [0, 1] * 4
    backward(net, images(dtype=torch.float32))  # maps in another dtype
    assert repeated == [0, 1] * 4


def test_gradients_of_gradients_go_through_a_repeated_step(repeated):
    found = []
    for net in pair():
        backward(net, images())
        y = net(images())
        parameters = [p for _, p in sorted(net.named_parameters())]
        grads = torch.autograd.grad(y.sin().sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)
        found.append(dict(enumerate([*grads, *second])))
    assert_same(*found, tolerance=1e-8)
    assert repeated == BLOCKS


def test_a_graph_may_be_gone_through_twice_in_part_and_beside_another(repeated):
    net, _ = pair()
    wanted = backward(net, images())
    net.zero_grad()
    one, other = net(images()), net(images(2))
    assert repeated == BLOCKS * 2  # the second pass began while the first one's graph was there
    loss = one.sin().sum()
    name, weight = next((name, p) for name, p in net.named_parameters() if "layer1.1.conv1" in name)
    for _ in range(2):  # a part of the graph leaves what nobody takes
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert_close(grad, wanted[name], 1e-10, name)
    loss.backward(retain_graph=True)
    other.sum().backward()
    net.zero_grad()
    loss.backward()
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: wanted[n] for n, _ in net.named_parameters()})


def test_a_mode_that_watches_operators_sees_the_backward_pass_of_a_repeated_step(repeated):
    net, _ = pair()
    wanted = backward(net, images())
    net.zero_grad()
    loss = net(images()).sin().sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert "dense_shortcuts.pull_block" in str(counter.get_flop_counts()["Global"])
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: wanted[n] for n, _ in net.named_parameters()})
    assert repeated == BLOCKS


def test_frozen_parts_get_no_gradient_and_leave_the_others_right(repeated):
    for frozen in ("shortcut", "layer1", "conv1"):
        nets = pair()
        for net in nets:
            for name, p in net.named_parameters():
                p.requires_grad_(frozen not in name)
        for _ in range(2):
            assert_same(backward(nets[0], images()), backward(nets[1], images()))
    assert repeated == BLOCKS * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_stage_under_activation_checkpointing_gives_the_same(reentrant):
    net, plain = pair(norm="batch")
    for one in (net, plain):
        stage = one.layer1
        run = stage.forward
        one.layer1 = nn.Sequential(stage)
        one.layer1.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=reentrant)
    for seed in range(3):
        assert_same(backward(net, images(seed)), backward(plain, images(seed)))


def test_what_is_saved_elsewhere_is_not_repeated(repeated):
    nets = pair()
    backward(nets[0], images())
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        nets[0](images()).sum().backward()
    assert repeated == [] and len(packed) > 0


def test_nothing_keeps_a_pass_or_a_stage_alive():
    gc.collect()
    gc.disable()
    try:
        net, _ = pair()
        tapes: list[weakref.ref[ops.Tape]] = []
        real = ops.Tape.__init__
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    ops.Tape, "__init__", lambda self, *g: (tapes.append(weakref.ref(self)), real(self, *g))[1]
                )
                backward(net, images())
        assert len(tapes) == 2 and not any(tape() for tape in tapes)
        stage = weakref.ref(net.layer1)
        assert "_prepared" in net.layer1.__dict__
        del net
        assert stage() is None
    finally:
        gc.enable()


def test_copies_pickles_and_unplugged_networks_have_nothing_of_it():
    net, plain = pair()
    backward(net, images())
    assert "_prepared" in net.layer1.__dict__
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for one in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert "_prepared" not in one.layer1.__dict__
        plain.load_state_dict(one.state_dict())
        assert_same(backward(one, images()), backward(plain, images()))
    assert "_prepared" not in ds.unplug(net).layer1.__dict__


class Swapped(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _replace_weight(net: nn.Module) -> None:
    weights = net.layer1.shortcut.weights
    weights[1] = nn.Parameter(weights[1].detach() * 3)


def _move_weight(net: nn.Module) -> None:
    weight = net.layer1.shortcut.weights[1]
    weight.data = weight.detach() * 3


def _double_eps(net: nn.Module) -> None:
    net.layer1[1].bn3.eps = net.layer2.shortcut.norms[0].eps = 0.5


def _forward_of_conv(net: nn.Module) -> None:
    conv = net.layer1[1].conv3
    conv.forward = lambda x, real=conv.forward: real(x) * 2


def _forward_of_norm(net: nn.Module) -> None:
    norm = net.layer1[1].bn3
    norm.forward = lambda x, real=norm.forward: real(x) * 2


def _hook(net: nn.Module) -> None:
    net.layer1[1].bn3.register_forward_hook(lambda m, i, y: y * 2)


def _buffer(net: nn.Module) -> None:
    norm = net.layer1[1].bn3
    norm.running_mean = norm.running_mean + 1


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "another activation": lambda net: setattr(net.layer1[1], "act3", nn.SiLU()),
    "another class of one": lambda net: setattr(net.layer1[1].act3, "__class__", Swapped),
    "another norm in a block": lambda net: setattr(net.layer1[1], "bn3", nn.BatchNorm2d(8).double()),
    "another norm of maps": lambda net: setattr(net.layer1.shortcut, "norms", nn.ModuleList([nn.Identity()] * 3)),
    "another weight": _replace_weight,
    "a weight elsewhere": _move_weight,
    "another buffer": _buffer,
    "another eps": _double_eps,
    "norms switched": lambda net: [m.train(not m.training) for m in net.modules() if isinstance(m, nn.BatchNorm2d)],
    "another forward pass of a layer": _forward_of_conv,
    "another forward pass of a norm": _forward_of_norm,
    "another setting of the stage": lambda net: setattr(net.layer1, "keep_identity", True),
    "a hook": _hook,
    "another back end": lambda net: setattr(net.layer1.shortcut, "backend", "plain"),
    "other blocks": lambda net: net.layer1.__setattr__("1", copy.deepcopy(net.layer1[2])),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_seen(change, train, repeated):
    nets = pair()
    for net in nets:
        net.train(train)
    for _ in range(2):
        for net in nets:
            with torch.set_grad_enabled(train):
                net(images())
    assert repeated == BLOCKS
    for net in nets:
        CHANGES[change](net)
    repeated.clear()
    for seed in range(2):
        if train:
            assert_same(backward(nets[0], images(seed)), backward(nets[1], images(seed)))
        else:
            with torch.no_grad():
                assert_close(nets[0](images(seed)), nets[1](images(seed)), 1e-10, change)


def test_a_hook_on_all_modules_is_seen(repeated):
    net, _ = pair()
    for _ in range(2):
        backward(net, images())
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(m))
    try:
        repeated.clear()
        backward(net, images())
    finally:
        handle.remove()
    assert net.layer1[0].bn3 in seen and repeated == []


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_other_images_begin_anew_and_are_repeated_in_their_turn(train, repeated):
    nets = pair()
    for net in nets:
        net.train(train)
    for x in (images(), images(batch=3), images(batch=3), images(last=False), images(size=32), images(batch=3)):
        if train:
            assert_same(backward(nets[0], x), backward(nets[1], x))
        else:
            with torch.no_grad():
                assert_close(nets[0](x), nets[1](x), 1e-10, "output")
    assert repeated == BLOCKS


@pytest.mark.parametrize("variable", ["plain", "cpu"])
def test_the_environment_may_name_another_back_end(variable, repeated, monkeypatch):
    net, _ = pair()
    wanted = backward(net, images())
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", variable)
    found = backward(net, images())
    assert repeated == []
    grads = {n for n, _ in net.named_parameters()}
    assert_same({n: found[n] for n in grads}, {n: wanted[n] for n in grads})


def test_an_evaluation_with_gradients_or_training_without_do_not_repeat_the_other(repeated):
    nets = pair()
    for net in nets:
        net.eval()
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            for net in nets:
                net(images())
    assert repeated == BLOCKS
    assert_same(backward(nets[0], images()), backward(nets[1], images()))
    for net in nets:
        net.train()
    for grad in (True, True, False, True):
        with torch.set_grad_enabled(grad):
            found, wanted = (net(images()) for net in nets)
        assert_close(found, wanted, 1e-10, "output")
        assert found.requires_grad is grad
    assert repeated == BLOCKS * 3


def test_another_number_of_threads_begins_anew(repeated):
    net, _ = pair()
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            backward(net, images())
    finally:
        torch.set_num_threads(before)
    assert repeated == BLOCKS


def test_gradients_that_nobody_waits_for_are_not_kept(monkeypatch):
    net, _ = pair()
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(("conv1", "bn1", "layer1.0")))
    backward(net, images())
    backs: list[Any] = []
    real = tape._Pass.leave
    monkeypatch.setattr(tape._Pass, "leave", lambda self, back, *left: (backs.append(back), real(self, back, *left)))
    backward(net, images())
    assert len(backs) == len(BLOCKS) and not any(left for back in backs for left in back.later)


def test_a_block_with_another_end_than_before_is_seen(repeated):
    given = [True]
    for train in (True, False):
        nets = pair()
        for net in nets:
            block = net.train(train).layer1[1]
            own = type(block)
            block.__class__ = type(own.__name__, (own,), {"activation": lambda self: self.act3 if given[0] else None})
        for there in (True, True, False, False, True):
            given[0] = there
            if train:
                assert_same(backward(nets[0], images()), backward(nets[1], images()))
            else:
                with torch.no_grad():
                    assert_close(nets[0](images()), nets[1](images()), 1e-10, "output")
    assert repeated[:7] == [*BLOCKS, 0, 0]


class Linear(nn.Module):
    """Blocks without an activation behind them, and one in place behind the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(InvertedResidual(16, 16, 1, 2) for _ in range(3)))
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.blocks(self.stem(x))).mean((2, 3)))


def test_what_follows_a_stage_may_overwrite_its_output(repeated):
    torch.manual_seed(2)
    nets = pair(host=Linear().double())
    for seed in range(2):
        assert_same(backward(nets[0], images(seed)), backward(nets[1], images(seed)))
    assert repeated == [0, 1, 2]


@pytest.mark.parametrize("kind", hosts.KINDS)
def test_blocks_of_every_kind_are_right_when_repeated(kind):
    nets = pair(kind)
    for seed in range(2):
        torch.manual_seed(seed)
        found = backward(nets[0], images(seed))
        torch.manual_seed(seed)  # drop path and drop block
        assert_same(found, backward(nets[1], images(seed)))
    for net in nets:
        net.eval()
    with torch.no_grad():
        for seed in range(2):
            assert_close(nets[0](images(seed)), nets[1](images(seed)), 1e-10, "output")


class Turning(nn.Module):
    """A convolution whose output is laid out another way when it is told so, which no watch can see."""

    def __init__(self, conv: nn.Module, turned: list[bool]) -> None:
        super().__init__()
        self.conv, self.turned = conv, turned

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.contiguous() if self.turned[0] else x


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_block_that_gives_something_else_is_run_from_the_maps_that_are_there(norm, train, repeated):
    turned = [False]
    nets = pair(norm=norm)
    for net in nets:
        net.train(train).layer1[1].conv3 = Turning(net.layer1[1].conv3, turned)

    def check(seed: int) -> None:
        if train:
            assert_same(backward(nets[0], images(seed)), backward(nets[1], images(seed)))
            return
        with torch.no_grad():
            assert_close(nets[0](images(seed)), nets[1](images(seed)), 1e-10, "output")

    check(0)
    turned[0] = True
    check(1)
    assert repeated == [0]
    turned[0] = False
    for seed in (2, 3):
        check(seed)
    assert repeated[-len(BLOCKS) :] == BLOCKS


def _again(module: nn.Module, name: str, part: str) -> None:
    """The same parameter or buffer, but now the last of its module."""
    value = module._parameters[name] if part == "parameter" else module._buffers[name]
    delattr(module, name)
    getattr(module, f"register_{part}")(name, nn.Parameter(value.detach()) if part == "parameter" else value)


ODD_NORMS: dict[str, Callable[[nn.Module], Any]] = {
    "weight behind bias": lambda norm: _again(norm, "weight", "parameter"),
    "mean behind variance": lambda norm: _again(norm, "running_mean", "buffer"),
    "another parameter": lambda norm: norm.register_parameter("more", nn.Parameter(torch.ones(2))),
    "another buffer": lambda norm: norm.register_buffer("more", torch.ones(2)),
    "pruned": lambda norm: (
        prune.l1_unstructured(norm, "weight", amount=2),
        prune.remove(norm, "weight"),
    ),
    "parametrised": lambda norm: parametrize.register_parametrization(norm, "weight", nn.Softplus()),
    "no momentum": lambda norm: setattr(norm, "momentum", None),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "between"])
@pytest.mark.parametrize("norm", ODD_NORMS)
def test_norms_with_more_or_less_than_usual_are_taken_for_what_they_are(norm, before):
    nets = pair(norm="batch")
    for seed in range(4):
        if seed == (0 if before else 2):
            for net in nets:
                ODD_NORMS[norm](net.layer1[1].bn3)
        assert_same(backward(nets[0], images(seed)), backward(nets[1], images(seed)))


MOVED: dict[str, Callable[[nn.BatchNorm2d], Any]] = {
    "weight of one number": lambda norm: setattr(norm.weight, "data", norm.weight.data[:1].expand(8)),
    "mean with gaps": lambda norm: setattr(
        norm.running_mean, "data", torch.stack([norm.running_mean, norm.running_mean + 1], 1)[:, 0]
    ),
    "variance elsewhere": lambda norm: setattr(norm.running_var, "data", norm.running_var.clone()),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("moved", MOVED)
def test_numbers_that_were_moved_or_laid_out_anew_are_found(moved, train):
    net, _ = pair()
    again = copy.deepcopy(net)
    results = []
    for one in (net.train(train), again.train(train)):
        for seed in range(2):
            with torch.set_grad_enabled(train):
                one(images(seed))
        MOVED[moved](one.layer1[1].bn3)
        if one is again:
            for stage in ds.dense_stages(one).values():
                stage.__dict__.pop("_prepared", None)
        if train:
            results.append(backward(one, images(2)))
        else:
            with torch.no_grad():
                results.append({"output": one(images(2))})
    assert_same(*results)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_hooks_whose_dictionary_was_replaced_are_seen(train):
    results = []
    for net in pair():
        net.train(train)
        with torch.set_grad_enabled(train):
            net(images()), net(images())
            for module in net.modules():
                module._forward_hooks = OrderedDict()
            net.layer1[1].bn3.register_forward_hook(lambda m, i, y: y * 3)
            results.append(net(images(2)).detach())
    assert_close(*results, 1e-10, "output")


class Extended(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.post(x) if "post" in self._modules else x


def test_a_layer_that_gains_one_is_seen():
    kept: list[Tensor] = []
    for net in pair():
        conv = net.eval().layer1[1].conv3
        conv.__class__ = Extended
        with torch.no_grad():
            net(images()), net(images())
            conv.add_module("post", nn.Identity())
            conv.post.register_forward_hook(lambda m, i, y: kept.append(y))
            net(images(2))
    assert_close(kept[0], kept[1], 1e-10, "what the hook saw")


def test_backward_passes_within_one_another_do_not_share_state():
    results = []
    for net in pair():
        backward(net, images())
        net.zero_grad()
        y = net(images(2))
        loss, other, first = y.sin().sum(), y.cos().sum(), net.layer1[0].conv1.weight

        def inner(grad: Tensor, other: Tensor = other, first: Tensor = first) -> None:
            torch.autograd.grad(other, first, retain_graph=True)

        handle = net.layer1[1].conv3.weight.register_hook(inner)
        loss.backward(retain_graph=True)
        handle.remove()
        results.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(*results)


def test_backward_passes_of_several_threads_through_one_graph_do_not_share_state():
    net, _ = pair()
    backward(net, images())
    y, parameters = net(images(2)), list(net.parameters())
    losses = [y.sin().sum(), y.cos().sum(), y.square().sum(), y.exp().sum()]
    wanted = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    found: dict[int, list[Any]] = {}

    def run(n: int) -> None:
        found[n] = [torch.autograd.grad(losses[n], parameters, retain_graph=True) for _ in range(5)]

    at_once(run)
    for n, passes in found.items():
        for grads in passes:
            assert_same(dict(enumerate(grads)), dict(enumerate(wanted[n])))
    assert len(found) == 4


class Failing(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.failing = conv, [False]

    def forward(self, x: Tensor) -> Tensor:
        if self.failing[0]:
            raise RuntimeError("as asked")
        return self.conv(x)


def test_neither_an_error_nor_gradients_of_gradients_leave_a_pass_behind():
    net, _ = pair()
    net.layer1[2].conv1 = failing = Failing(net.layer1[2].conv1)
    backward(net, images())
    passes: list[weakref.ref[Any]] = []
    real = tape._Pass.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape._Pass, "__init__", lambda self, *g: (passes.append(weakref.ref(self)), real(self, *g))[1])
        failing.failing[0] = True
        with pytest.raises(RuntimeError, match="as asked"):
            net(images())
        failing.failing[0] = False
        backward(net, images())
        backward(net, images())
        later = list(net.layer2[1].parameters())
        grads = torch.autograd.grad(net(images()).sin().sum(), later, create_graph=True)
        del grads
    gc.collect()
    assert len(passes) > 4 and not any(one() for one in passes)


def test_parameters_put_in_for_one_call_are_not_kept():
    net, _ = pair()
    backward(net, images())
    parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    loss = functional_call(net, parameters, (images(),)).sin().sum()
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    functional_call(net, stepped, (images(2),))
    assert "_prepared" not in net.layer1.__dict__


def test_a_recomputed_pass_leaves_nothing_to_repeat(repeated):
    nets = pair()
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        checkpoint(net, images().requires_grad_(), use_reentrant=True).sum().backward()
        assert "_prepared" not in net.layer1.__dict__ or net.layer1._prepared.rows == {}
    assert_same(backward(nets[0], images(2)), backward(nets[1], images(2)))


def test_synchronised_norms_are_not_repeated_in_training(repeated):
    for norm in ("group", "batch"):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(pair(norm=norm)[0])
        for _ in range(2):
            backward(net, images())
    assert repeated == []


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_passes_of_several_threads_do_not_share_state(train):
    net, _ = pair(norm="group")
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0  # statistics do not depend on the order of passes
    net.train(train)

    def run(seed: int) -> Tensor:
        x = images(seed).requires_grad_(train)
        with torch.set_grad_enabled(train):
            y = net(x)
            return torch.autograd.grad(y.sin().sum(), x)[0] if train else y

    wanted = [run(seed) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}
    at_once(lambda seed: found.update({seed: [run(seed) for _ in range(5)]}))
    for seed, results in found.items():
        for result in results:
            assert_close(result, wanted[seed], 1e-10, f"pass over {seed}")
    assert len(found) == 4


def test_an_error_in_a_pass_leaves_the_next_ones_right(repeated):
    net, plain = pair()
    backward(net, images())
    with pytest.raises(RuntimeError):
        net(images().float())
    assert_same(
        {n: t for n, t in backward(net, images()).items() if "running" not in n and "num_batches" not in n},
        {n: t for n, t in backward(plain, images()).items() if "running" not in n and "num_batches" not in n},
    )
    assert backward(net, images()) and repeated[-5:] == BLOCKS


def test_a_repeat_tells_when_its_tensors_have_moved():
    t = torch.randn(3)
    repeat = Repeat(None, [(None,)], [t])  # type: ignore[arg-type]
    assert repeat.holds()
    t.mul_(2)
    assert repeat.holds()
    t.data = t.clone()
    assert not repeat.holds()
