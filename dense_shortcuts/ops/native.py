"""The kernels on the CPU, compiled (`compiled.py`), as functions of tensors.

Each map is read from memory once and each output written once, by as many threads as PyTorch uses. Maps are taken
channels_last or contiguous, in float32, float64, bfloat16 and (where the compiler knows it) float16, mixed if need be.

Beside the five functions of every back end, by which the kernels are compared with `reference.py`, there are `enter`,
`block` and their backward passes, which do the arithmetic per channel in the same call; the operators run these.
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
from .forms import BATCH, NONE, RAW, RUNNING, shapes, unnormalised_scales
from .reference import accumulation_dtype, new_map
from .sums import Back, Sum


class _Room:
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
        _call("enter", x, shape_of(x), _Room(x).map(x), form, None)
    return found


def _new_statistics(x: Tensor, groups: int) -> list[Tensor]:
    """Room for rate, shift, pooled mean and variance of a norm of x."""
    (n, c), dtype = x.shape[:2], accumulation_dtype(x.dtype)
    if groups > 0 and c % groups:
        raise ValueError(f"a norm of {groups} groups was given a map of {c} channels, which they do not divide")
    form, pooled = shapes(n, c, groups)
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
    room = _Room(first)
    pairs = _given_scales(room, maps, scales, bias)
    y, found = _run_block(room, first, addends, None, pairs, relu, RAW if statistics else NONE, 0.0, out)
    return y, found[0], found[1]


def block(given: Sum, out: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`fused.run_block` at one go: y, the statistics of its norm, and those of the branch's norm unless it is fixed."""
    first = _standard(given.first)
    room, norm, found = _Room(first), None, []
    if given.branch is not None and not given.fixed:
        found = _new_statistics(given.branch, BATCH)
        norm = Form(BATCH, given.branch_eps, *_pair(room, given.affine), *[t.data_ptr() for t in found])
    if given.rates:
        pairs = _paired(room, given, given.fixed or found[:2])
    else:
        pairs = _given_scales(room, given.summed, unnormalised_scales(given.weight, given.maps, first), None)
    y, own = _run_block(room, first, given.addends, norm, pairs, given.relu, given.groups, given.eps, out)
    return y, own, found


def _pair(room: _Room, tensors: Sequence[Tensor]) -> tuple[int | None, int | None]:
    return (room.numbers(tensors[0]), room.numbers(tensors[1])) if tensors else (None, None)


def _given_scales(room: _Room, maps: Sequence[Tensor], scales: Tensor, bias: Tensor | None) -> Pairs:
    """The terms of a sum whose scales are known."""
    return Pairs(
        maps=room.maps(maps),
        count=len(maps),
        rows=scales.shape[1],
        scales=room.numbers(scales),
        bias=room.numbers(bias),
    )


def _paired(room: _Room, given: Sum, branch: Sequence[Tensor]) -> Pairs:
    """The terms of a sum whose scales and bias are to be made: the branch, if it has rate and shift, and maps."""
    return Pairs(
        room.maps(given.summed),
        len(given.summed),
        len(branch) > 0,
        room.numbers(given.weight),
        len(given.rates),
        room.tables(given.rates),
        room.tables(given.shifts),
        *_pair(room, branch),
        given.rows,
    )


def _run_block(
    room: _Room,
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
    terms = (room.maps(addends), len(addends), norm, pairs)
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
    room = _Room(x)
    own = Through()
    if offset is not None:
        own = Through(rows=offset.shape[0], offset=room.numbers(offset), slope=room.numbers(slope))
    pulled = torch.empty_like(x)
    scales = x.new_empty((len(maps), rows, x.shape[1]), dtype=room.dtype)
    bias = x.new_empty((rows, x.shape[1]), dtype=room.dtype)
    told = _pull(room, x, grad, own, later_grads, later_scales, relu, pulled)
    sums = (room.maps(maps), len(maps), rows, scales.data_ptr(), bias.data_ptr())
    _call("pull", x, shape_of(x), told, *sums)
    return pulled, scales, bias


def _pull(
    room: _Room,
    x: Tensor,
    grad: Tensor | None,
    own: Through,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    relu: bool,
    out: Tensor,
) -> Pull:
    return Pull(
        room.map(x),
        None if grad is None else room.maps([grad]),
        own,
        room.maps(later_grads),
        room.tables(later_scales),
        room.integers([a.shape[0] for a in later_scales]),
        len(later_grads),
        relu,
        out.data_ptr(),
        KINDS[out.dtype],
    )


def _through(
    room: _Room,
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
    made = some.new_empty((2, *some.shape), dtype=room.dtype)
    room.kept.append(made)
    return Through(
        groups,
        eps,
        None,
        *(room.numbers(t) for t in (rate if groups == RAW else pooled, variance, grad_rate, grad_shift)),
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
    room, pulled = _Room(x), torch.empty_like(x)
    through = _through(room, x, own, groups, eps, grad_rate, grad_shift)
    told = _pull(room, x, None, through, later_grads, later_scales, False, pulled)
    _call("pull", x, shape_of(x), told, None, 0, 0, None, None)
    return pulled


def pull_block(
    y: Tensor, own: Sequence[Tensor], back: Back, branch_norm: Sequence[Tensor], given: Sum
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The backward pass of `fused.block` at one go, with the arguments and results of `fused._run_pull_block`."""
    y = _standard(y)
    room, c, rows, g = _Room(y), y.shape[1], given.rows, torch.empty_like(y)
    branch, affine, fixed, weight = given.branch, given.affine, given.fixed, given.weight
    count = len(given.summed)

    def new(*shape: int) -> Tensor:
        return y.new_empty(shape, dtype=room.dtype)

    through = _through(room, y, own, given.groups, given.eps, back.grad_rate, back.grad_shift)
    told = _pull(room, y, back.grad, through, back.later_grads, back.later_scales, given.relu, g)
    to_scales, to_bias = new(count, rows, c), new(rows, c)
    if not given.rates:
        scales = unnormalised_scales(weight, given.maps, y)
        to = PairGradients(scales=to_scales.data_ptr(), bias=to_bias.data_ptr())
        _call("pull_block", y, shape_of(y), told, _given_scales(room, given.summed, scales, None), to, None, None)
        return g, scales, [], [], [], [] if weight is None else [_with_earlier(to_scales.sum(1), weight)], [], []

    assert weight is not None
    scales, to_weight = new(count, rows, c), new(*weight.shape)
    to_rates, to_shifts, to_form = new(len(given.maps), rows, c), new(len(given.shifts), rows, c), new(2, 1, c)
    pairs = _paired(room, given, fixed or branch_norm[:2])
    pairs.scales, pairs.bias = room.numbers(scales), room.numbers(new(rows, c))
    to = PairGradients(*(t.data_ptr() for t in (to_scales, to_bias, to_weight, to_rates, to_shifts, *to_form)))
    to_branch = [] if branch is None else [torch.empty_like(branch, memory_format=room.layout)]
    to_affine, theirs = [], None
    if branch is not None and not fixed:
        to_affine = [new(c), new(c)]
        theirs = _through(room, branch, branch_norm, BATCH, given.branch_eps, to_form[0], to_form[1])
        theirs.weight, _ = _pair(room, affine)
        theirs.grad_weight, theirs.grad_bias = (t.data_ptr() for t in to_affine)
    out = to_branch[0].data_ptr() if to_branch else None
    _call("pull_block", y, shape_of(y), told, pairs, to, theirs, out)
    to_branch = [] if branch is None else [_in_form_of(to_branch[0], branch)]
    return (
        *(g, scales, to_branch, [t.to(p.dtype) for t, p in zip(to_affine, affine, strict=False)]),
        *(list(to_form) if fixed else [], [to_weight.to(weight.dtype)], list(to_rates), list(to_shifts)),
    )


def _in_form_of(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient laid out as other back ends give it, where the branch and the sum are laid out differently."""
    if grad.stride() == x.stride():  # as nearly always: a map only to compare with would be one too many
        return grad
    wanted = new_map(x)
    return grad if grad.stride() == wanted.stride() else wanted.copy_(grad)


def _with_earlier(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the last rows of `weight` with zeros for the rows before."""
    return torch.cat([grad.new_zeros(weight.shape[0] - grad.shape[0], grad.shape[1]), grad]).to(weight.dtype)


def running_form(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """rate and shift, (1, C), of batch norm by its running statistics, (C,), with its affine parameters."""
    room = _Room(mean)
    rate = mean.new_empty((1, mean.shape[0]), dtype=room.dtype)
    shift = torch.empty_like(rate)
    affine, moments = map(room.numbers, (weight, bias)), map(room.numbers, (mean, var))
    form = Form(RUNNING, eps, *affine, rate.data_ptr(), shift.data_ptr(), *moments)
    kernel("running", rate)(mean.shape[0], form)
    return rate, shift


def nested_form(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, outer_eps: float
) -> tuple[Tensor, ...]:
    """See `forms.nested_form`."""
    (n, c), rows, room = mean.shape, 1 if groups == BATCH else mean.shape[0], _Room(mean)
    pooled = (1, c) if groups == BATCH else (n, groups)
    found = tuple(mean.new_empty(shape) for shape in ((rows, c), (rows, c), (1, c), (1, c), pooled, pooled))
    numbers = [room.numbers(t) for t in (mean, var, weight, bias, *found)]
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
    (n, c), room = mean.shape, _Room(mean)
    to = tuple(mean.new_empty(shape) for shape in ((n, c), (n, c), (c,), (c,)))
    numbers = [room.numbers(t) for t in (mean, var, weight, bias, None, None, *found)]
    addresses = [room.numbers(t) for t in (*grads, *to)]
    kernel("nested_backward", mean)(Nested(n, c, groups, eps, outer_eps, *numbers), *addresses)
    return to


def move(running: Sequence[Tensor], found: Sequence[Tensor], unbiased: float, step: float) -> None:
    """See `joining.move`."""
    addresses = [t.data_ptr() for t in found], [t.data_ptr() for t in running]
    kernel("move", running[0])(running[0].shape[0], *addresses[0], unbiased, step, *addresses[1])


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """See `reference.mix`."""
    last = _standard(maps[-1])
    room = _Room(last)
    outputs = [torch.empty_like(last) for _ in range(scales.shape[0])]
    told = (room.maps(maps), len(maps), room.numbers(scales), len(outputs), scales.shape[2])
    addresses = (ctypes.c_void_p * len(outputs))(*[y.data_ptr() for y in outputs])
    _call("mix", last, shape_of(last), *told, addresses, KINDS[last.dtype])
    return outputs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """See `reference.dots`."""
    first = _standard(maps[0])
    room = _Room(first)
    out = first.new_empty((len(grads), len(maps), rows, first.shape[1]), dtype=room.dtype)
    told = (room.maps(grads), len(grads), room.maps(maps), len(maps), rows)
    _call("dots", first, shape_of(first), *told, out.data_ptr())
    return out


def _call(name: str, like: Tensor, *arguments: object) -> None:
    kernel(name, like)(*arguments, threads(like))


def _standard(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
