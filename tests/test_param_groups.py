"""Parameter groups: every parameter once, with the learning rate and decay that it was given."""

import hosts
import pytest
import timm
import torch

import dense_shortcuts as ds


def by_name(net, groups):
    names = {id(p): name for name, p in net.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("inner", [False, True])
def test_each_parameter_is_in_one_group(inner):
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), inner=inner)
    net.conv1.weight.requires_grad_(False)
    groups = ds.param_groups(net, weight_decay=0.1)
    found = by_name(net, groups)
    shortcuts = {name for name, _ in ds.shortcut_parameters(net)}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    decayed = {name for name, p in net.named_parameters() if name.endswith("weight") and p.ndim in (2, 4)}
    assert found["shortcut"] == shortcuts
    assert found["decay"] == (decayed & trained) - shortcuts and "fc.weight" in found["decay"]
    assert found["no_decay"] == trained - decayed - shortcuts and "fc.bias" in found["no_decay"]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert all("lr" not in group for group in groups)


def test_a_host_has_no_shortcut_group():
    assert [group["name"] for group in ds.param_groups(hosts.small_net())] == ["decay", "no_decay"]


def test_shortcut_weights_have_the_learning_rate_and_decay_of_their_own():
    net = ds.plug_in(hosts.small_net())
    groups = {g["name"]: g for g in ds.param_groups(net, lr=0.1, weight_decay=0.2)}
    assert {(g["lr"], g["weight_decay"]) for g in groups.values()} == {(0.1, 0.2), (0.1, 0.0)}
    assert groups["shortcut"]["weight_decay"] == 0.0
    groups = {g["name"]: g for g in ds.param_groups(net, lr=0.1, shortcut_lr=0.0, shortcut_weight_decay=0.3)}
    assert (groups["shortcut"]["lr"], groups["shortcut"]["weight_decay"]) == (0.0, 0.3)
    assert groups["no_decay"]["lr"] == 0.1


def timm_sgd(groups):
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(groups, opt="momentum", lr=1.0, momentum=0.0)


@pytest.mark.parametrize("make", [lambda g: torch.optim.SGD(g, lr=1.0), timm_sgd], ids=["torch", "timm"])
def test_an_optimizer_steps_by_them(make):
    net = ds.plug_in(timm.create_model("resnet10t", channels=(4, 4, 4, 4), num_classes=2), init="ones")
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = ds.param_groups(net, lr=0.5, weight_decay=0.1, shortcut_lr=0.25, shortcut_weight_decay=0.2)
    found, optimizer = by_name(net, groups), make(groups)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for group, rate, decay in (("decay", 0.5, 0.1), ("no_decay", 0.5, 0.0), ("shortcut", 0.25, 0.2)):
        for name in found[group]:
            wanted = start[name] - rate * (1 + decay * start[name])
            torch.testing.assert_close(net.get_parameter(name).detach(), wanted, msg=name)
