"""Parameter groups: every parameter once, with the learning rate and decay that it was given."""

import hosts
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize

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


def decays(net) -> set[str]:
    return by_name(net, ds.param_groups(net, weight_decay=0.1))["decay"]


def test_attention_and_conditional_convolutions_decay_as_other_matrices_do():
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)
    assert decays(vit) == {
        "conv_proj.weight",
        "heads.head.weight",
        *(
            f"encoder.layers.encoder_layer_{n}.{name}.weight"
            for n in range(2)
            for name in ("self_attention.out_proj", "mlp.0", "mlp.3")
        ),
        *(f"encoder.layers.encoder_layer_{n}.self_attention.in_proj_weight" for n in range(2)),
    }
    assert "0.weight" in decays(nn.Sequential(timm.layers.CondConv2d(4, 8, 3, num_experts=3)))
    apart = nn.MultiheadAttention(4, 2, kdim=6, vdim=6)
    assert decays(apart) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert decays(nn.LSTM(3, 4)) == {"weight_ih_l0", "weight_hh_l0"}


@pytest.mark.parametrize(
    "name", ["convnextv2_atto", "efficientnet_cc_b0_4e", "vit_tiny_patch16_224", "mobilenetv3_small_050"]
)
def test_timms_own_groups_agree_but_for_embeddings_and_tokens(name):
    from timm.optim import param_groups_weight_decay

    net = timm.create_model(name)
    names = {id(p): n for n, p in net.named_parameters()}
    undecayed = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(net, 0.1, no_weight_decay_list=undecayed)
    assert decays(net) == {names[id(p)] for group in theirs if group["weight_decay"] for p in group["params"]}


def test_parametrized_weights_decay_and_scales_in_the_shape_of_matrices_do_not():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm([4, 5, 5]), nn.Embedding(3, 4))
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    net[0].gain = nn.Parameter(torch.ones(4, 1, 1, 1))
    net.weight = nn.Parameter(torch.ones(1, 4, 1, 1))
    assert decays(net) == {"0.parametrizations.weight.original"}


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
