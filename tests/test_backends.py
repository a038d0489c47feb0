"""Every back end of the operator against the equations, and where a pulled gradient could differ from a pushed one."""

import copy
from collections.abc import Callable

import hosts
import pytest
import torch
import torch.nn.functional as F
from hosts import Reference, assert_close
from test_stage import compare
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import ops
from dense_shortcuts.ops.backends import native

CPU_BACKENDS = ["plain", "native"]
BACKENDS = pytest.mark.parametrize("backend", CPU_BACKENDS)


@BACKENDS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["group", "batch", "layer", "instance", None])
@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
def test_each_back_end_matches_the_equations(aggregate, norm, train, backend, monkeypatch):
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", backend)
    compare("timm_basic", 4, aggregate=aggregate, norm=norm, train=train, keep_identity=norm == "layer")
    compare("tv_bottleneck", 3, aggregate=aggregate, norm=norm, train=train, dtype=torch.float32)


@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
@pytest.mark.parametrize("norm", ["group", "batch", None])
def test_gradient_of_a_gradient_matches_the_equations(norm, aggregate):
    """A gradient penalty, with ReLU: the second pass runs through what the fused backward computed."""
    host = nn.Sequential(hosts.make_stage("timm_basic", 3, 8, in_channels=6)).double()
    hosts.randomise(host, seed=1)
    blocks = hosts.frozen_copy(host[0])
    variant = {"norm": norm, "aggregate": aggregate}
    stage = ds.plug_in(host, **variant)[0]
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=2)
    expected = Reference(blocks, stage, channels=8, **variant)
    given = torch.randn(2, 6, 5, 7, dtype=torch.float64)

    def penalty(run: Callable[[Tensor], Tensor]) -> Tensor:
        x = given.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(x).square().mean(), x, create_graph=True)
        gradient.square().sum().backward()
        return x.grad

    assert_close(penalty(stage), penalty(lambda x: expected.maps(x)[-1]), 1e-10, "gradient of the input")
    wanted = expected.parameters()
    for name, parameter in stage.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_close(parameter.grad, wanted[name].grad, 1e-10, name)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) * torch.linspace(-1, 1, 5, dtype=x.dtype)).square().sum()


def full_gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss_of(net, x).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def double_net(**variant) -> tuple[nn.Module, Tensor]:
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), **variant).double().eval()
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=3)
    return net, torch.randn(2, 3, 9, 7, dtype=torch.float64)


VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"aggregate": "block"}, {"aggregate": "dense_identity"}, {"norm": None}, {"norm": "batch", "inner": True}],
    ids=str,
)


@VARIANTS
def test_gradient_of_one_parameter_alone_is_that_of_all_together(variant):
    net, x = double_net(**variant)
    expected = full_gradients(net, x)
    loss = loss_of(net, x)
    for name, p in net.named_parameters():
        (alone,) = torch.autograd.grad(loss, p, retain_graph=True)
        assert_close(alone, expected[name], 1e-12, name)


@VARIANTS
@pytest.mark.parametrize(
    "frozen",
    ["shortcut", "conv1", "layer1", "layer1.0", "layer1.1", "layer2", "layer1.shortcut.weights.1", "bn"],
)
def test_freezing_some_parameters_leaves_the_gradients_of_the_others(frozen, variant):
    net, x = double_net(**variant)
    expected = full_gradients(net, x)
    net.zero_grad()
    for name, p in net.named_parameters():
        p.requires_grad_(frozen not in name)
    loss_of(net, x).backward()
    for name, p in net.named_parameters():
        if frozen in name:
            assert p.grad is None, name
        else:
            assert_close(p.grad, expected[name], 1e-12, name)


@VARIANTS
def test_two_backward_passes_through_one_graph_add_up(variant):
    net, x = double_net(**variant)
    expected = full_gradients(net, x)
    net.zero_grad()
    loss = loss_of(net, x)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, p in net.named_parameters():
        assert_close(p.grad, 2 * expected[name], 1e-12, name)


@VARIANTS
def test_two_forward_passes_before_one_backward_add_up(variant):
    net, x = double_net(**variant)
    other = x.flip(0) + 1
    expected = [full_gradients(net, x), full_gradients(net, other)]
    net.zero_grad()
    (loss_of(net, x) + loss_of(net, other)).backward()
    for name, p in net.named_parameters():
        assert_close(p.grad, expected[0][name] + expected[1][name], 1e-12, name)


@VARIANTS
def test_no_grad_and_inference_mode_give_the_output_of_training(variant):
    net, x = double_net(**variant)
    expected = net(x)
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    with torch.inference_mode():
        assert torch.equal(net(x), expected)
    assert not net(x.clone()).isnan().any() and expected.requires_grad


class Keeping(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


class Kept(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def test_without_gradients_a_sum_is_written_over_the_branch_unless_another_may_hold_that(monkeypatch):
    over = []
    real = native.join
    monkeypatch.setattr(native, "join", lambda *given, **told: over.append(bool(told)) or real(*given, **told))
    net = ds.plug_in(hosts.small_net("timm_bottleneck")).eval()
    x, block, seen = torch.randn(2, 3, 9, 7), net.layer1[1], []
    expected = net(x).detach()
    assert not any(over)

    @torch.no_grad()
    def blocks_written() -> list[bool]:
        over.clear()
        assert torch.equal(net(x), expected)
        return over

    assert blocks_written() == [True] * 5
    handle = block.conv3.register_forward_hook(lambda module, given, result: seen.append((*given, result)))
    assert blocks_written() == [True, False, True, True, True]
    ((given, result),) = seen
    handle.remove()
    assert torch.equal(result, F.conv2d(given, block.conv3.weight))

    block.conv3.__class__ = Keeping
    assert blocks_written() == [True, False, True, True, True]
    assert torch.equal(block.conv3.seen, result)

    block.conv3.__class__ = nn.Conv2d
    block.conv3 = nn.Sequential(block.conv3, Kept())
    assert blocks_written() == [True, False, True, True, True]
    assert torch.equal(block.conv3[1].seen, result)


def test_tensors_without_data_never_reach_the_kernels():
    net = ds.plug_in(hosts.small_net("timm_bottleneck")).eval().to("meta")
    x = torch.randn(2, 3, 9, 7, device="meta")
    with torch.no_grad():
        assert net(x).shape == (2, 5)
    assert net(x).shape == (2, 5)
    map_, scales = torch.empty(2, 3, 4, 4, device="meta"), torch.ones(1, 1, 3)
    for maps, coefficients in (([map_], scales), ([torch.ones(2, 3, 4, 4)], scales.to("meta"))):
        with pytest.raises(ValueError, match="on the device meta"):
            native.join([], maps, coefficients, None, False, False)


@VARIANTS
@pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
def test_input_and_upstream_gradient_of_any_layout_are_taken(layout, variant):
    net, _ = double_net(**variant)
    stage, base = net.layer1, torch.randn(3, 8, 10, 14, dtype=torch.float64)
    x = {
        "expanded": base[:1].expand(3, 8, 10, 14),
        "sliced": base[:, :, ::2, 1::3],
        "transposed": base.transpose(2, 3),
    }[layout]
    results = []
    for given in (x, x.contiguous()):
        leaf = given.detach().requires_grad_()
        stage.zero_grad()
        y = stage(leaf)
        y.backward(torch.ones((), dtype=torch.float64).expand_as(y))
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in stage.parameters())])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-12, "number")


@pytest.mark.parametrize(
    "variant", [{}, {"aggregate": "block", "norm": "batch"}, {"aggregate": "dense_identity"}], ids=str
)
def test_a_float32_map_beside_bf16_branches_is_as_exact_in_each_back_end(variant, monkeypatch):
    """Under autocast X_0 may be the stage's float32 input, while the branches are in bf16."""
    host = nn.Sequential(hosts.make_stage("timm_basic", 3, 16, in_channels=16))
    hosts.randomise(host, seed=1)
    stage = ds.plug_in(host, **variant)[0].eval()
    given, upstream = torch.randn(2, 16, 9, 7), torch.randn(2, 16, 9, 7)

    def numbers(stage: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
        stage.zero_grad()
        x = x.clone().requires_grad_()
        y = stage(x)
        (y.to(upstream.dtype) * upstream).sum().backward()
        assert x.grad.dtype == x.dtype
        return [y.detach(), x.grad, torch.cat([p.grad.flatten() for p in stage.parameters()])]

    exact = numbers(copy.deepcopy(stage).double(), given.double(), upstream.double())
    errors = {}
    for backend in CPU_BACKENDS:
        monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = numbers(stage, given, upstream)
        assert found[0].dtype == torch.bfloat16
        errors[backend] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    for backend in ("native",):
        for ours, plain in zip(errors[backend], errors["plain"], strict=True):
            assert ours < 2 * plain + 0.02, errors  # ReLUs flip in bf16


class CalledGroupNorm(nn.GroupNorm):
    """A norm whose affine form nobody knows, for it is another class: it is called as it stands."""


def plugged_by_factory(factory: Callable[[int], nn.Module], backend: str) -> nn.Module:
    torch.manual_seed(4)
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), norm=factory, backend=backend)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=5)
    return net


@BACKENDS
def test_a_norm_that_is_called_gives_what_its_affine_form_gives(backend):
    """Maps as they are beside a branch whose last norm joins the sum; the factory's norms have parameters."""
    x, results = torch.randn(2, 3, 9, 7, dtype=torch.float64), []
    for cls in (nn.GroupNorm, CalledGroupNorm):
        net = plugged_by_factory(lambda channels, cls=cls: cls(2, channels), backend).double()
        results.append({"output": net(x).detach(), **full_gradients(net, x)})
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-9, name)


@BACKENDS
@pytest.mark.parametrize("cls", [nn.GroupNorm, CalledGroupNorm])
def test_norms_of_a_factory_follow_pytorchs_rules_under_autocast(cls, backend):
    """Statistics in float32 whatever the map, and a result as near to float32 as bf16 maps allow."""
    net = plugged_by_factory(lambda channels: cls(2, channels), backend)
    x, seen = torch.randn(4, 3, 9, 7), []
    exact = net(x)
    for norm in net.layer1.shortcut.norms:
        norm.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
        rule = F.group_norm(x.bfloat16()[:, :2], 2).dtype
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    if cls is CalledGroupNorm:
        assert len(seen) == 3 and all(out == rule for _, out in seen)


@pytest.mark.parametrize("kind", ["timm_basic", "tv_bottleneck"])
def test_hooks_on_activations_fire_and_change_no_number(kind):
    net = ds.plug_in(hosts.small_net(kind)).double().eval()
    x, fired = torch.randn(2, 3, 9, 7, dtype=torch.float64), []
    expected, output = full_gradients(net, x), net(x)
    last = net.layer1[1].act2 if kind == "timm_basic" else net.layer1[1].relu
    last.inplace = False  # PyTorch allows no backward hook on a module that works in place
    last.register_forward_hook(lambda module, args, out: fired.append(out.detach().clone()))
    last.register_full_backward_hook(lambda module, gin, gout: fired.append(gout[0].clone()))
    actual = full_gradients(net, x)
    assert torch.equal(net(x), output)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-12, name)
    calls = 1 if kind == "timm_basic" else 3
    assert len(fired) == 2 * calls + calls  # forward and backward of one pass, forward of another


def test_changing_the_activation_after_plugging_is_seen():
    net = ds.plug_in(hosts.small_net(), norm="group").double().eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    before = net(x)
    for block in net.layer1.blocks:
        block.act2 = nn.SiLU()
    changed = net(x)
    assert not torch.allclose(before, changed)
    blocks = [copy.deepcopy(b) for b in net.layer1.blocks]
    expected = Reference(blocks, net.layer1, channels=8, norm="group", aggregate="stage")
    stem = net.relu(net.bn1(net.conv1(x)))
    assert_close(net.layer1(stem), expected.maps(stem)[-1], 1e-10, "layer1")


def test_the_back_end_runs_that_is_named_and_another_name_is_refused(monkeypatch):
    calls = []
    real = native.join
    monkeypatch.setattr(native, "join", lambda *a: calls.append(1) or real(*a))
    net, x = ds.plug_in(hosts.small_net()), torch.randn(2, 3, 9, 7)
    for backend, launched in (("plain", 0), ("native", 5)):
        calls.clear()
        monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", backend)
        net(x)
        assert len(calls) == launched
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "fast")
    with pytest.raises(ds.DenseShortcutError, match="'fast'"):
        net(x)
    monkeypatch.delenv("DENSE_SHORTCUTS_BACKEND")
    with pytest.raises(ds.DenseShortcutError, match="'triton'"):
        ops.choose(x, "triton")


def test_a_stage_run_in_part_without_gradients_is_refused_and_never_trains_half():
    stage, x = ds.plug_in(hosts.small_net()).layer1, torch.randn(2, 8, 5, 7)
    steps = list(stage)
    with torch.no_grad():
        state = steps[0](x)
    with pytest.raises(ds.DenseShortcutError, match="without gradients"):
        steps[1](state)


def test_an_empty_batch_passes_in_evaluation_mode():
    net = ds.plug_in(hosts.small_net()).eval()
    assert net(torch.randn(0, 3, 9, 7)).shape == (0, 5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "variant",
    [{}, {"norm": "batch"}, {"norm": "instance", "aggregate": "block"}, {"aggregate": "dense_identity"}],
    ids=str,
)
def test_the_triton_back_end_matches_the_equations_in_the_interpreter(variant, train, monkeypatch):
    """The same kernels as on a GPU; conftest.py has them in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU in this process")
    from dense_shortcuts.ops.backends import triton

    calls, real = [], triton.join
    monkeypatch.setattr(triton, "join", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "triton")
    compare("timm_basic", 3, train=train, shape=(2, 6, 3, 2), **variant)
    assert len(calls) == (3 if train else 6)  # in evaluation mode without gradients too


def test_a_deep_stage_in_tiles_by_triton_matches_the_plain_form(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU in this process")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = {}
    for backend in ("plain", "triton"):
        torch.manual_seed(0)
        stage = nn.Sequential(hosts.make_stage("timm_basic", 12, 4, in_channels=4))
        ds.plug_in(stage, groups=2, backend=backend).double()
        hosts.randomise_parameters(ds.shortcut_parameters(stage), seed=1)
        x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        y = stage(x)
        y.square().sum().backward()
        with torch.no_grad():
            inferred = stage.eval()(x)
        found[backend] = [y.detach(), inferred, x.grad, *(p.grad for p in stage.parameters())]
    for ours, theirs in zip(found["triton"], found["plain"], strict=True):
        assert_close(ours, theirs, 1e-9, "number")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_on_a_gpu_the_triton_back_end_runs_by_itself_and_matches_the_plain_form(norm, depth):
    found = {}
    for backend in ("plain", "auto"):
        torch.manual_seed(0)
        stage = nn.Sequential(hosts.make_stage("timm_basic", depth, 32, in_channels=32))
        ds.plug_in(stage, norm=norm, backend=backend).double().cuda()
        assert ops.choose(torch.empty(1, device="cuda"), backend) == {"plain": "plain", "auto": "triton"}[backend]
        hosts.randomise_parameters(ds.shortcut_parameters(stage), seed=1)
        x = torch.randn(2, 32, 14, 9, dtype=torch.float64).cuda().requires_grad_()
        stage(x).square().sum().backward()
        found[backend] = [x.grad, *(p.grad for p in stage.parameters())]
    for ours, theirs in zip(found["auto"], found["plain"], strict=True):
        assert_close(ours.cpu(), theirs.cpu(), 1e-9, "number")
