"""DenseShortcut: its weights and their start, its norms, their statistics, and the operator it uses."""

import hosts
import pytest
import reference
import torch
from hosts import assert_close
from torch import nn

import dense_shortcuts as ds
from dense_shortcuts.nn.shortcut import DenseShortcut


def plugged_stage(depth: int = 4, channels: int = 8, **variant) -> ds.DenseStage:
    host = nn.Sequential(hosts.make_stage("timm_basic", depth, channels, in_channels=channels))
    return ds.plug_in(host, **variant)[0]


@pytest.mark.parametrize(
    ("variant", "rows"),
    [
        ({}, lambda length: [1 / length] * length),
        ({"init": "nearest"}, lambda length: [0.0] * (length - 1) + [1.0]),
        ({"init": "uniform"}, lambda length: [1 / length] * length),
        ({"init": "ones"}, lambda length: [1.0] * length),
        ({"init": "zeros"}, lambda length: [0.0] * length),
        ({"keep_identity": True}, lambda length: [0.0] * length),
        ({"keep_identity": True, "init": "nearest"}, lambda length: [0.0] * (length - 1) + [1.0]),
    ],
    ids=lambda value: "start" if callable(value) else str(value),
)
@pytest.mark.parametrize("aggregate", ["stage", "block"])
def test_weights_start_where_asked(aggregate, variant, rows):
    shortcut = plugged_stage(aggregate=aggregate, **variant).shortcut
    assert len(shortcut.weights) == 4
    for k, weight in enumerate(shortcut.weights):
        expected = torch.tensor(rows(k + 1)).reshape(k + 1, 1).expand(k + 1, 8)
        assert torch.equal(weight.detach(), expected)
        assert isinstance(weight, nn.Parameter) and weight.requires_grad


def test_the_random_start_is_that_of_a_depthwise_1x1_convolution_and_follows_the_seed():
    def made() -> torch.Tensor:
        torch.manual_seed(3)
        return DenseShortcut(3, 512, init="random").weights[2].detach()

    weight = made()
    assert weight.shape == (3, 512) and weight.abs().max() <= 1 and torch.equal(weight, made())
    torch.manual_seed(3)
    convolution = torch.nn.Conv2d(512, 512, 1, groups=512, bias=False).weight
    for found in (weight, convolution.detach()):
        assert abs(found.mean()) < 0.1 and abs(found.std() - 3**-0.5) < 0.05


def test_dense_identity_has_neither_weight_nor_norm():
    stage = plugged_stage(aggregate="dense_identity")
    assert list(stage.shortcut.state_dict()) == []
    assert list(stage.shortcut.parameters()) == []


def test_state_dict_has_one_weight_for_each_block_and_one_norm_for_each_earlier_map():
    keys = [key for key in plugged_stage(3, norm="batch").state_dict() if key.startswith("shortcut.")]
    weights = [f"shortcut.weights.{k}" for k in range(3)]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sorted(keys) == sorted(weights + [f"shortcut.norms.{i}.{b}" for i in range(3) for b in buffers])
    without = [key for key in plugged_stage(3, norm="group").state_dict() if key.startswith("shortcut.")]
    assert without == weights


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("group", nn.GroupNorm), ("layer", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)],
)
def test_norms_are_pytorchs_own_without_affine_parameters(norm, kind):
    norms = plugged_stage(3, norm=norm).shortcut.norms
    assert [type(n) for n in norms] == [kind] * 3
    assert all(n.weight is None and n.bias is None for n in norms)
    assert len({id(n) for n in norms}) == 3
    if norm == "layer":
        assert [n.num_groups for n in norms] == [1] * 3


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8, 12, 16, 20, 26, 40, 64, 96, 100, 104, 128, 136, 208, 256, 2048])
def test_default_group_count_is_the_largest_divisor_within_32_and_a_quarter_of_the_channels(channels):
    norm = plugged_stage(1, channels, norm="group").shortcut.norms[0]
    assert norm.num_groups == reference.default_groups(channels)


def test_default_group_count_gives_32_groups_at_the_widths_of_resnet50():
    assert [reference.default_groups(c) for c in (256, 512, 1024, 2048)] == [32] * 4
    assert [reference.default_groups(c) for c in (16, 26, 1, 7)] == [4, 2, 1, 1]


def test_norm_factory_is_called_with_the_channels_and_its_parameters_train():
    asked: list[int] = []

    def factory(channels: int) -> nn.Module:
        asked.append(channels)
        return nn.BatchNorm2d(channels, affine=True)

    host = nn.Sequential(hosts.make_stage("timm_basic", 3, 8, in_channels=8)).double()
    hosts.randomise(host, seed=1)
    blocks = hosts.frozen_copy(host[0])
    stage = ds.plug_in(host, norm=factory)[0]
    assert asked == [8, 8, 8]
    hosts.randomise(stage.shortcut, seed=2)
    names = [name for name, _ in ds.shortcut_parameters(host)]
    assert sorted(names) == sorted(
        [f"0.shortcut.weights.{k}" for k in range(3)]
        + [f"0.shortcut.norms.{i}.{p}" for i in range(3) for p in ("weight", "bias")]
    )

    expected_norms = [nn.BatchNorm2d(8).double() for _ in range(3)]
    for mine, theirs in zip(expected_norms, stage.shortcut.norms, strict=True):
        mine.load_state_dict(theirs.state_dict())
    w = [p.detach().clone() for p in stage.shortcut.weights]
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    y, wanted = stage(x), reference.stage_maps(blocks, x, w, expected_norms)[-1]
    assert_close(y, wanted, 1e-10, "output")
    y.sum().backward()
    wanted.sum().backward()
    for i in range(3):
        assert_close(stage.shortcut.norms[i].weight.grad, expected_norms[i].weight.grad, 1e-10, f"gamma {i}")
        assert_close(stage.shortcut.norms[i].bias.grad, expected_norms[i].bias.grad, 1e-10, f"beta {i}")


@pytest.mark.parametrize("aggregate", ["stage", "block"])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_batch_statistics_follow_a_plain_batch_norm_step_for_step(momentum, aggregate):
    """Six steps of changing batch size with an optimizer between, then evaluation with what was gathered."""
    host = nn.Sequential(hosts.make_stage("timm_basic", 3, 8, in_channels=6)).double()
    hosts.randomise(host, seed=1)
    blocks = hosts.frozen_copy(host[0])
    stage = ds.plug_in(host, norm="batch", aggregate=aggregate)[0]
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=2)
    expected = hosts.Reference(blocks, stage, channels=8, norm="batch", aggregate=aggregate)
    for norm in (*stage.shortcut.norms, *expected.norms):
        norm.momentum = momentum
    ours, theirs = list(stage.named_parameters()), expected.parameters()
    optimizers = [torch.optim.SGD([p for _, p in ours], 0.05), torch.optim.SGD([theirs[n] for n, _ in ours], 0.05)]

    for step, batch in enumerate((2, 3, 1, 4, 2, 5), 1):
        x = torch.randn(batch, 6, 5, 7, dtype=torch.float64) + step
        for run, optimizer in zip((stage, lambda x: expected.maps(x)[-1]), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        for i, (norm, plain) in enumerate(zip(stage.shortcut.norms, expected.norms, strict=True)):
            assert_close(norm.running_mean, plain.running_mean, 1e-10, f"mean of map {i} at step {step}")
            assert_close(norm.running_var, plain.running_var, 1e-10, f"variance of map {i} at step {step}")
            assert norm.num_batches_tracked.item() == plain.num_batches_tracked.item() == step

    stage.eval()
    expected.train(False)
    before = {name: b.clone() for name, b in stage.named_buffers()}
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    assert_close(stage(x), expected.maps(x)[-1], 1e-10, "output in evaluation")
    assert all(torch.equal(b, before[name]) for name, b in stage.named_buffers())


def test_batch_norm_refuses_a_single_number_per_channel_as_pytorch_does():
    stage = plugged_stage(2, norm="batch")
    stage[0].bn1.eval(), stage[0].bn2.eval(), stage[1].bn1.eval(), stage[1].bn2.eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stage(torch.randn(1, 8, 1, 1))


def test_group_norm_statistics_are_formed_once_for_each_map_and_not_for_each_pair(monkeypatch):
    calls = []
    from dense_shortcuts.nn import features as module

    real = module.affine_form
    monkeypatch.setattr(module, "affine_form", lambda norm, *a, **k: calls.append(norm) or real(norm, *a, **k))
    stage = plugged_stage(6)
    stage(torch.randn(2, 8, 5, 3))
    own = {id(n) for n in stage.shortcut.norms}
    assert sorted(id(n) for n in calls if id(n) in own) == sorted(own)
