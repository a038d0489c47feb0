"""The operation by itself: sums of scaled maps and their gradients, by every back end, against loops and each other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.ops import accumulation_dtype, dense_add

BACKENDS = ["plain", "native", "triton"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's kernels as defined by conftest.py, in its interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("maps", [1, 2, 3, 8, 31, 32, 33, 37, 64])
def test_a_sum_equals_a_loop_over_maps_samples_and_channels(maps, with_bias, per_sample, backend):
    n, c = 2, 3
    lead = n if per_sample else 1
    tensors = [torch.randn(n, c, 3, 2, dtype=torch.float64) for _ in range(maps + 1)]
    scales = torch.randn(maps, lead, c, dtype=torch.float64)
    bias = torch.randn(lead, c, dtype=torch.float64) if with_bias else None
    leaves = [t.requires_grad_() for t in (*tensors, scales, *([bias] if with_bias else []))]

    branch, xs = tensors[0], tensors[1:]
    y = dense_add([branch], xs, scales, bias, backend=backend)
    rows = []
    for b in range(n):
        for ch in range(c):
            s = b if per_sample else 0
            total = branch[b, ch] + (bias[s, ch] if with_bias else 0.0)
            for i in range(maps):
                total = total + scales[i, s, ch] * xs[i][b, ch]
            rows.append(total)
    wanted = torch.stack(rows).reshape(n, c, 3, 2)
    assert_close(y, wanted, 1e-12, "sum")
    upstream = torch.randn_like(wanted)
    actual = torch.autograd.grad(y, leaves, upstream)
    expected = torch.autograd.grad(wanted, leaves, upstream)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, 1e-12, f"gradient {k}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True), F.gelu, nn.SiLU(), None])
def test_an_activation_follows_the_sum(activation, backend):
    xs = [torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scales = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    y = dense_add(xs[:1], xs[1:], scales, activation=activation, backend=backend)
    total = xs[0] + sum(a[:, :, None, None] * x for a, x in zip(scales, xs[1:], strict=True))
    wanted = total if activation is None else activation(total.clone())
    assert_close(y, wanted, 1e-12, "sum")
    for a, e in zip(*(torch.autograd.grad(t.square().sum(), [*xs, scales]) for t in (y, wanted)), strict=True):
        assert_close(a, e, 1e-12, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_scales_the_maps_are_added_as_they_are_and_nothing_is_written_into_them(backend):
    tensors = [torch.randn(2, 3, 4, 5) for _ in range(4)]
    before = [t.clone() for t in tensors]
    y = dense_add(tensors[:1], tensors[1:], backend=backend)
    torch.testing.assert_close(y, tensors[0] + tensors[1] + tensors[2] + tensors[3])
    y.add_(1.0)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    bias = torch.randn(2, 3)
    y = dense_add([], tensors, None, bias, backend=backend)
    torch.testing.assert_close(y, sum(tensors) + bias[:, :, None, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_of_half_precision_maps_is_kept_in_float32(dtype, backend):
    """64 additions in half precision would lose a percent; one rounding at the end loses less than 2^-7."""
    xs = [torch.rand(1, 2, 5, 3).to(dtype) for _ in range(65)]
    y = dense_add(xs[:1], xs[1:], torch.ones(64, 1, 2), backend=backend)
    wanted = torch.stack(xs).double().sum(0)
    assert y.dtype == dtype
    assert ((y.double() - wanted).abs() / wanted).max() <= 2**-7  # Triton's interpreter rounds bfloat16 towards zero


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same numbers in another order in memory, or with gaps."""
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "images inside":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x


LAYOUTS = ["contiguous", "channels_last", "transposed", "images inside", "sliced"]
SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    addends=st.integers(0, 2),
    per_sample=st.booleans(),
    relu=st.booleans(),
    recorded=st.booleans(),
)
def test_back_ends_agree_for_any_shape_layout_and_dtype(shape, layouts, dtype, addends, per_sample, relu, recorded):
    generator = torch.Generator().manual_seed(sum(shape))

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [laid_out(numbers(*shape), how) for how in layouts]
    count = len(tensors) - min(addends, len(tensors) - 1)
    rows = shape[0] if per_sample else 1
    wide = accumulation_dtype(dtype)
    scales, bias = numbers(count, rows, shape[1]).to(wide), numbers(rows, shape[1]).to(wide)
    upstream, results = numbers(*shape), {}
    for backend in ("plain", "native"):
        leaves = [t.detach().requires_grad_(recorded) for t in (*tensors, scales, bias)]
        given_maps, (a, b) = leaves[:-2], leaves[-2:]
        y = dense_add(
            given_maps[count:], given_maps[:count], a, b, activation=F.relu if relu else None, backend=backend
        )
        results[backend] = [y, *(torch.autograd.grad(y, leaves, upstream) if recorded else [])]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, wanted in zip(results["native"], results["plain"], strict=True):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * 10)


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"addends": [torch.ones(2, 3, 4, 4)], "maps": [torch.ones(2, 3, 4, 5)]}, "one shape"),
    ({"addends": [], "maps": [torch.ones(2, 3, 4)]}, "one shape"),
    ({"addends": [], "maps": [torch.ones(2, 3, 4, 4)], "scales": torch.ones(2, 1, 3)}, "(1, 1 or N, C)"),
    ({"addends": [], "maps": [torch.ones(2, 3, 4, 4)], "scales": torch.ones(1, 1, 4)}, "(1, 1 or N, C)"),
    ({"addends": [], "maps": [torch.ones(2, 3, 4, 4)], "bias": torch.ones(3, 3)}, "(1 or N, C)"),
]


@pytest.mark.parametrize(("given_", "named"), FAULTY, ids=[named for _, named in FAULTY])
def test_shapes_that_do_not_go_together_are_refused(given_, named):
    with pytest.raises(ValueError) as error:
        dense_add(**given_)
    assert named in str(error.value)


def test_the_back_end_is_the_one_that_is_named(monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(DenseShortcutError, match="'fast'"):
        dense_add([x], [x], backend="fast")
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "slow")
    with pytest.raises(DenseShortcutError, match="'slow'"):
        dense_add([x], [x])


def test_it_compiles_to_one_graph():
    xs = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    scales = torch.randn(2, 2, 3)
    compiled = torch.compile(
        lambda: dense_add(xs[:1], xs[1:], scales, activation=F.relu), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(), dense_add(xs[:1], xs[1:], scales, activation=F.relu))
