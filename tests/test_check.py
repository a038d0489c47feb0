"""ds.check: silent on sound networks, and naming each planted fault."""

import copy

import hosts
import pytest
import timm
import torch
from torch import Tensor, nn

import dense_shortcuts as ds

SMALL = (3, 16, 16)
VARIANTS = [
    {},
    {"aggregate": "block", "norm": "batch"},
    {"aggregate": "dense_identity"},
    {"norm": "layer", "keep_identity": True},
    {"norm": None, "init": "uniform"},
    {"norm": "instance", "init": "ones"},
    {"inner": True},
    {"inner": True, "norm": "batch", "keep_identity": True},
    {"norm": lambda channels: nn.BatchNorm2d(channels)},
]


def started_at_zero(kind: str) -> hosts.Net:
    """As networks really start: the last norm of each block has gamma 0."""
    net = hosts.small_net(kind)
    for block in net.modules():
        if hasattr(block, "zero_init_last"):
            block.zero_init_last()
    return net


@pytest.mark.parametrize("variant", VARIANTS, ids=hosts.id_of)
@pytest.mark.parametrize("kind", ["timm_bottleneck", "timm_bottle2neck", "tv_bottleneck"])
def test_a_fresh_network_is_sound(kind, variant):
    net = ds.plug_in(started_at_zero(kind), **variant)
    assert ds.check(net, SMALL) == []
    assert ds.check(net, SMALL, at_start=True) == []


@pytest.mark.parametrize("name", ["dsnet20", "ds2net50", "ds2res2net50", "se_dsnet50"])
def test_registered_networks_are_sound(name):
    assert ds.check(timm.create_model(name, num_classes=3), at_start=True) == []


def test_a_network_with_drop_path_is_sound():
    assert ds.check(timm.create_model("dsnet20", num_classes=3, drop_path_rate=0.9), (3, 32, 32)) == []


def test_a_features_only_network_is_sound():
    assert ds.check(timm.create_model("dsnet18", features_only=True, out_indices=(1, 2))) == []


@pytest.mark.parametrize("training", [True, False])
def test_checking_changes_nothing(training):
    net = ds.plug_in(hosts.small_net(), norm="batch").train(training)
    net(torch.randn(2, *SMALL)).sum().backward()
    values = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: (id(p.grad), p.grad.clone()) for name, p in net.named_parameters()}
    objects = {name: id(p) for name, p in net.named_parameters()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    assert ds.check(net, SMALL) == []
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers moved on"
    assert {m.training for m in net.modules()} == {training}
    assert {name: id(p) for name, p in net.named_parameters()} == objects
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name]), name
    for name, p in net.named_parameters():
        assert id(p.grad) == gradients[name][0] and torch.equal(p.grad, gradients[name][1]), name


def test_checking_a_network_that_draws_random_numbers_leaves_the_callers_alone():
    net = timm.create_model("dsnet20", num_classes=3, drop_path_rate=0.5, drop_rate=0.5)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    ds.check(net, (3, 32, 32))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers moved on"


def faults_naming(net: nn.Module, *words: str) -> list[str]:
    faults = ds.check(net, SMALL)
    assert faults, "no fault was seen"
    assert all(isinstance(fault, str) and "\n" not in fault for fault in faults)
    return [fault for fault in faults if all(word in fault for word in words)]


def test_shortcut_weights_in_a_plain_list_are_named():
    """The fault of one public DSNet: its weights never reach the optimizer."""
    net = ds.plug_in(hosts.small_net())
    shortcut = net.layer1.shortcut
    kept = list(shortcut.weights)
    del shortcut.weights
    shortcut.weights = kept
    assert len(ds.shortcut_parameters(net)) == 2
    assert faults_naming(net, "layer1.shortcut", "registered", "list")
    assert not faults_naming(net, "layer2")


def test_plain_tensors_as_shortcut_weights_are_named():
    net = ds.plug_in(hosts.small_net())
    shortcut = net.layer2.shortcut
    kept = [w.detach().clone() for w in shortcut.weights]
    del shortcut.weights
    shortcut.weights = kept
    assert faults_naming(net, "layer2.shortcut")
    assert not faults_naming(net, "layer1")


def test_a_shortcut_built_anew_at_each_forward_call_is_named():
    net = ds.plug_in(hosts.small_net())

    def build_and_call(*args: object, **options: object) -> object:
        return ds.DenseShortcut(3, 8)(*args, **options)

    net.layer1.shortcut.forward = build_and_call
    assert faults_naming(net, "layer1", "anew")
    assert faults_naming(net, "layer1.shortcut.weights.0")
    assert not faults_naming(net, "layer2")


def test_a_shortcut_replaced_at_each_forward_call_is_named():
    """Registered, but as a new object each time: the optimizer holds the old one."""
    net = ds.plug_in(hosts.small_net())

    def replace(stage: nn.Module, args: tuple) -> None:
        stage.shortcut = copy.deepcopy(stage.shortcut)

    net.layer1.register_forward_pre_hook(replace)
    assert faults_naming(net, "layer1.shortcut.weights.0", "anew")
    assert not faults_naming(net, "layer2")


class FreshNorm(nn.Module):
    """A user's module that builds a trainable norm in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.GroupNorm(2, x.shape[1])(x)


class HiddenNorm(nn.Module):
    """A user's module that keeps a trainable norm in a plain list."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = [nn.GroupNorm(2, channels)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


class HiddenGain(nn.Module):
    """A user's module that keeps a trainable tensor in a plain list."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = [torch.ones(1, channels, 1, 1, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.hidden[0]


def test_a_norm_built_anew_at_each_forward_call_is_named():
    net = ds.plug_in(hosts.small_net(), norm=lambda channels: FreshNorm())
    assert faults_naming(net, "layer1.shortcut.norms.0", "anew")
    assert faults_naming(net, "layer2.shortcut.norms.1", "anew")


@pytest.mark.parametrize("norm", [HiddenNorm, HiddenGain])
def test_a_norm_whose_weights_are_in_a_plain_list_is_named(norm):
    net = ds.plug_in(hosts.small_net(), norm=norm)
    assert faults_naming(net, "layer1.shortcut.norms.0", "registered")
    assert not faults_naming(net, "anew")


def test_a_parameter_without_use_is_named():
    net = ds.plug_in(hosts.small_net())
    net.layer2.shortcut.weights.append(nn.Parameter(torch.ones(3, 16)))
    net.spare = nn.Linear(2, 2)
    assert faults_naming(net, "layer2.shortcut.weights.2")
    assert faults_naming(net, "spare.weight") and faults_naming(net, "spare.bias")


def test_a_frozen_shortcut_weight_is_named():
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), inner=True)
    net.layer1.shortcut.weights[1].requires_grad_(False)
    assert faults_naming(net, "layer1.shortcut.weights.1")
    net.layer1.shortcut.weights[1].requires_grad_(True)
    net.layer2[1].inner.weight.requires_grad_(False)
    assert faults_naming(net, "layer2.1.inner.weight")


def test_a_shortcut_weight_cut_off_from_the_output_is_named():
    net = ds.plug_in(hosts.small_net())
    net.layer1.register_forward_hook(lambda module, args, output: output.detach())
    assert faults_naming(net, "layer1.shortcut.weights.0")
    assert not faults_naming(net, "layer2.shortcut")


def test_a_weight_away_from_its_start_is_named_only_when_the_start_is_asked_for():
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), inner=True, init="uniform")
    with torch.no_grad():
        net.layer1.shortcut.weights[2][1, 3] += 0.25
    assert ds.check(net, SMALL) == []
    faults = ds.check(net, SMALL, at_start=True)
    assert len(faults) == 1 and "layer1.shortcut.weights.2" in faults[0]


def test_an_inner_weight_away_from_its_start_is_named_when_the_start_is_asked_for():
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), inner=True)
    with torch.no_grad():
        net.layer2[1].inner.weight[0] = 1.0
    faults = ds.check(net, SMALL, at_start=True)
    assert len(faults) == 1 and "layer2.1.inner.weight" in faults[0]


def test_a_network_without_shortcuts_is_not_called_sound():
    assert ds.check(hosts.small_net(), SMALL) != []
