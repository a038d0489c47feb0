"""DenseStage against the equations in reference.py: forward, every gradient, every running statistic."""

from typing import Any

import hosts
import pytest
import reference
import torch
from hosts import Reference, assert_close
from torch import Tensor, nn

import dense_shortcuts as ds

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
NORMS = ("group", "batch", "layer", "instance", None)
EXPANDED = {"timm_basic": 8, "tv_basic": 8, "timm_bottleneck": 16, "timm_bottle2neck": 16, "tv_bottleneck": 16}


def compare(
    kind: str,
    depth: int,
    *,
    norm: Any = "group",
    aggregate: str = "stage",
    keep_identity: bool = False,
    inner: bool = False,
    groups: int | None = None,
    dtype: torch.dtype = torch.float64,
    train: bool = True,
    shape: tuple[int, ...] = (2, 6, 7, 5),
    stride: int = 1,
    channels: int | None = None,
    scale: float = 0.5,
    **extra: Any,
) -> None:
    """Plug one stage with random weights and hold it against the reference."""
    channels = channels or EXPANDED[hosts.family(kind)]
    torch.manual_seed(depth)
    host = nn.Sequential()
    host.layer1 = hosts.make_stage(kind, depth, channels, in_channels=shape[1], stride=stride, **extra)
    hosts.randomise(host, seed=depth + 1)
    host.to(dtype)
    blocks = hosts.frozen_copy(host.layer1)

    variant = {"aggregate": aggregate, "keep_identity": keep_identity, "norm": norm, "inner": inner, "groups": groups}
    stage = ds.plug_in(host, **variant).layer1
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=depth + 2, scale=scale)
    hosts.randomise(stage.shortcut, seed=depth + 3)
    host.train(train)
    expected = Reference(blocks, stage, channels=channels, **variant)

    x = torch.relu(torch.randn(shape, dtype=dtype) + 0.3).requires_grad_()
    given = x.detach().clone()
    x_expected = given.double().requires_grad_()
    torch.manual_seed(99)
    y = stage(x)
    torch.manual_seed(99)
    y_expected = expected.maps(x_expected)[-1]
    upstream = torch.randn(y_expected.shape, dtype=dtype)
    y.backward(upstream)
    y_expected.backward(upstream.double())

    tolerance = TOLERANCE[dtype]
    assert_close(y, y_expected, tolerance, "output")
    if not train:
        with torch.no_grad():
            assert_close(stage(x), y_expected, tolerance, "output without gradients")
    assert torch.equal(x, given), "the stage wrote into its input"
    assert_close(x.grad, x_expected.grad, tolerance, "gradient of the input")
    actual, wanted = dict(stage.named_parameters()), expected.parameters()
    assert set(actual) == set(wanted)
    for name, parameter in wanted.items():
        assert_close(actual[name].grad, parameter.grad, tolerance, f"gradient of {name}")
    buffers, wanted_buffers = dict(stage.named_buffers()), expected.buffers()
    assert set(buffers) == set(wanted_buffers)
    for name, buffer in wanted_buffers.items():
        assert_close(buffers[name], buffer, tolerance, f"buffer {name}")


class SmoothAct(nn.Softplus):
    """An activation without a kink that takes timm's keyword."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()


MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
@MODES
@pytest.mark.parametrize("keep_identity", [False, True], ids=["dense", "keep_identity"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("aggregate", ["stage", "block"])
@pytest.mark.parametrize("kind", hosts.KINDS)
def test_weighted_shortcut_matches_the_equations(kind, aggregate, norm, keep_identity, train, dtype):
    compare(kind, 3, aggregate=aggregate, norm=norm, keep_identity=keep_identity, train=train, dtype=dtype)


@DTYPES
@MODES
@pytest.mark.parametrize("keep_identity", [False, True], ids=["dense", "keep_identity"])
@pytest.mark.parametrize("kind", hosts.KINDS)
def test_dense_identity_matches_the_equations(kind, keep_identity, train, dtype):
    compare(kind, 4, aggregate="dense_identity", keep_identity=keep_identity, train=train, dtype=dtype)


@DTYPES
@MODES
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("aggregate", ["stage", "block"])
@pytest.mark.parametrize("kind", hosts.WITH_INNER)
def test_inner_shortcut_matches_the_equations(kind, aggregate, norm, train, dtype):
    compare(kind, 3, aggregate=aggregate, norm=norm, inner=True, train=train, dtype=dtype)


@MODES
@pytest.mark.parametrize("kind", hosts.WITH_INNER)
def test_inner_shortcut_beside_the_dense_identity_matches_the_equations(kind, train):
    compare(kind, 3, aggregate="dense_identity", inner=True, train=train)


@pytest.mark.parametrize("norm", ["group", "batch", None])
@pytest.mark.parametrize("kind", hosts.WITH_INNER)
def test_inner_shortcut_leaves_out_the_block_whose_3x3_strides(kind, norm):
    compare(kind, 3, norm=norm, inner=True, stride=2)
    host = nn.Sequential(hosts.make_stage(kind, 3, 16, in_channels=6, stride=2))
    added = [name for name, _ in ds.shortcut_parameters(ds.plug_in(host, inner=True)) if "inner" in name]
    assert added == ["0.1.inner.weight", "0.2.inner.weight"]


@MODES
@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
@pytest.mark.parametrize("kind", hosts.KINDS)
def test_stage_without_projection_matches_the_equations(kind, aggregate, train):
    """X_0 is the stage's input itself."""
    channels = EXPANDED[kind]
    compare(kind, 3, aggregate=aggregate, norm="batch", train=train, shape=(2, channels, 5, 7))


@pytest.mark.parametrize("shape", [(1, 6, 7, 5), (1, 6, 9, 1), (3, 6, 1, 2), (2, 6, 3, 11)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["timm_basic", "timm_bottle2neck"])
def test_strided_stage_matches_the_equations_at_odd_sizes(kind, norm, shape):
    inner = kind == "timm_bottle2neck"
    if norm in ("group", "layer", None):
        compare(kind, 2, norm=norm, shape=(2, *shape[1:]), stride=2, inner=inner)
        compare(kind, 3, norm=norm, shape=shape, inner=inner)
    elif shape[0] * shape[2] * shape[3] > 8:  # one number has no variance: PyTorch's own modules refuse it
        compare(kind, 3, norm=norm, shape=shape, inner=inner)
        compare(kind, 2, norm=norm, shape=(2, 6, 2 * shape[2], 2 * shape[3] + 1), stride=2, inner=inner)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", range(1, 13))
def test_one_to_twelve_blocks_match_the_equations_at_batch_one(depth, norm):
    for train in (True, False):
        compare("timm_basic", depth, norm=norm, train=train, shape=(1, 8, 7, 5), scale=0.3)


@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
@pytest.mark.parametrize("depth", [1, 2, 8, 12])
def test_depths_match_the_equations_in_float32(depth, aggregate):
    for train in (True, False):
        compare("tv_basic", depth, aggregate=aggregate, train=train, dtype=torch.float32, scale=0.3)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("aggregate", ["stage", "block"])
def test_thirty_seven_blocks_match_the_equations(aggregate, norm):
    """ResNet-152's third stage has 36: no map count may be capped."""
    compare("timm_basic", 37, aggregate=aggregate, norm=norm, shape=(2, 8, 5, 3), channels=8, scale=0.1)


@MODES
@pytest.mark.parametrize("kind", sorted(hosts.EXTRAS))
def test_attention_drop_path_activations_and_strides_stay_in_their_place(kind, train):
    variants = [{}, {"aggregate": "block"}]
    if hosts.family(kind) in hosts.WITH_INNER:
        variants.append({"inner": True, "norm": "batch"})
    for variant in variants:
        compare(kind, 3, train=train, shape=(4, 6, 7, 5), stride=2 if kind.endswith("aa") else 1, **variant)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_given_group_count_is_used(groups):
    compare("timm_basic", 3, groups=groups)
    compare("timm_basic", 3, groups=groups, aggregate="block")


@pytest.mark.parametrize("shift", [1e3, -1e3])
@pytest.mark.parametrize("norm", ["group", "batch", "layer", "instance"])
def test_statistics_survive_a_mean_far_from_zero(norm, shift):
    """E[x^2] - E[x]^2 would lose all digits in float32: the mean is a thousand deviations off."""
    torch.manual_seed(3)
    host = nn.Sequential(hosts.make_stage("timm_basic", 1, 8, in_channels=8))
    hosts.randomise(host, seed=4)
    host[0][0].act2 = nn.Identity()
    blocks = hosts.frozen_copy(host[0])
    stage = ds.plug_in(host, norm=norm)[0]
    expected = Reference(blocks, stage, channels=8, norm=norm, aggregate="stage")
    x = torch.randn(2, 8, 9, 7) + shift
    f = reference.branch(blocks[0], x.double())
    shortcut, wanted = stage(x) - f.float(), expected.maps(x.double())[-1] - f
    assert_close(shortcut, wanted, 3e-3, "shortcut")


def zero_branches(stage: nn.Module) -> None:
    for block in stage.children():
        if hasattr(block, "zero_init_last"):
            block.zero_init_last()
            nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).bias)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 12, 36])
@pytest.mark.parametrize("kind", ["timm_basic", "timm_bottleneck", "timm_bottle2neck"])
def test_dense_identity_with_zeroed_branches_doubles_at_each_block(kind, depth):
    """X_1 = s(X_0), X_l = X_0 + .. + X_{l-1} = 2^(l-1) s(X_0), exact in floating point."""
    host = nn.Sequential(hosts.make_stage(kind, depth, 16, in_channels=16))
    zero_branches(host[0])
    ds.plug_in(host, aggregate="dense_identity")
    x = torch.randn(2, 16, 5, 7).relu()
    assert torch.equal(host(x), 2.0 ** (depth - 1) * x)
    assert torch.equal(host.eval()(x), 2.0 ** (depth - 1) * x)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_uniform_weights_with_zeroed_branches_average_equal_maps(depth):
    host = nn.Sequential(hosts.make_stage("timm_basic", depth, 8, in_channels=8))
    zero_branches(host[0])
    ds.plug_in(host, norm=None, init="uniform")
    x = torch.randn(2, 8, 5, 7).relu()
    assert_close(host(x), x, 1e-6, "output")


@pytest.mark.parametrize("aggregate", ["stage", "block"])
@pytest.mark.parametrize("kind", hosts.KINDS)
@MODES
def test_one_block_without_norm_and_weight_one_is_the_host_bit_for_bit(kind, aggregate, train):
    torch.manual_seed(5)
    host = hosts.Net(kind, (1, 1, 1), (16, 16, 32)).train(train)
    hosts.randomise(host, seed=6)
    images = torch.randn(3, 3, 13, 11)

    def run(net: nn.Module) -> list[Tensor]:
        net.zero_grad()
        x = images.clone().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        host_gradients = [p.grad.clone() for name, p in net.named_parameters() if ".shortcut." not in name]
        return [y.detach(), x.grad, *host_gradients]

    before = run(host)
    after = run(ds.plug_in(host, aggregate=aggregate, norm=None, init="ones"))
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad.abs().max() > 0 for _, p in ds.shortcut_parameters(host))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["timm_basic", "tv_bottleneck"])
def test_keep_identity_starts_as_the_host_bit_for_bit_and_dense_does_not(kind, norm):
    net = hosts.small_net(kind).eval()
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        host = net(x)
        kept = ds.plug_in(net, norm=norm, keep_identity=True)(x)
        ds.unplug(net)
        dense = ds.plug_in(net, norm=norm, init="uniform")(x)
    assert torch.equal(kept, host)
    assert (dense - host).abs().max() > 1e-2


def test_inner_shortcut_starts_as_the_dense_shortcut_bit_for_bit():
    net = hosts.small_net("timm_bottleneck").eval()
    x = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        plain = ds.plug_in(net)(x)
        ds.unplug(net)
        assert torch.equal(ds.plug_in(net, inner=True)(x), plain)


def test_nearest_start_without_norm_is_the_host_at_any_depth():
    torch.manual_seed(7)
    net = hosts.Net("timm_basic", (5, 4), (8, 16)).double().eval()
    hosts.randomise(net, seed=8)
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        host = net(x)
        assert_close(ds.plug_in(net, norm=None, init="nearest")(x), host, 1e-13, "output")


def test_stage_holds_its_blocks_by_position_and_runs_as_a_chain_of_steps():
    net = ds.plug_in(hosts.small_net())
    stage = net.layer1
    assert isinstance(stage, ds.DenseStage)
    assert len(stage) == 3
    assert [stage[i] for i in range(3)] == [getattr(stage, str(i)) for i in range(3)]
    x = torch.randn(2, 8, 5, 7)
    stage.eval()
    state = x
    for step in stage:
        state = step(state)
    assert torch.equal(state, stage(x))


def test_in_place_activations_leave_earlier_maps_as_they_were():
    """All maps that hooks saw in the pass equal the reference's after the pass."""
    host = nn.Sequential(hosts.make_stage("timm_basic", 4, 8, in_channels=8)).double()
    hosts.randomise(host, seed=1)
    blocks = hosts.frozen_copy(host[0])
    stage = ds.plug_in(host, norm="group")[0]
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=2)
    expected = Reference(blocks, stage, channels=8, norm="group", aggregate="stage")
    seen: list[Tensor] = []
    for k in range(4):
        stage[k].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    stage(x)
    for k, (actual, wanted) in enumerate(zip(seen, expected.maps(x)[1:], strict=True), 1):
        assert_close(actual, wanted, 1e-10, f"X_{k}")


@pytest.mark.parametrize("aggregate", ["stage", "block"])
def test_gradcheck_of_a_whole_stage(aggregate):
    torch.manual_seed(8)
    host = nn.Sequential(hosts.make_stage("timm_basic", 3, 4, in_channels=4, act_layer=SmoothAct)).double()
    hosts.randomise(host, seed=9)
    ds.plug_in(host, aggregate=aggregate, groups=2)
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=10)
    names = [name for name, _ in host.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(host, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in host.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
