"""The arithmetic per channel in Triton against `ops.forms`, and how many launches a block takes with it.

On a GPU, or without one in Triton's interpreter (see conftest.py). test_triton.py compiles these kernels too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dense_shortcuts.ops import BATCH, NONE, RAW, forms, fused, joining
from dense_shortcuts.ops.sums import Sum

triton_forms = pytest.importorskip("dense_shortcuts.ops.triton_forms", reason="triton is not installed")
from dense_shortcuts.ops import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-5}
# Parameters of another dtype than the statistics (the interpreter cannot turn bfloat16 into float64).
NARROW = {torch.float64: torch.float32, torch.float32: torch.bfloat16}
EPS, OUTER_EPS = 1e-3, 1e-5  # in float32 1e-5 is another number than in float64
SIZES = [(1, 1, 1), (1, 6, 3), (3, 33, 11), (2, 70, 1), (5, 48, 48), (3, 1200, 1), (41, 9, BATCH), (1, 50, BATCH)]


# What takes no launch: these make tensors without numbers, or other views of the same.
FREE = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "promote_types"),
    *("view", "_unsafe_view", "expand", "unbind", "select", "slice", "t", "transpose", "permute", "detach", "alias"),
    *("unsqueeze", "squeeze", "split", "as_strided"),
}


class Noted(TorchDispatchMode):
    """Notes the names of PyTorch's leaf operators as they run, views left out."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ not in FREE:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class NotedKernel:
    """Notes the name of a Triton kernel as it is launched."""

    def __init__(self, name: str, kernel: Any, seen: list[str]) -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.seen.append(self.name)
            with _disable_current_modes():  # the interpreter copies its arguments
                self.kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """What ran under `Noted(launches)`: PyTorch's operators, views left out, and Triton's kernels, in order."""
    seen: list[str] = []
    for module in (kernels, triton_forms):
        for name in [n for n in dir(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NotedKernel(name, getattr(module, name), seen))
    return seen


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    """Equal, tensor by tensor and list by list, relative to the largest number."""
    assert type(ours) is type(theirs)
    if not isinstance(ours, Tensor):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, tolerance)
        return
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    if ours.numel():
        largest = max(1.0, theirs.double().abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


def affine(kind: str, channels: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    match kind:
        case "both":
            return numbers(channels, dtype=dtype), numbers(channels, dtype=dtype)
        case "narrow":
            return numbers(channels, dtype=NARROW[dtype]), numbers(channels, dtype=NARROW[dtype])
        case "weight":
            return numbers(channels, dtype=dtype), None
        case "bias":
            return None, numbers(channels, dtype=dtype)
    return None, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "both", "weight", "bias", "narrow"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_form_and_its_gradient_match_pytorch(size, kind, dtype):
    images, channels, groups = size
    weight, bias = affine(kind, channels, dtype)
    mean, var = 3 + numbers(images, channels, dtype=dtype), numbers(images, channels, dtype=dtype).square()
    found = forms.form(mean, var, groups, EPS, weight, bias)
    assert_same(triton_forms.form(mean, var, groups, EPS, weight, bias), found, DTYPES[dtype])
    grads = numbers(2, *found[0].shape, dtype=dtype).unbind()
    given = (*found[2:], groups, EPS, weight, *grads, 7 * channels)
    assert_same(triton_forms.form_backward(*given), forms.form_backward(*given), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "both", "weight", "bias", "narrow"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nested_form_and_its_gradient_match_pytorch(size, kind, dtype):
    images, channels, groups = size
    given = (
        3 + numbers(images, channels, dtype=dtype),
        numbers(images, channels, dtype=dtype).square() + 0.1,
        *affine(kind, channels, dtype),
    )
    settings = (EPS, groups, OUTER_EPS)
    found = forms.nested_form(*given, *settings)
    assert_same(triton_forms.nested_form(*given, *settings), found, DTYPES[dtype])
    grads = numbers(2, *found[0].shape, dtype=dtype).unbind()
    arguments = (*given, found[2:], grads, *settings)
    ours, theirs = (module.nested_form_backward(*arguments) for module in (triton_forms, forms))
    # Terms that cancel leave gradients smaller than their errors: instance norm undoes the scale of the norm within.
    exact = forms.nested_form_backward(*(in_float64(argument) for argument in arguments))
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, their_error = ((t.double() - right).abs().max().item() for t in (a, b))
        assert error <= 4 * their_error + 50 * DTYPES[dtype] * max(1.0, right.abs().max().item())


def in_float64(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double()
    return [in_float64(t) for t in x] if isinstance(x, list | tuple) else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_branch", [False, True], ids=["no branch", "branch"])
@pytest.mark.parametrize("kind", ["same", "narrow", "strided"])
@pytest.mark.parametrize(("images", "channels"), [(1, 1), (3, 33), (37, 5), (2, 1030)])
def test_coefficients_and_their_gradients_match_pytorch(images, channels, kind, has_branch, dtype):
    for maps, first in ((1, 0), (1, 1), (3, 0), (5, 3)):
        compare_coefficients(maps, first, images, channels, kind, has_branch, dtype)


@pytest.mark.parametrize("has_branch", [False, True], ids=["no branch", "branch"])
@pytest.mark.parametrize(("maps", "first"), [(64, 3), (65, 65), (70, 0), (70, 66), (130, 60)])
def test_coefficients_of_more_maps_than_a_launch_takes_match_pytorch(maps, first, has_branch):
    compare_coefficients(maps, first, 2, 5, "same", has_branch, torch.float64)


def compare_coefficients(
    maps: int, first: int, images: int, channels: int, kind: str, has_branch: bool, dtype: torch.dtype
) -> None:
    weight = numbers(maps, channels, dtype=NARROW[dtype] if kind == "narrow" else dtype)
    columns = numbers(2, maps, channels, images, dtype=dtype).transpose(2, 3)
    rates, shifts = ([x if kind == "strided" else x.contiguous() for x in column] for column in columns)
    branch = numbers(2, 1, channels, dtype=dtype).unbind() if has_branch else None
    found = forms.coefficients(weight, rates, shifts, first, branch)
    assert_same(triton_forms.coefficients(weight, rates, shifts, first, branch), found, DTYPES[dtype])
    grads = [numbers(*t.shape, dtype=dtype) for t in found]
    given = (weight, rates, shifts, first, has_branch, *grads)
    ours, theirs = triton_forms.coefficients_backward(*given), forms.coefficients_backward(*given)
    # The interpreter rounds bfloat16 towards zero, and float64 to float32 by one unit either way.
    last_place = {torch.bfloat16: 2**-7, torch.float32: 2**-22}.get(weight.dtype, 0.0)
    assert_same(ours[0], theirs[0], max(last_place, DTYPES[dtype]))
    assert_same(ours[1:], theirs[1:], DTYPES[dtype])


@pytest.mark.parametrize("channels", [1, 33, 300])
def test_running_statistics_move_and_are_used_as_by_pytorch(channels, launches):
    running, found = numbers(2, channels, dtype=torch.float32).abs(), numbers(2, 1, channels, dtype=torch.float32).abs()
    weight, bias = numbers(2, channels, dtype=torch.float32).unbind()
    ours, theirs = running.clone(), running.clone()
    for moved, backend in ((ours, "triton"), (theirs, "plain")):
        joining.move(moved.unbind(), found.unbind(), 1.25, 0.1, backend)
    assert_same(ours, theirs, 1e-6)
    for affine in ((weight, bias), (None, bias), (None, None)):
        pair = [joining.running_form(*theirs, 1e-3, *affine, backend) for backend in ("triton", "plain")]
        assert_same(*pair, 1e-6)
    assert launches == ["_move_kernel", *["_form_kernel"] * 3]


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_one_result_of_a_nested_form_may_go_unused(backend, missing):
    mean, var = numbers(3, 6).requires_grad_(), numbers(3, 6).square().requires_grad_()
    given = (mean, var, None, None, EPS, 2, EPS)
    used = numbers(3, 6)
    ours, theirs = joining.nested_form(*given, backend), forms.nested_form(*given)
    grads = [torch.autograd.grad((found[missing] * used).sum(), (mean, var)) for found in (ours, theirs)]
    assert_same(*grads, 1e-10)


@pytest.mark.parametrize("groups", [BATCH, 2])
def test_two_runs_are_bit_equal(groups):
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        mean, var = numbers(40, 12, dtype=torch.float32), numbers(40, 12, dtype=torch.float32).square()
        found = triton_forms.nested_form(mean, var, None, None, EPS, groups, EPS)
        to = triton_forms.nested_form_backward(mean, var, None, None, found[2:], found[:2], EPS, groups, EPS)
        back = triton_forms.coefficients_backward(mean[:1], [mean], [var], 0, True, torch.stack([mean, var]), var)
        return [*found, *to, back[0], *back[1], *back[2], *back[3:]]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("size", [(5, 3), (40, 17)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(
    ("groups", "form", "forwards", "backwards"),
    [(2, "batch", 7, 7), (BATCH, "batch", 7, 7), (2, "fixed", 4, 6), (2, "addend", 4, 5)],
)
def test_a_block_takes_few_launches(groups, form, forwards, backwards, size, launches):
    """Of PyTorch's operators it took 28 and more forwards and 54 and more backwards for a branch with a batch norm."""
    maps = [numbers(2, 6, *size, dtype=torch.float32) for _ in range(6)]
    branch, x, y_grad, *earlier = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    rows = 1 if groups == BATCH else 2
    rates, shifts = ([numbers(rows, 6, dtype=torch.float32) for _ in range(3)] for _ in range(2))
    norm = [numbers(6, dtype=torch.float32), numbers(6, dtype=torch.float32)] if form == "batch" else []
    fixed = [numbers(1, 6, dtype=torch.float32), numbers(1, 6, dtype=torch.float32)] if form == "fixed" else []
    head = ([branch], None) if form == "addend" else ([], branch)
    weight = numbers(3, 6, dtype=torch.float32)
    given = Sum(*head, norm, fixed, EPS, earlier, weight, rates, shifts, True, groups, EPS)
    with Noted(launches):
        y, own, theirs = fused.run_block(given, "triton")
    assert len(launches) <= forwards
    launches.clear()
    back = (y_grad, *own[:2], [x, branch], [rates[0], rates[1]], theirs)
    with Noted(launches):
        fused.run_pull_block(y, own, *back, *given[1:], "triton")
    assert len(launches) <= backwards


@pytest.mark.parametrize("groups", [NONE, RAW, BATCH, 1, 3])
@pytest.mark.parametrize("form", ["addend", "batch", "fixed"])
def test_a_block_by_triton_matches_one_by_plain_pytorch(form, groups):
    branch, *maps = [numbers(2, 6, 5, 3) for _ in range(6)]
    rows = 1 if groups == BATCH else 2
    rates, shifts = ([numbers(rows, 6) for _ in range(3)] for _ in range(2))
    norm, fixed = [numbers(6), numbers(6)] if form == "batch" else [], []
    if form == "fixed":
        fixed = [numbers(1, 6), numbers(1, 6)]
    head = ([branch], None) if form == "addend" else ([], branch)
    for first in (0, 2):
        given = Sum(*head, norm, fixed, EPS, maps[first:3], numbers(3, 6), rates, shifts, True, groups, EPS)
        y, own, theirs = fused.run_block(given, "triton")
        expected = (
            fused.run_block(given, "cpu")
            if DEVICE == "cpu"
            else fused._block_by_parts(fused.reference, given, None, "plain")
        )
        assert_same([y, own, theirs], [*expected], 1e-11)
        grads = (None, None) if groups == NONE else (numbers(*own[0].shape), numbers(*own[1].shape))
        back = (maps[3], *grads, maps[3:5], [numbers(rows, 6), numbers(rows, 6)], theirs)
        ours, wanted = (fused.run_pull_block(y, own, *back, *given[1:], b) for b in ("triton", "plain"))
        assert_same(ours, wanted, 1e-10)
