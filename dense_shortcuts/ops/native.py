"""The kernels on the CPU, compiled (`compiled.py`), as functions of tensors.

Each map is read from memory once and each output written once, by as many threads as PyTorch uses. Maps are taken
channels_last or contiguous, in float32, float64, bfloat16 and (where the compiler knows it) float16, mixed if need be.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .compiled import (
    KINDS,
    Form,
    Map,
    Nested,
    PairGradients,
    Pairs,
    Pull,
    Through,
    address_of,
    is_last,
    kernel,
    shape_of,
    threads,
)
from .forms import BATCH, NONE, RAW, RUNNING, unnormalised_scales
from .reference import accumulation_dtype


class _Given:
    """What a compiled function is given, in the layout and accumulation type of one map; kept until it returns."""

    def __init__(self, first: Tensor) -> None:
        self.layout = torch.channels_last if is_last(first) else torch.contiguous_format
        self.dtype = accumulation_dtype(first.dtype)
        self.kept: list[object] = []

    def map(self, x: Tensor) -> Map:
        x = x.contiguous(memory_format=self.layout)
        self.kept.append(x)
        return Map(x.data_ptr(), KINDS[x.dtype])

    def maps(self, maps: Sequence[Tensor]) -> int:
        return self._table((Map * len(maps))(*[self.map(x) for x in maps]))

    def numbers(self, x: Tensor | None) -> int | None:
        return address_of(x, self.dtype, self.kept)

    def tables(self, tensors: Sequence[Tensor]) -> int:
        return self._table((ctypes.c_void_p * len(tensors))(*[self.numbers(t) for t in tensors]))

    def integers(self, values: Sequence[int]) -> int:
        return self._table((ctypes.c_int64 * len(values))(*values))

    def _table(self, table: "ctypes.Array[Any]") -> int:
        self.kept.append(table)
        return ctypes.addressof(table)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.moments`."""
    mean, var, _, _ = enter(x, RAW, 0.0)
    return mean, var


def enter(x: Tensor, groups: int, eps: float) -> list[Tensor]:
    """The statistics of a map as `fused.enter` has them: rate, shift, pooled mean and variance."""
    x = _standard(x)
    found = _new_statistics(x, groups)
    if groups != NONE:
        form = Form(groups, eps, None, None, *[t.data_ptr() for t in found])
        _call("enter", x, shape_of(x), _Given(x).map(x), form, None)
    return found


def _new_statistics(x: Tensor, groups: int) -> list[Tensor]:
    """Room for rate, shift, pooled mean and variance of a norm of x."""
    (n, c), dtype = x.shape[:2], accumulation_dtype(x.dtype)
    if groups > 0 and c % groups:
        raise ValueError(f"a norm of {groups} groups was given a map of {c} channels, which they do not divide")
    form = (0,) if groups == NONE else (1, c) if groups == BATCH else (n, c)
    pooled = (0,) if groups in (NONE, RAW) else (1, c) if groups == BATCH else (n, groups)
    return [x.new_empty(shape, dtype=dtype) for shape in (form, form, pooled, pooled)]


def join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.join`."""
    first = _standard((*addends, *maps)[0])
    given = _Given(first)
    pairs = _given_scales(given, maps, scales, bias)
    y, found = _run_block(given, first, addends, None, pairs, relu, RAW if statistics else NONE, 0.0, out)
    return y, found[0], found[1]


def block(
    addends: Sequence[Tensor],
    branch: Tensor | None,
    affine: Sequence[Tensor],
    fixed: Sequence[Tensor],
    branch_eps: float,
    maps: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    relu: bool,
    groups: int,
    eps: float,
    out: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`fused.run_block` at one go: y, the statistics of its norm, and those of the branch's norm unless it is fixed."""
    summed = maps if branch is None else [branch, *maps]
    first = _standard((*addends, *summed)[0])
    given = _Given(first)
    norm, found = None, []
    if branch is not None and not fixed:
        found = _new_statistics(branch, BATCH)
        norm = Form(BATCH, branch_eps, *_pair(given, affine), *[t.data_ptr() for t in found])
    if rates:
        pairs = _paired(given, summed, weight, rates, shifts, fixed or found[:2])
    else:
        pairs = _given_scales(given, summed, unnormalised_scales(weight, maps, first), None)
    y, own = _run_block(given, first, addends, norm, pairs, relu, groups, eps, out)
    return y, own, found


def _pair(given: _Given, tensors: Sequence[Tensor]) -> tuple[int | None, int | None]:
    return (given.numbers(tensors[0]), given.numbers(tensors[1])) if tensors else (None, None)


def _given_scales(given: _Given, maps: Sequence[Tensor], scales: Tensor, bias: Tensor | None) -> Pairs:
    """The terms of a sum whose scales are known."""
    return Pairs(
        maps=given.maps(maps),
        count=len(maps),
        rows=scales.shape[1],
        scales=given.numbers(scales),
        bias=given.numbers(bias),
    )


def _paired(
    given: _Given,
    summed: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    branch: Sequence[Tensor],
) -> Pairs:
    """The terms of a sum whose scales and bias are to be made: the branch, if it has rate and shift, and maps."""
    return Pairs(
        given.maps(summed),
        len(summed),
        len(branch) > 0,
        given.numbers(weight),
        len(rates),
        given.tables(rates),
        given.tables(shifts),
        *_pair(given, branch),
        rates[0].shape[0],
    )


def _run_block(
    given: _Given,
    first: Tensor,
    addends: Sequence[Tensor],
    norm: Form | None,
    pairs: Pairs,
    relu: bool,
    groups: int,
    eps: float,
    out: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    y = first if out is first else torch.empty_like(first)
    found = _new_statistics(y, groups)
    own = Form(groups, eps, None, None, *[t.data_ptr() for t in found])
    terms = (given.maps(addends), len(addends), norm, pairs)
    _call("block", first, shape_of(first), *terms, relu, y.data_ptr(), KINDS[y.dtype], own)
    return y, found


def pull(
    x: Tensor,
    grad: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    maps: Sequence[Tensor],
    rows: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pull`."""
    x = _standard(x)
    given = _Given(x)
    own = Through()
    if offset is not None:
        own = Through(rows=offset.shape[0], offset=given.numbers(offset), slope=given.numbers(slope))
    pulled = torch.empty_like(x)
    scales = x.new_empty((len(maps), rows, x.shape[1]), dtype=given.dtype)
    bias = x.new_empty((rows, x.shape[1]), dtype=given.dtype)
    told = _pull(given, x, grad, own, later_grads, later_scales, relu, pulled)
    sums = (given.maps(maps), len(maps), rows, scales.data_ptr(), bias.data_ptr())
    _call("pull", x, shape_of(x), told, *sums)
    return pulled, scales, bias


def _pull(
    given: _Given,
    x: Tensor,
    grad: Tensor | None,
    own: Through,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    relu: bool,
    out: Tensor,
) -> Pull:
    return Pull(
        given.map(x),
        None if grad is None else given.maps([grad]),
        own,
        given.maps(later_grads),
        given.tables(later_scales),
        given.integers([a.shape[0] for a in later_scales]),
        len(later_grads),
        relu,
        out.data_ptr(),
        KINDS[out.dtype],
    )


def _through(
    given: _Given,
    x: Tensor,
    found: Sequence[Tensor],
    groups: int,
    eps: float,
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
) -> Through:
    """The gradient of x through its statistics, where one comes."""
    some = grad_rate if grad_rate is not None else grad_shift
    if groups == NONE or some is None:
        return Through()
    rate, _, pooled, variance = found
    (n, c), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    count = pixels * {RAW: 1, BATCH: n}.get(groups, c // max(groups, 1))
    made = some.new_empty((2, *some.shape), dtype=given.dtype)
    given.kept.append(made)
    return Through(
        groups,
        eps,
        None,
        *(given.numbers(t) for t in (rate if groups == RAW else pooled, variance, grad_rate, grad_shift)),
        count,
        some.shape[0],
        made[0].data_ptr(),
        made[1].data_ptr(),
        None,
        None,
    )


def pull_entered(
    x: Tensor,
    own: Sequence[Tensor],
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    groups: int,
    eps: float,
) -> Tensor:
    """The backward pass of `fused.enter` at one go."""
    x = _standard(x)
    given, pulled = _Given(x), torch.empty_like(x)
    through = _through(given, x, own, groups, eps, grad_rate, grad_shift)
    told = _pull(given, x, None, through, later_grads, later_scales, False, pulled)
    _call("pull", x, shape_of(x), told, None, 0, 0, None, None)
    return pulled


def pull_block(
    y: Tensor,
    own: Sequence[Tensor],
    grad: Tensor | None,
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    branch: Tensor | None,
    affine: Sequence[Tensor],
    fixed: Sequence[Tensor],
    branch_norm: Sequence[Tensor],
    maps: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    branch_eps: float,
    relu: bool,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The backward pass of `fused.block` at one go, with the results of `fused._run_pull_block`."""
    y = _standard(y)
    given, c, g = _Given(y), y.shape[1], torch.empty_like(y)
    summed = maps if branch is None else [branch, *maps]

    def room(*shape: int) -> Tensor:
        return y.new_empty(shape, dtype=given.dtype)

    through = _through(given, y, own, groups, eps, grad_rate, grad_shift)
    told = _pull(given, y, grad, through, later_grads, later_scales, relu, g)
    rows = rates[0].shape[0] if rates else 1
    to_scales, to_bias = room(len(summed), rows, c), room(rows, c)
    if not rates:
        scales = unnormalised_scales(weight, maps, y)
        to = PairGradients(scales=to_scales.data_ptr(), bias=to_bias.data_ptr())
        _call("pull_block", y, shape_of(y), told, _given_scales(given, summed, scales, None), to, None, None)
        return g, scales, [], [], [], [] if weight is None else [_with_earlier(to_scales.sum(1), weight)], [], []

    assert weight is not None
    scales, to_weight = room(len(summed), rows, c), room(*weight.shape)
    to_rates, to_shifts, to_form = room(len(maps), rows, c), room(len(shifts), rows, c), room(2, 1, c)
    pairs = _paired(given, summed, weight, rates, shifts, fixed or branch_norm[:2])
    pairs.scales, pairs.bias = given.numbers(scales), given.numbers(room(rows, c))
    to = PairGradients(*(t.data_ptr() for t in (to_scales, to_bias, to_weight, to_rates, to_shifts, *to_form)))
    to_branch = [] if branch is None else [torch.empty_like(branch, memory_format=given.layout)]
    to_affine, back = [], None
    if branch is not None and not fixed:
        to_affine = [room(c), room(c)]
        back = _through(given, branch, branch_norm, BATCH, branch_eps, to_form[0], to_form[1])
        back.weight, _ = _pair(given, affine)
        back.grad_weight, back.grad_bias = (t.data_ptr() for t in to_affine)
    out = to_branch[0].data_ptr() if to_branch else None
    _call("pull_block", y, shape_of(y), told, pairs, to, back, out)
    return (
        *(g, scales, to_branch, [t.to(p.dtype) for t, p in zip(to_affine, affine, strict=False)]),
        *(list(to_form) if fixed else [], [to_weight.to(weight.dtype)], list(to_rates), list(to_shifts)),
    )


def _with_earlier(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the last rows of `weight` with zeros for the rows before."""
    return torch.cat([grad.new_zeros(weight.shape[0] - grad.shape[0], grad.shape[1]), grad]).to(weight.dtype)


def running_form(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """rate and shift, (1, C), of batch norm by its running statistics, (C,), with its affine parameters."""
    given = _Given(mean)
    rate = mean.new_empty((1, mean.shape[0]), dtype=given.dtype)
    shift = torch.empty_like(rate)
    affine, moments = map(given.numbers, (weight, bias)), map(given.numbers, (mean, var))
    form = Form(RUNNING, eps, *affine, rate.data_ptr(), shift.data_ptr(), *moments)
    kernel("running", rate)(mean.shape[0], form)
    return rate, shift


def nested_form(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, outer_eps: float
) -> tuple[Tensor, ...]:
    """See `forms.nested_form`."""
    (n, c), rows, given = mean.shape, 1 if groups == BATCH else mean.shape[0], _Given(mean)
    pooled = (1, c) if groups == BATCH else (n, groups)
    found = tuple(mean.new_empty(shape) for shape in ((rows, c), (rows, c), (1, c), (1, c), pooled, pooled))
    numbers = [given.numbers(t) for t in (mean, var, weight, bias, *found)]
    kernel("nested", mean)(Nested(n, c, groups, eps, outer_eps, *numbers))
    return found


def nested_form_backward(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    found: Sequence[Tensor],
    grads: Sequence[Tensor],
    eps: float,
    groups: int,
    outer_eps: float,
) -> tuple[Tensor, ...]:
    """See `forms.nested_form_backward`."""
    (n, c), given = mean.shape, _Given(mean)
    to = tuple(mean.new_empty(shape) for shape in ((n, c), (n, c), (c,), (c,)))
    numbers = [given.numbers(t) for t in (mean, var, weight, bias, None, None, *found)]
    addresses = [given.numbers(t) for t in (*grads, *to)]
    kernel("nested_backward", mean)(Nested(n, c, groups, eps, outer_eps, *numbers), *addresses)
    return to


def move(running: Sequence[Tensor], found: Sequence[Tensor], unbiased: float, step: float) -> None:
    """See `joining.move`."""
    addresses = [t.data_ptr() for t in found], [t.data_ptr() for t in running]
    kernel("move", running[0])(running[0].shape[0], *addresses[0], unbiased, step, *addresses[1])


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """See `reference.mix`."""
    last = _standard(maps[-1])
    given = _Given(last)
    outputs = [torch.empty_like(last) for _ in range(scales.shape[0])]
    told = (given.maps(maps), len(maps), given.numbers(scales), len(outputs), scales.shape[2])
    addresses = (ctypes.c_void_p * len(outputs))(*[y.data_ptr() for y in outputs])
    _call("mix", last, shape_of(last), *told, addresses, KINDS[last.dtype])
    return outputs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """See `reference.dots`."""
    first = _standard(maps[0])
    given = _Given(first)
    out = first.new_empty((len(grads), len(maps), rows, first.shape[1]), dtype=given.dtype)
    told = (given.maps(grads), len(grads), given.maps(maps), len(maps), rows)
    _call("dots", first, shape_of(first), *told, out.data_ptr())
    return out


def _call(name: str, like: Tensor, *arguments: object) -> None:
    kernel(name, like)(*arguments, threads(like))


def _standard(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
