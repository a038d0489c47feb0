"""Models as users have them: wrapped, compiled, frozen, shared, hooked, without data, on several devices.

Each works or is refused in one sentence; a refused call leaves the model as it was.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import hosts
import pytest
import torch
import torchvision
from hosts import assert_close
from test_plug import assert_same, one_sentence, snapshot
from test_trace import Plain, Residual, network
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dense_shortcuts as ds

X = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(4))


def host_of(kind: str) -> nn.Module:
    """A host whose blocks have a written adapter, or are traced."""
    return network(Plain).float() if kind == "traced" else hosts.small_net(kind)


def stage_of(net: nn.Module) -> Any:
    return net[1] if isinstance(net, nn.Sequential) else net.layer1


KINDS = ["traced", "timm_basic"]


def one_process(net: nn.Module) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(net)
    finally:
        torch.distributed.destroy_process_group()


def with_a_compiled_block(net: nn.Module) -> nn.Module:
    stage_of(net)[1] = torch.compile(stage_of(net)[1], backend="eager")
    return net


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "compiled": (lambda net: torch.compile(net, backend="eager"), "compile it then"),
    "a compiled block": (with_a_compiled_block, "1 is compiled"),
    "DDP": (one_process, "DistributedDataParallel"),
    "DataParallel": (nn.DataParallel, "DataParallel"),
    "scripted": (lambda net: torch.jit.trace(net.eval(), X), "scripted"),
    "a traced graph": (torch.fx.symbolic_trace, "traced graph"),
}


COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "network": lambda net: net,
    "stage": stage_of,
    "block": lambda net: stage_of(net)[1],
}


@pytest.mark.long
@pytest.mark.parametrize("part", COMPILED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_compiled_in_place_runs_the_plugged_network(kind, part):
    torch._dynamo.reset()
    net = host_of(kind).eval()
    twin = ds.plug_in(copy.deepcopy(net), norm="group")
    COMPILED[part](net).compile(backend="eager")
    with torch.no_grad():
        net(X)
    ds.plug_in(net, norm="group")
    assert_run_alike(net, twin)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_may_be_compiled_one_by_one_after_plugging(kind):
    """As regional compilation does; a block that has others before it or behind it is compiled without a break."""
    torch._dynamo.reset()
    net = ds.plug_in(host_of(kind).eval(), norm="group")
    twin = copy.deepcopy(net)
    for block in stage_of(net).blocks[:2]:
        block.compile(backend="eager", fullgraph=True)
    assert_run_alike(net, twin)


def assert_run_alike(net: nn.Module, twin: nn.Module) -> None:
    """Output and gradients of two plugged networks that share everything but the shortcuts' weights."""
    with torch.no_grad():
        for (_, weight), (_, other) in zip(ds.shortcut_parameters(net), ds.shortcut_parameters(twin), strict=True):
            weight.copy_(other.uniform_(0.5, 1))
        assert_close(net(X), twin(X).double(), 1e-5, "output")
    for each in (net, twin):
        each.train()(X).square().mean().backward()
    for (name, p), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None)
        if p.grad is not None:
            assert_close(p.grad, other.grad.double(), 1e-4, name)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_network_is_refused_and_left_as_it_was(kind, wrapper):
    make, named = WRAPPERS[wrapper]
    net = make(host_of(kind))
    look = (lambda n: n.code) if wrapper == "scripted" else snapshot
    before = look(net)
    for call in (ds.plan, ds.plug_in):
        with pytest.raises(ds.DenseShortcutError) as error:
            call(net)
        assert named in one_sentence(error)
    if wrapper == "scripted":
        assert look(net) == before
    else:
        assert_same(before, look(net))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_network_stays_frozen_and_its_shortcuts_train(kind):
    net = host_of(kind).requires_grad_(False).eval()
    host = {name: p.clone() for name, p in net.named_parameters()}
    ds.plug_in(net, init="uniform")
    shortcuts = dict(ds.shortcut_parameters(net))
    assert {name for name, p in net.named_parameters() if p.requires_grad} == set(shortcuts)
    net(X).square().sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    assert all(p.grad.abs().max() > 0 for p in shortcuts.values())
    assert all(torch.equal(net.get_parameter(name), p) for name, p in host.items())


def test_a_traced_block_in_two_places_is_refused():
    net = network(Plain)
    net[1][2] = net[1][0]
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError, match="more than one place") as error:
        ds.plug_in(net)
    one_sentence(error)
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_on_two_devices_is_refused(kind):
    net = host_of(kind)
    stage_of(net)[1].to("meta")
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError, match="cpu and meta") as error:
        ds.plug_in(net)
    one_sentence(error)
    after = snapshot(net)
    for part in ("structure", "identities", "flags", "keys"):
        assert after[part] == before[part], part


def test_each_stage_may_be_on_a_device_of_its_own():
    net = hosts.small_net()
    net.layer2.to("meta")
    ds.plug_in(net, norm="batch")
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        assert tensor.device.type == ("meta" if name.startswith("layer2") else "cpu"), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_of_every_module_stays(kind, training):
    net = host_of(kind).train(training)
    before = {name: m.training for name, m in net.named_modules()}
    ds.plug_in(net, norm="batch")
    after = {name: m.training for name, m in net.named_modules()}
    assert {name: after[name] for name in before} == before and set(after.values()) == {training}


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_same_calls_before_plugging_plugged_and_after(kind):
    net, calls = host_of(kind).double().train(), []

    def saw(what: str) -> Callable[..., None]:
        def hook(module: nn.Module, *seen: Any) -> None:
            flat = [value for each in seen for value in (each if isinstance(each, tuple) else (each,))]
            calls.append((what, [value.detach().clone() for value in flat if value is not None], len(flat)))

        return hook

    for n in range(3):
        block = stage_of(net)[n]
        block.register_forward_pre_hook(saw(f"before {n}"))
        block.register_forward_hook(saw(f"after {n}"))
        block.register_full_backward_pre_hook(saw(f"backward before {n}"))
        block.register_full_backward_hook(saw(f"backward after {n}"))

    def go() -> list[Any]:
        calls.clear()
        net(X.double()).square().sum().backward()
        return list(calls)

    expected = go()
    assert len(expected) == 12
    ds.plug_in(net, keep_identity=True)
    plugged = go()
    ds.unplug(net)
    for actual in (plugged, go()):
        assert [(what, n) for what, _, n in actual] == [(what, n) for what, _, n in expected]
        for (what, values, _), (_, wanted, _) in zip(actual, expected, strict=True):
            for value, other in zip(values, wanted, strict=True):
                assert_close(value, other, 1e-12, what)


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"init": "uniform"}, {"weighting": "gate"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_data_is_plugged_and_then_materialised(kind, options):
    expected = ds.plug_in(host_of(kind), **options).eval()
    net = ds.plug_in(host_of(kind).to("meta"), **options)
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"meta"}
    assert list(net.state_dict()) == list(expected.state_dict())
    net.to_empty(device="cpu").eval()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(7.0)  # as to_empty may leave it
        for module in net.modules():
            if isinstance(module, ds.DenseShortcut):
                module.reset_parameters()
    weights = {name: p.detach() for name, p in ds.shortcut_parameters(net)}
    assert all(torch.equal(weights[name], p) for name, p in ds.shortcut_parameters(expected))
    net.load_state_dict(expected.state_dict())
    assert torch.equal(net(X), expected(X))


def test_the_start_of_ds2_is_set_again_after_to_empty():
    net = ds.plug_in(hosts.small_net("timm_bottleneck").to("meta"), inner=True, inner_start=0.5).to_empty(device="cpu")
    net.layer1[0].inner.weight.data.fill_(7.0)
    net.layer1[0].inner.reset_parameters()
    assert (net.layer1[0].inner.weight == 0.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_plugging_before_and_after_a_change_of_dtype_gives_the_same(kind):
    first = ds.plug_in(host_of(kind), norm="batch", init="uniform").double().eval()
    second = ds.plug_in(host_of(kind).double(), norm="batch", init="uniform").eval()
    assert {t.dtype for t in second.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert torch.equal(first(X.double()), second(X.double()))


def test_traced_classes_and_other_instances_are_left_alone():
    mine, other = network(Plain), network(Plain)
    before, attributes, forward = snapshot(other), dict(vars(Plain)), Plain.forward
    ds.plug_in(mine)
    assert_same(before, snapshot(other))
    assert dict(vars(Plain)) == attributes and Plain.forward is forward
    assert isinstance(mine[1][0], Plain) and type(other[1][0]) is Plain


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"weighting": "attention"}, {"norm": "batch"}], ids=str)
def test_a_traced_network_is_given_back_bit_for_bit(options):
    net = network(Plain).eval()
    before, expected = snapshot(net), net(X.double())
    ds.plug_in(net, **options)(X.double())
    ds.unplug(net)
    assert_same(before, snapshot(net))
    assert torch.equal(net(X.double()), expected)


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"weighting": "sum"}, "'sum'"),
    ({"pattern": "odd"}, "'odd'"),
    ({"window": 0}, "window=0"),
    ({"every": 0}, "every=0"),
    ({"window": "2"}, "window='2'"),
    ({"window": True}, "window=True"),
    ({"every": 1.5}, "every=1.5"),
    ({"groups": 0}, "groups=0"),
    ({"stages": "layer1"}, "['layer1']"),
    ({"stages": 3}, "[3]"),
    ({"stages": [True]}, "no stage True"),
    ({"blocks": ["1.0", "1.O"]}, "there is no block '1.O'"),
    ({"init": "near", "aggregate": "dense_identity"}, "unknown init 'near'"),
    ({"norm": "bach", "aggregate": "dense_identity"}, "unknown norm 'bach'"),
    ({"norm": nn.BatchNorm2d(8)}, "give a callable"),
    ({"stages": [2]}, "no stage 2"),
    ({"stages": ["layer9"]}, "'layer9'"),
    ({"blocks": "nothing"}, "no block"),
    ({"blocks": []}, "no block"),
    ({"blocks": "("}, "not a regular expression"),
    ({"weighting": "gate", "keep_identity": True}, "keep_identity"),
    ({"weighting": "attention", "init": "nearest"}, "'nearest'"),
    ({"groups": 3, "norm": "group"}, "3"),
    ({"inner": True}, "bottleneck"),
]


@pytest.mark.parametrize(("options", "named"), FAULTY, ids=[str(options) for options, _ in FAULTY])
def test_a_wrong_argument_leaves_a_traced_network_as_it_was(options, named):
    net = network(Plain)
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plug_in(net, **options)
    assert named in one_sentence(error)
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("first", [True, False], ids=["before plugging", "after"])
def test_layers_in_a_block_may_be_parametrized_and_the_block_itself_not(first):
    net, x = host_of("traced").eval(), X
    conv = next(m for m in stage_of(net)[1].modules() if isinstance(m, nn.Conv2d))
    if first:
        nn.utils.parametrizations.weight_norm(conv)
    expected = net(x)
    ds.plug_in(net, keep_identity=True)
    if not first:
        nn.utils.parametrizations.weight_norm(conv)
    assert_close(net(x), expected.double(), 1e-5, "output")

    other = host_of("traced")
    for block in stage_of(other):
        block.gain = nn.Parameter(torch.ones(1))
        parametrize.register_parametrization(block, "gain", nn.Identity())
    with pytest.raises(ds.DenseShortcutError, match="nothing to plug into"):
        ds.plan(other)


def test_what_is_no_network_is_refused():
    for call in (ds.plan, ds.plug_in):
        with pytest.raises(ds.DenseShortcutError, match="'resnet18' is not a network"):
            call("resnet18")


class Stubborn(nn.GroupNorm):
    """A norm that cannot be moved, as where a device has no memory left."""

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise RuntimeError("no memory left")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_while_moving_what_is_added_leaves_the_network_as_it_was(kind):
    net, made = host_of(kind), []
    before = snapshot(net)

    def norm(channels: int) -> nn.Module:
        made.append(channels)
        return (Stubborn if len(made) == 3 else nn.GroupNorm)(1, channels)

    with pytest.raises(RuntimeError, match="no memory left"):
        ds.plug_in(net, norm=norm)
    assert_same(before, snapshot(net))
    assert len(made) >= 3 and not ds.dense_stages(net)


# Per-block choice -----------------------------------------------------------------------------------------------------


CHOICES: dict[str, Any] = {
    "a list": ["1.0", "1.2"],
    "a regular expression": r"^1\.[02]$",
    "a compiled one": re.compile(r"^1\.[02]$"),
    "a callable": lambda name, module: name != "1.1" and isinstance(module, Plain),
}


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("choice", CHOICES)
def test_blocks_that_are_not_chosen_keep_their_hosts_shortcut(choice, backend):
    host = network(Plain).eval()
    plugged = ds.plug_in(copy.deepcopy(host), blocks=CHOICES[choice], norm=None, backend=backend)
    hosts.randomise_parameters(ds.shortcut_parameters(plugged), seed=3)
    w = [p.detach()[:, :, None, None] for _, p in ds.shortcut_parameters(plugged)]
    assert [tuple(each.shape[:2]) for each in w] == [(1, 8), (3, 8)]

    def expected(x: Tensor) -> Tensor:
        maps = [host[0](x)]
        maps.append(host[1][0].f(maps[0]) + w[0][0] * maps[0])
        maps.append(host[1][1].f(maps[1]) + maps[1])  # the host's own
        return host[1][2].f(maps[2]) + w[1][0] * maps[0] + w[1][1] * maps[1] + w[1][2] * maps[2]

    x = X.double()
    assert_close(plugged(x), expected(x), 1e-12, "output")


def test_stages_are_chosen_by_number_or_name():
    for chosen in ([2], ["layer2"]):
        net = ds.plug_in(hosts.small_net(), stages=chosen)
        assert list(ds.dense_stages(net)) == ["layer2"] and type(net.layer1) is nn.Sequential


def test_a_scripted_block_stays_as_it_is_and_a_network_of_nothing_else_is_refused_for_that():
    net = torchvision.models.resnet18()
    net.layer2[1] = torch.jit.script(net.layer2[1])
    planned = ds.plan(net)
    assert [(r.where, r.reason) for r in planned.refused] == [
        ("layer2.1", "it is scripted, so its code cannot be changed")
    ]
    assert ds.plug_in(net).eval()(torch.randn(1, 3, 32, 32)).isfinite().all()
    blocks = nn.Sequential(*[torch.jit.script(Residual(nn.Conv2d(4, 4, 1))) for _ in range(2)])
    with pytest.raises(ds.DenseShortcutError, match="it is scripted"):
        ds.plan(blocks)
    inside = nn.Sequential(*[Residual(torch.jit.script(nn.Conv2d(4, 4, 1))) for _ in range(2)])
    with pytest.raises(ds.DenseShortcutError, match="its branch is scripted"):
        ds.plan(inside)
