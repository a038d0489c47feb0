"""The fused operator against the plain one: forward and every gradient, all back ends, odd shapes and dtypes."""

import pytest
import timm
import torch
from torch import Tensor

import dense_shortcuts as ds
from dense_shortcuts import ops
from dense_shortcuts.ops import cpu, fused, reference


def maps(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("piece_bytes", [1, 2**21])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (1, 1, 1, 1), (4, 6, 3, 3), (0, 3, 2, 2)])
@pytest.mark.parametrize("rows", ["one", "each"])
def test_cpu_kernels_match_the_plain_form(shape, rows, dtype, tolerance, channels_last, piece_bytes, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE_BYTES", piece_bytes)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    branch, *earlier = (x.contiguous(memory_format=layout) for x in maps(4, shape, dtype))
    n = 1 if rows == "one" else shape[0]
    wide = ops.accumulation_dtype(dtype)
    scales, bias = torch.randn(3, n, shape[1], dtype=wide), torch.randn(n, shape[1], dtype=wide)

    y, mean, var = cpu.join(branch, earlier, scales, bias, True, True)
    expected = torch.relu(reference.dense_sum(branch, earlier, scales, bias))
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((mean, var), reference.moments(y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    grad, *later = (x.contiguous(memory_format=layout) for x in maps(3, shape, dtype, seed=1))
    offset, slope = torch.randn(2, shape[0], shape[1], dtype=wide)
    arguments = (y, grad, offset, slope, later, list(torch.randn(2, n, shape[1], dtype=wide)), earlier, n, True)
    for ours, theirs in zip(cpu.pull(*arguments), reference.pull(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1, shape[2] * shape[3]))
    if shape[0] and shape[1] > 1:
        assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("later", [0, 2])
@pytest.mark.parametrize("statistics", [False, True])
def test_the_registered_operators_pass_opcheck(later, statistics):
    branch, x = (t.requires_grad_() for t in maps(2, (2, 3, 4, 2), torch.float32))
    links = [torch.zeros(1).expand(x.shape).requires_grad_(), torch.zeros(1).expand(2, 3).requires_grad_()]
    scales, bias = torch.randn(1, 2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(fused.join, (branch, [x], links, scales, bias, True, statistics, later, "cpu"))
    torch.library.opcheck(fused.enter, (branch, statistics, later, 2, "cpu"))


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 31, 32, 33, 37, 64])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_back_ends_agree_at_every_depth(norm, depth):
    grads = {}
    for backend in ("plain", "cpu"):
        torch.manual_seed(3)
        net = timm.create_model("resnet18", layers=(depth, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2)
        ds.plug_in(net, norm=norm, groups=2 if norm == "group" else None, backend=backend).double()
        for _, weight in ds.shortcut_parameters(net):
            torch.nn.init.normal_(weight, std=0.3)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        y = net(x)
        y.square().sum().backward()
        grads[backend] = [y.detach(), x.grad, *(p.grad for p in net.parameters())]
    for ours, theirs in zip(grads["cpu"], grads["plain"], strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert (ours - theirs).abs().max().item() <= 1e-9 * scale


def test_the_cpu_kernels_run_by_default_and_a_named_back_end_is_kept(monkeypatch):
    calls = []
    real = cpu.join
    monkeypatch.setattr(cpu, "join", lambda *args: calls.append(1) or real(*args))
    x = torch.randn(2, 3, 64, 64)
    ds.plug_in(timm.create_model("resnet18"))(x)
    assert len(calls) == 8
    ds.plug_in(timm.create_model("resnet18"), backend="plain")(x)
    assert len(calls) == 8
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "plain")
    ds.plug_in(timm.create_model("resnet18"))(x)
    assert len(calls) == 8


def test_an_unknown_back_end_is_refused_and_the_network_left_alone():
    net = timm.create_model("resnet18")
    with pytest.raises(ds.DenseShortcutError, match="unknown back end 'fast'"):
        ds.plug_in(net, backend="fast")
    assert not ds.dense_stages(net)
    with pytest.raises(ds.DenseShortcutError, match="cannot run on cuda"):
        _on_cuda()


def _on_cuda() -> None:
    class Elsewhere:
        device = torch.device("cuda")

    ops.choose(Elsewhere(), "cpu")


def test_a_stage_run_in_part_without_gradients_is_refused():
    stage = ds.plug_in(timm.create_model("resnet18")).layer1
    first, second = stage
    with torch.no_grad():
        state = first(torch.randn(1, 64, 4, 4))
    with pytest.raises(ds.DenseShortcutError, match="use_reentrant=False"):
        second(state)


def test_a_hooked_block_gets_the_whole_gradient_of_its_map():
    """Where a map's statistics are made in one pass with it, later gradients do not come to the map itself."""
    seen = {}
    for backend in ("plain", "cpu"):
        torch.manual_seed(5)
        net = ds.plug_in(timm.create_model("resnet34", num_classes=2, zero_init_last=False), backend=backend).double()
        for _, weight in ds.shortcut_parameters(net):
            torch.nn.init.normal_(weight)
        net.layer2[1].register_forward_hook(
            lambda module, args, out, backend=backend: (
                out.register_hook(lambda g: seen.__setitem__(backend, g)) and None
            )
        )
        net(torch.randn(3, 3, 96, 96, dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close(seen["cpu"], seen["plain"], rtol=1e-7, atol=1e-9)
