"""The kernels on the CPU: in-place sums over pieces of a map that stay in cache, so memory sees each map once.

Every kernel takes channels_last and contiguous maps alike, works in float32 (float64 for float64 maps) and is exact up
to the order of summation. No compiler is needed at run time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .reference import accumulation_dtype, new_map

PIECE_BYTES = 2**21  # a piece of every operand of a sum, within two cores' second-level caches


def _pieces(x: Tensor) -> Iterator[slice]:
    """Ranges of images of about PIECE_BYTES each."""
    images = max(1, PIECE_BYTES // max(1, x[:1].numel() * accumulation_dtype(x.dtype).itemsize))
    return (slice(n, n + images) for n in range(0, x.shape[0], images))


def _rows(coefficient: Tensor, piece: slice) -> Tensor:
    """The rows of a (1 or N, C) coefficient for some images, to be broadcast over pixels."""
    rows = coefficient if coefficient.shape[0] == 1 else coefficient[piece]
    return rows[:, :, None, None]


def _working(out: Tensor, piece: slice) -> Tensor:
    """Where a piece is summed: in place, or in float32 beside a low-precision output."""
    view = out[piece]
    dtype = accumulation_dtype(out.dtype)
    return view if view.dtype == dtype else torch.empty_like(view, dtype=dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.moments`."""
    mean = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))
    var = torch.empty_like(mean)
    for piece in _pieces(x):
        mean[piece], var[piece] = _piece_moments(x[piece])
    return mean, var


def _piece_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(accumulation_dtype(x.dtype))
    pixels = x.shape[2] * x.shape[3]
    mean = x.sum((2, 3)).div_(pixels)
    centred = x - mean[:, :, None, None]
    return mean, centred.mul_(centred).sum((2, 3)).div_(pixels)


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
    first = (*addends, *maps)[0]
    y = first if addends and out is first else new_map(first)
    mean = first.new_empty(first.shape[:2] if statistics else (0,), dtype=accumulation_dtype(first.dtype))
    var = torch.empty_like(mean)
    for piece in _pieces(first):
        total = _working(y, piece)
        _start(total, addends[0][piece] if addends else None, None if bias is None else _rows(bias, piece))
        for x in addends[1:]:
            total.add_(x[piece])
        for x, scale in zip(maps, scales, strict=True):
            total.addcmul_(x[piece], _rows(scale, piece))
        if relu:
            total.relu_()
        if total.dtype != y.dtype:
            y[piece] = total
        if statistics:
            mean[piece], var[piece] = _piece_moments(y[piece])
    return y, mean, var


def _start(total: Tensor, x: Tensor | None, bias: Tensor | None) -> None:
    """Set total to x + bias, None standing for zero."""
    if x is not None and bias is not None:
        torch.add(x, bias, out=total)
    elif x is not None:
        total.copy_(x)
    elif bias is not None:
        total.copy_(bias)
    else:
        total.zero_()


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
    pulled = new_map(x)
    dtype = accumulation_dtype(x.dtype)
    grad_scales = x.new_zeros((len(maps), rows, x.shape[1]), dtype=dtype)
    grad_bias = x.new_zeros((rows, x.shape[1]), dtype=dtype)
    for piece in _pieces(x):
        total = _working(pulled, piece)
        _start(total, None if grad is None else grad[piece], None if offset is None else _rows(offset, piece))
        if slope is not None:
            total.addcmul_(x[piece], _rows(slope, piece))
        for later, scale in zip(later_grads, later_scales, strict=True):
            total.addcmul_(later[piece], _rows(scale, piece))
        if relu:
            torch.ops.aten.threshold_backward.grad_input(total, x[piece], 0, grad_input=total)
        if total.dtype != pulled.dtype:
            pulled[piece] = total
        if not rows:
            continue
        into = piece if rows > 1 else slice(0, 1)
        _add_pixel_sums(grad_bias[into], total)
        product = torch.empty_like(total)
        for i, earlier in enumerate(maps):
            _add_pixel_sums(grad_scales[i, into], torch.mul(total, earlier[piece], out=product))
    return pulled, grad_scales, grad_bias


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """See `reference.mix`."""
    outputs = [new_map(maps[-1]) for _ in scales]
    for piece in _pieces(maps[-1]):
        for output, row in zip(outputs, scales, strict=True):
            total = _working(output, piece).zero_()
            for x, scale in zip(maps, row, strict=True):
                total.addcmul_(x[piece], _rows(scale, piece))
            if total.dtype != output.dtype:
                output[piece] = total
    return outputs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """See `reference.dots`."""
    first = maps[0]
    dtype = accumulation_dtype(first.dtype)
    sums = first.new_zeros((len(grads), len(maps), rows, first.shape[1]), dtype=dtype)
    for piece in _pieces(first):
        into = piece if rows > 1 else slice(0, 1)
        product = torch.empty_like(first[piece], dtype=dtype)
        for j, grad in enumerate(grads):
            for i, x in enumerate(maps):
                _add_pixel_sums(sums[j, i, into], torch.mul(grad[piece], x[piece], out=product))
    return sums


def _add_pixel_sums(into: Tensor, x: Tensor) -> None:
    """Add the sums over pixels, and over images where one row stands for all of them."""
    into += x.sum((0, 2, 3)) if into.shape[0] == 1 else x.sum((2, 3))
