"""plan, plug_in, unplug: what they change and, above all, what they leave alone."""

import copy
import gc
import weakref
from typing import Any

import hosts
import pytest
import reference
import timm
import torch
import torchvision
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import dense_shortcuts as ds

VARIANTS: list[dict[str, Any]] = [
    {},
    {"aggregate": "block", "norm": "batch"},
    {"aggregate": "dense_identity"},
    {"norm": "instance", "keep_identity": True},
    {"norm": None, "init": "uniform"},
    {"norm": "layer", "inner": True},
    {"norm": "batch", "inner": True, "keep_identity": True},
    {"norm": lambda channels: nn.BatchNorm2d(channels)},
]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that surgery could disturb, by identity and by value."""
    structure = {
        name: (id(m), type(m), list(m._modules), list(m._parameters), list(m._buffers), sorted(vars(m)), m.training)
        for name, m in model.named_modules()
    }
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "structure": structure,
        "identities": {name: id(t) for name, t in tensors.items()},
        "flags": {name: (t.requires_grad, t.dtype, t.device, t.stride()) for name, t in tensors.items()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "keys": list(model.state_dict()),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("structure", "identities", "flags", "keys"):
        assert after[part] == before[part], part
    for name, value in before["values"].items():
        assert torch.equal(after["values"][name], value), name


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def host_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name.startswith("torchvision"):
        return getattr(torchvision.models, name.split(".")[1])(num_classes=4)
    return timm.create_model(name, num_classes=4)


@pytest.mark.parametrize("variant", VARIANTS, ids=hosts.id_of)
@pytest.mark.parametrize("kind", ["timm_bottleneck", "timm_bottle2neck", "tv_bottleneck", "timm_basic"])
def test_plugging_keeps_every_parameter_buffer_and_key_of_the_host(kind, variant):
    if kind == "timm_basic":
        variant = {key: value for key, value in variant.items() if key != "inner"}
    net = hosts.small_net(kind)
    before = snapshot(net)
    assert ds.plug_in(net, **variant) is net
    after = snapshot(net)
    for part in ("identities", "flags"):
        assert {name: after[part][name] for name in before[part]} == before[part]
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())
    added = [key for key in after["keys"] if key not in before["keys"]]
    assert [key for key in after["keys"] if key in before["keys"]] == before["keys"]
    assert all(".shortcut." in key or ".inner." in key for key in added)
    for name in before["structure"]:
        assert after["structure"][name][0] == before["structure"][name][0], f"{name} is another object"
    assert isinstance(net.layer1, ds.DenseStage) and isinstance(net.layer2, ds.DenseStage)


@pytest.mark.parametrize("variant", VARIANTS, ids=hosts.id_of)
@pytest.mark.parametrize("kind", ["timm_bottleneck", "timm_bottle2neck", "tv_bottleneck", "tv_basic"])
def test_unplugging_restores_the_host_bit_for_bit(kind, variant):
    if kind == "tv_basic":
        variant = {key: value for key, value in variant.items() if key != "inner"}
    net = hosts.small_net(kind)
    before = snapshot(net)
    x = torch.randn(2, 3, 9, 7)
    net.eval()
    expected = net(x)
    net.train()
    ds.plug_in(net, **variant)
    net.eval()
    net(x)
    net.train()
    assert ds.unplug(net) is net
    assert_same(before, snapshot(net))
    assert torch.equal(net.eval()(x), expected)
    assert type(net.layer1) is nn.Sequential


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet26d",
        "seresnet50",
        "res2net50_26w_4s",
        "resnetblur18",
        "resnet10t",
        "torchvision.resnet18",
        "torchvision.resnext50_32x4d",
    ],
)
def test_networks_of_timm_and_torchvision_are_plugged_and_unplugged(name):
    net = host_of(name).eval()
    before = snapshot(net)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        host = net(x)
        ds.plug_in(net, init="uniform")
        plugged = net(x)
        assert list(ds.dense_stages(net)) == ["layer1", "layer2", "layer3", "layer4"]
        assert torch.isfinite(plugged).all() and not torch.allclose(plugged, host)
        ds.unplug(net)
        assert torch.equal(net(x), host)
    assert_same(before, snapshot(net))


def test_training_while_plugged_trains_the_hosts_own_weights():
    net = hosts.small_net()
    parameters = dict(net.named_parameters())
    ds.plug_in(net, norm="group")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    net(torch.randn(2, 3, 9, 7)).square().sum().backward()
    optimizer.step()
    moved = {name: p.detach().clone() for name, p in net.named_parameters()}
    ds.unplug(net)
    for name, p in net.named_parameters():
        assert p is parameters[name]
        assert torch.equal(p, moved[name]) and not torch.equal(p, before[name]), name


def test_plugging_again_after_unplugging_starts_anew():
    net = hosts.small_net()
    ds.plug_in(net)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=3)
    ds.unplug(net)
    ds.plug_in(net, init="ones", norm=None)
    assert all((p == 1).all() for _, p in ds.shortcut_parameters(net))


def test_another_network_and_the_hosts_classes_are_left_alone():
    mine, other = hosts.small_net("timm_bottleneck"), hosts.small_net("timm_bottleneck")
    before, forward, attributes = snapshot(other), Bottleneck.forward, sorted(vars(Bottleneck))
    ds.plug_in(mine, inner=True)
    assert_same(before, snapshot(other))
    assert Bottleneck.forward is forward and sorted(vars(Bottleneck)) == attributes
    assert isinstance(mine.layer1[0], Bottleneck) and type(mine.layer1[0]) is not Bottleneck
    assert type(other.layer1[0]) is Bottleneck


def test_hooks_set_before_plugging_fire_after_it_and_after_unplugging():
    net, seen = hosts.small_net(), []
    net.layer1[1].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    net.layer2.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    x = torch.randn(2, 3, 8, 6)
    net(x)
    ds.plug_in(net)(x)
    ds.unplug(net)(x)
    assert seen == [(2, 8, 8, 6), (2, 16, 4, 3)] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_is_added_takes_the_hosts_dtype_and_mode(dtype):
    net = hosts.small_net("timm_bottleneck").to(dtype).eval()
    ds.plug_in(net, norm="batch", inner=True)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert not any(m.training for m in net.modules())
    assert all(m.training for m in net.train().modules())


def test_a_host_on_the_meta_device_is_plugged_there():
    with torch.device("meta"):
        net = hosts.Net("timm_basic", (2, 2), (8, 16))
    ds.plug_in(net)
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_plugging_draws_no_random_number():
    net = hosts.small_net("timm_bottleneck")
    torch.manual_seed(123)
    expected = torch.rand(4)
    torch.manual_seed(123)
    ds.plug_in(net, inner=True, norm="batch")
    assert torch.equal(torch.rand(4), expected)


def test_a_bare_stage_can_be_plugged():
    stage = hosts.make_stage("timm_basic", 3, 8, in_channels=8)
    assert ds.plug_in(stage) is stage
    assert isinstance(stage, ds.DenseStage)
    assert stage(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)
    assert [name for name, _ in ds.shortcut_parameters(stage)] == [f"shortcut.weights.{k}" for k in range(3)]


@pytest.mark.parametrize("variant", VARIANTS, ids=hosts.id_of)
def test_shortcut_parameters_are_exactly_those_that_were_added(variant):
    net = hosts.small_net("timm_bottleneck")
    before = {id(p) for p in net.parameters()}
    ds.plug_in(net, **variant)
    added = [(name, id(p)) for name, p in net.named_parameters() if id(p) not in before]
    assert sorted((name, id(p)) for name, p in ds.shortcut_parameters(net)) == sorted(added)


def test_an_unplugged_stage_holds_on_to_nothing_that_was_added():
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), inner=True)
    watched = [weakref.ref(p) for _, p in ds.shortcut_parameters(net)]
    ds.unplug(net)
    gc.collect()
    assert all(ref() is None for ref in watched)


# Errors leave the model as it was -------------------------------------------------------------------------------------


class OtherBlock(BasicBlock):
    """A subclass may have another forward pass, so it has no adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def fails_for_wide(channels: int) -> nn.Module:
    if channels > 8:
        raise RuntimeError("no norm for wide maps")
    return nn.GroupNorm(1, channels)


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"aggregate": "sum"}, "'sum'"),
    ({"norm": "grup"}, "'grup'"),
    ({"init": "best"}, "'best'"),
    ({"groups": 3}, "3"),
    ({"groups": 0}, "0"),
    ({"groups": -4}, "-4"),
    ({"groups": 16}, "16 groups"),
    ({"groups": 2, "norm": "batch"}, "groups"),
    ({"norm": lambda channels: channels}, "int"),
    ({"norm": 3}, "3"),
]


@pytest.mark.parametrize("kind", ["timm_basic", "timm_bottle2neck"])
@pytest.mark.parametrize(("variant", "named"), FAULTY, ids=[hosts.id_of(v) for v, _ in FAULTY])
def test_a_wrong_argument_is_named_in_one_sentence_and_leaves_the_model_as_it_was(variant, named, kind):
    net = hosts.small_net(kind)
    before = snapshot(net)
    for call in (ds.plug_in, ds.plan):
        with pytest.raises(ds.DenseShortcutError) as error:
            call(net, **variant)
        assert named in one_sentence(error)
        assert_same(before, snapshot(net))
    assert isinstance(error.value, ValueError)


def test_a_group_count_that_fails_only_in_a_later_stage_leaves_the_earlier_ones_as_they_were():
    net = hosts.Net("timm_basic", (2, 2), (8, 12))
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError, match="12"):
        ds.plug_in(net, groups=8)
    assert_same(before, snapshot(net))


def test_a_group_count_that_fails_only_inside_a_bottleneck_leaves_the_model_as_it_was():
    net = hosts.small_net("timm_bottleneck")
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError, match="8 groups"):
        ds.plug_in(net, groups=8, inner=True)
    assert_same(before, snapshot(net))


def test_a_norm_factory_that_raises_midway_leaves_the_model_as_it_was():
    net = hosts.small_net()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="no norm for wide maps"):
        ds.plug_in(net, norm=fails_for_wide)
    assert_same(before, snapshot(net))


def test_a_network_plugged_twice_is_refused_and_left_plugged_as_it_was():
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), norm="batch", inner=True)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=5)
    before = snapshot(net)
    for call in (ds.plug_in, ds.plan):
        with pytest.raises(ds.DenseShortcutError, match="already") as error:
            call(net)
        one_sentence(error)
    assert_same(before, snapshot(net))
    ds.unplug(net)
    fresh = hosts.small_net("timm_bottleneck")
    assert list(net.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_a_network_half_of_which_is_plugged_is_refused():
    net = hosts.small_net()
    ds.plug_in(net.layer1)
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError):
        ds.plug_in(net)
    assert_same(before, snapshot(net))


def test_unplugging_a_network_that_is_not_plugged_is_refused():
    net = hosts.small_net()
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.unplug(net)
    one_sentence(error)
    assert_same(before, snapshot(net))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        lambda: nn.Linear(2, 2),
    ],
    ids=["convolutions", "linear"],
)
def test_a_network_with_nothing_to_plug_into_is_refused(make):
    net = make()
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plug_in(net)
    assert "nothing to plug into" in one_sentence(error)
    assert_same(before, snapshot(net))


def test_a_block_class_that_no_trace_understands_is_named_with_the_adapter_that_would_teach_it():
    net = timm.create_model("rexnet_100", num_classes=2)
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plug_in(net)
    text = str(error.value)
    assert "rexnet" in text.lower() and "ds.register_adapter" in text and "a trace of its forward pass" in text
    assert_same(before, snapshot(net))


def test_a_subclass_of_a_known_block_is_traced_for_it_may_have_another_forward_pass():
    net = hosts.small_net().double().eval()
    old = net.layer2[1]
    net.layer2[1] = OtherBlock(16, 16).double().eval()
    net.layer2[1].load_state_dict(old.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = net(x)
    ds.plug_in(net, norm=None, init="nearest")  # the nearest map as it is: what the host adds
    assert type(net.layer2[1]).__name__ == "DenseOtherBlock" and len(net.layer2.segments) == 1
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_a_block_shared_by_two_places_is_refused():
    net = hosts.small_net()
    net.layer1[2] = net.layer1[1]
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plug_in(net)
    one_sentence(error)
    assert_same(before, snapshot(net))


def test_a_block_that_changes_the_shape_in_the_middle_of_a_stage_begins_a_row_of_its_own():
    net = nn.Sequential()
    net.layer1 = nn.Sequential(
        *hosts.make_stage("timm_basic", 2, 8, in_channels=8),
        *hosts.make_stage("timm_basic", 2, 16, in_channels=8, stride=2),
    )
    hosts.randomise(net, seed=3)
    net, x = net.double().eval(), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    expected = net(x)
    before = snapshot(net)
    ds.plug_in(net, norm=None, init="nearest")
    assert [(row.first, row.stop) for row in net.layer1.segments] == [(0, 2), (2, 4)]
    assert {name.split(".")[1] for name, _ in ds.shortcut_parameters(net)} == {"shortcut", "shortcut2"}
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    ds.unplug(net)
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("kind", ["timm_basic", "tv_basic"])
def test_inner_shortcuts_need_bottlenecks(kind):
    net = hosts.small_net(kind)
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError, match="bottleneck"):
        ds.plug_in(net, inner=True)
    assert_same(before, snapshot(net))


def test_a_stage_that_already_has_a_child_of_our_name_is_refused():
    net = hosts.small_net()
    net.layer1.add_module("shortcut", BasicBlock(8, 8))
    before = snapshot(net)
    with pytest.raises(ds.DenseShortcutError) as error:
        ds.plug_in(net)
    one_sentence(error)
    assert_same(before, snapshot(net))


# plan -----------------------------------------------------------------------------------------------------------------


def test_plan_changes_nothing_and_says_what_plugging_does():
    net = timm.create_model("resnet50", num_classes=2)
    before = snapshot(net)
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    plan = ds.plan(net)
    assert torch.equal(torch.rand(2), expected)
    assert_same(before, snapshot(net))
    assert [s.name for s in plan.stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert [s.channels for s in plan.stages] == [256, 512, 1024, 2048]
    assert [s.pairs for s in plan.stages] == [6, 10, 21, 6]
    assert [s.parameters for s in plan.stages] == [6 * 256, 10 * 512, 21 * 1024, 6 * 2048]
    host = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in ds.plug_in(net).parameters()) - host == 40448
    table = str(plan)
    for word in ("layer1", "layer4", "2048", "21", "Bottleneck"):
        assert word in table
    assert "40,448" in table or "40448" in table


@pytest.mark.parametrize("variant", VARIANTS, ids=hosts.id_of)
@pytest.mark.parametrize("kind", ["timm_bottleneck", "timm_bottle2neck"])
def test_plan_counts_the_parameters_that_plugging_adds(kind, variant):
    net = hosts.small_net(kind)
    plan = ds.plan(net, **variant)
    ds.plug_in(net, **variant)
    for stage in plan.stages:
        added = [p.numel() for name, p in ds.shortcut_parameters(net) if name.startswith(f"{stage.name}.")]
        assert stage.parameters == sum(added)
    if variant.get("inner"):
        assert any(".inner." in name for name, _ in ds.shortcut_parameters(net))


def test_plan_finds_666_pairs_in_the_third_stage_of_resnet152():
    with torch.device("meta"):
        net = timm.create_model("resnet152")
    assert [s.pairs for s in ds.plan(net).stages] == [6, 36, 666, 6]


def test_inner_weights_of_a_plan_follow_the_blocks_that_keep_their_shape():
    net = hosts.small_net("timm_bottleneck")
    expected = sum(
        reference.hidden_width(block)
        for stage in (net.layer1, net.layer2)
        for block in stage
        if reference.keeps_shape(block)
    )
    plain, inner = ds.plan(net), ds.plan(net, inner=True)
    assert sum(s.parameters for s in inner.stages) - sum(s.parameters for s in plain.stages) == expected


def test_printing_a_plugged_network_shows_the_recipe():
    text = repr(ds.plug_in(hosts.small_net(), aggregate="block", init="uniform"))
    for word in ("DenseStage", "DenseShortcut", "block", "uniform", "BatchNorm2d"):
        assert word in text


def test_a_copy_of_a_plugged_network_can_be_unplugged_on_its_own():
    net = ds.plug_in(hosts.small_net())
    twin = copy.deepcopy(net)
    ds.unplug(twin)
    assert type(twin.layer1) is nn.Sequential and isinstance(net.layer1, ds.DenseStage)
