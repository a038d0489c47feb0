"""The arithmetic of `forms` in Triton, for CUDA devices, where a small step costs a launch: one or two a function.

Numbers per channel stand in (N, C) tensors. A program takes some of the sets that a norm pools (a channel over all
images for BATCH, else one group of one image) and holds each whole, or loops over it; nothing is shared between
programs, so the same bits come out each run. Lists of tensors reach a kernel as in `triton`.
"""
# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels have no Python types.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import forms
from .forms import BATCH
from .triton import _LIST, _power

_ELEMENTS = 1024  # numbers that a program holds at once
_TERMS = 256  # numbers that a program sums over maps: its threads ask for those of all maps at once
_ROWS = 32  # images of a tile that is summed over images, and its channels


@triton.jit
def _at(s, m, sets, size, BATCH: tl.constexpr):
    """Where member m of set s stands in an (N, C) tensor: sets are its columns for BATCH, else pieces of its rows."""
    return m * sets + s if BATCH else s * size + m


@triton.jit
def _read(pointer, at, mask, ACC: tl.constexpr):
    return tl.load(pointer + at, mask=mask, other=0).to(ACC)


@triton.jit
def _moments(mean, var, inner_rate, inner_shift, at, channel, mask, ACC: tl.constexpr):
    """Moments of channels; with an inner norm, those of inner_rate * x + inner_shift."""
    x, v = _read(mean, at, mask, ACC), _read(var, at, mask, ACC)
    if inner_rate is not None:
        r = _read(inner_rate, channel, mask, ACC)
        x, v = _read(inner_shift, channel, mask, ACC) + r * x, r * r * v
    return x, v


@triton.jit(do_not_specialize=["sets", "size", "groups"])
def _form_kernel(
    mean,  # (N, C), as var
    var,
    weight,  # (C,) or None, as bias
    bias,
    inner_rate,  # (1, C) or None, as inner_shift
    inner_shift,
    rate,  # (N, C), or (1, C) for BATCH, as shift
    shift,
    pooled,  # a number of each set, as variance
    variance,
    sets,
    size,  # members of a set
    groups,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    column = tl.arange(0, BLOCK_M)[None, :]
    sums = tl.zeros((BLOCK_S, BLOCK_M), ACC)
    for start in range(0, size, BLOCK_M):
        m = start + column
        mask = (s < sets) & (m < size)
        channel = s if BATCH else s % groups * size + m
        x, _v = _moments(mean, var, inner_rate, inner_shift, _at(s, m, sets, size, BATCH), channel, mask, ACC)
        sums += x
    center = tl.sum(sums, 1)[:, None] / size.to(ACC)

    sums = tl.zeros((BLOCK_S, BLOCK_M), ACC)
    for start in range(0, size, BLOCK_M):
        m = start + column
        mask = (s < sets) & (m < size)
        channel = s if BATCH else s % groups * size + m
        x, v = _moments(mean, var, inner_rate, inner_shift, _at(s, m, sets, size, BATCH), channel, mask, ACC)
        sums += tl.where(mask, v + (x - center) * (x - center), 0)
    spread = tl.sum(sums, 1)[:, None] / size.to(ACC)
    tl.store(pooled + s, center, mask=s < sets)
    tl.store(variance + s, spread, mask=s < sets)

    invstd = tl.rsqrt(spread + EPS)
    for start in range(0, 1 if BATCH else size, BLOCK_M):
        m = start + column
        mask = (s < sets) & (m < (1 if BATCH else size))
        channel = s + m if BATCH else s % groups * size + m
        own_rate = tl.broadcast_to(invstd, (BLOCK_S, BLOCK_M))
        own_shift = tl.broadcast_to(-center * invstd, (BLOCK_S, BLOCK_M))
        if weight is not None:
            w = _read(weight, channel, mask, ACC)
            own_rate, own_shift = own_rate * w, own_shift * w
        if bias is not None:
            own_shift += _read(bias, channel, mask, ACC)
        if inner_rate is not None:
            own_shift += own_rate * _read(inner_shift, channel, mask, ACC)
            own_rate *= _read(inner_rate, channel, mask, ACC)
        at = s + m if BATCH else s * size + m
        tl.store(rate + at, own_rate, mask=mask)
        tl.store(shift + at, own_shift, mask=mask)


@triton.jit(do_not_specialize=["sets", "size", "groups", "count"])
def _form_backward_kernel(
    pooled,  # a number of each set, as variance
    variance,
    weight,  # (C,) or None
    grad_rate,  # (sets * size,), as grad_shift
    grad_shift,
    offset,  # the same
    slope,
    grad_weight,  # (C,) or None, as grad_bias: only where there is but one row
    grad_bias,
    sets,
    size,
    groups,
    count,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    column = tl.arange(0, BLOCK_M)[None, :]
    center = _read(pooled, s, s < sets, ACC)
    invstd = tl.rsqrt(tl.load(variance + s, mask=s < sets, other=1).to(ACC) + EPS)
    # with t = invstd: rate = w t and shift = b - w M t, so dt = w (grad_rate - M grad_shift) and dM = -w t grad_shift
    through_sums = tl.zeros((BLOCK_S, BLOCK_M), ACC)
    moved_sums = tl.zeros((BLOCK_S, BLOCK_M), ACC)
    for start in range(0, size, BLOCK_M):
        m = start + column
        mask = (s < sets) & (m < size)
        at = s * size + m
        channel = s % groups * size + m
        moved = _read(grad_shift, at, mask, ACC)
        through = _read(grad_rate, at, mask, ACC) - center * moved
        if grad_weight is not None:
            tl.store(grad_weight + channel, through * invstd, mask=mask)
            tl.store(grad_bias + channel, moved, mask=mask)
        if weight is not None:
            w = _read(weight, channel, mask, ACC)
            through, moved = through * w, moved * w
        through_sums += through
        moved_sums += moved
    # d variance = 2 (x - M) dx / count and d M = dx / count
    tilt = tl.sum(through_sums, 1)[:, None] * (invstd * invstd * invstd) * (-1.0 / count.to(ACC))
    start_at = tl.sum(moved_sums, 1)[:, None] * invstd * (-1.0 / count.to(ACC)) - tilt * center
    for start in range(0, size, BLOCK_M):
        m = start + column
        mask = (s < sets) & (m < size)
        at = s * size + m
        tl.store(offset + at, tl.broadcast_to(start_at, (BLOCK_S, BLOCK_M)), mask=mask)
        tl.store(slope + at, tl.broadcast_to(tilt, (BLOCK_S, BLOCK_M)), mask=mask)


@triton.jit(do_not_specialize=["rows", "channels"])
def _coefficients_kernel(
    weight,  # (maps, C)
    rates,  # of the last maps, (rows, C) each, or None
    shifts,  # of all maps
    earlier,  # (rows, C) or None: b of maps before these
    branch_rate,  # (1, C) or None, as branch_shift
    branch_shift,
    branch_scales,  # (rows, C) or None
    scales,  # (len(rates), rows, C)
    bias,  # (rows, C)
    rows,
    channels,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows * channels
    channel = at % channels
    FIRST: tl.constexpr = len(shifts) - (0 if rates is None else len(rates))
    total = tl.zeros((BLOCK,), ACC)
    if earlier is not None:
        total += _read(earlier, at, mask, ACC)
    for i in tl.static_range(len(shifts)):
        w = _read(weight, i * channels + channel, mask, ACC)
        total += w * _read(shifts[i], at, mask, ACC)
        if i >= FIRST:
            scale = w * _read(rates[i - FIRST], at, mask, ACC)
            tl.store(scales + (i - FIRST) * rows * channels + at, scale, mask=mask)
    if branch_rate is not None:
        total += _read(branch_shift, channel, mask, ACC)
        tl.store(branch_scales + at, _read(branch_rate, channel, mask, ACC), mask=mask)
    tl.store(bias + at, total, mask=mask)


@triton.jit
def _pick(pointers, i):
    found = pointers[0]
    for n in tl.static_range(1, len(pointers)):
        found = tl.where(i == n, pointers[n], found)
    return found


@triton.jit(do_not_specialize=["rows", "channels"])
def _coefficients_backward_kernel(
    weight,  # (maps, C)
    rates,  # of the last maps, (rows, C) each, or None
    shifts,  # of all maps
    grad_scales,  # (rates, rows, C)
    branch_scales,  # (rows, C): the gradient of the branch's scales, or None
    grad_bias,  # (rows, C)
    grad_weight,  # (maps, C)
    grad_rates,  # (rates, rows, C)
    grad_shifts,  # (maps, rows, C)
    branch_rate,  # (1, C) or None, as branch_shift
    branch_shift,
    rows,
    channels,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program has one map, or what comes after the last one, the branch, and some channels."""
    i = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    MAPS: tl.constexpr = len(shifts)
    FIRST: tl.constexpr = MAPS - (0 if rates is None else len(rates))
    sums = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    if i < MAPS:
        w = _read(weight, i * channels + c, c < channels, ACC)
        shift = _pick(shifts, i)
        for start in range(0, rows, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)[:, None]
            mask = (r < rows) & (c < channels)
            at = r * channels + c
            grad = _read(grad_bias, at, mask, ACC)
            sums += _read(shift, at, mask, ACC) * grad
            tl.store(grad_shifts + i * rows * channels + at, w * grad, mask=mask)
        if rates is not None:
            rate = _pick(rates, i - FIRST)
            for start in range(0, rows, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)[:, None]
                mask = (r < rows) & (c < channels) & (i >= FIRST)
                at = r * channels + c
                own = (i - FIRST) * rows * channels + at
                grad = _read(grad_scales, own, mask, ACC)
                sums += _read(rate, at, mask, ACC) * grad
                tl.store(grad_rates + own, w * grad, mask=mask)
        total = tl.sum(sums, 0)[None, :].to(grad_weight.dtype.element_ty)
        tl.store(grad_weight + i * channels + c, total, mask=c < channels)
    elif branch_scales is not None:
        bias_sums = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for start in range(0, rows, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)[:, None]
            mask = (r < rows) & (c < channels)
            sums += _read(branch_scales, r * channels + c, mask, ACC)
            bias_sums += _read(grad_bias, r * channels + c, mask, ACC)
        tl.store(branch_rate + c, tl.sum(sums, 0)[None, :], mask=c < channels)
        tl.store(branch_shift + c, tl.sum(bias_sums, 0)[None, :], mask=c < channels)


@triton.jit
def _inner_norm(pooled, variance, weight, bias, channel, mask, EPS: tl.constexpr, ACC: tl.constexpr):
    """Mean, 1 / deviation, rate and shift of the inner norm of a nested form."""
    mean = _read(pooled, channel, mask, ACC)
    invstd = tl.rsqrt(tl.load(variance + channel, mask=mask, other=1).to(ACC) + EPS)
    rate, shift = invstd, -mean * invstd
    if weight is not None:
        w = _read(weight, channel, mask, ACC)
        rate, shift = rate * w, shift * w
    if bias is not None:
        shift += _read(bias, channel, mask, ACC)
    return mean, invstd, rate, shift


@triton.jit(do_not_specialize=["sets", "size", "groups", "count"])
def _nested_outer_kernel(
    pooled,  # (1, C) of the inner norm, as variance
    variance,
    weight,  # (C,) or None, as bias
    bias,
    outer_mean,  # a number of each set, as outer_var
    outer_var,
    grad_rate,  # (sets * size,), as grad_shift
    grad_shift,
    to_mean,  # a number of each set: the gradient of each mean that the outer norm pools, as to_var
    to_var,
    sets,
    size,
    groups,
    count,
    EPS: tl.constexpr,
    OUTER_EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    center = _read(outer_mean, s, s < sets, ACC)
    outer = tl.rsqrt(tl.load(outer_var + s, mask=s < sets, other=1).to(ACC) + OUTER_EPS)
    # the results are R r and R (s - M), with R the rate of the outer norm and M its mean
    mean_sums = tl.zeros((BLOCK_S, BLOCK_M), ACC)
    var_sums = tl.zeros((BLOCK_S, BLOCK_M), ACC)
    for start in range(0, size, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)[None, :]
        mask = (s < sets) & (m < size)
        _mean, _invstd, rate, shift = _inner_norm(pooled, variance, weight, bias, s % groups * size + m, mask, EPS, ACC)
        moved = _read(grad_shift, s * size + m, mask, ACC)
        mean_sums += moved
        var_sums += _read(grad_rate, s * size + m, mask, ACC) * rate + moved * (shift - center)
    scale = -1.0 / count.to(ACC)
    tl.store(to_mean + s, tl.sum(mean_sums, 1)[:, None] * outer * scale, mask=s < sets)
    tl.store(to_var + s, tl.sum(var_sums, 1)[:, None] * (outer * outer * outer) * (0.5 * scale), mask=s < sets)


@triton.jit(do_not_specialize=["images", "channels", "size"])
def _nested_inner_kernel(
    mean,  # (N, C), as var
    var,
    weight,  # (C,) or None, as bias
    bias,
    pooled,  # (1, C) of the inner norm, as variance
    variance,
    outer_mean,  # a number of each set, as outer_var
    outer_var,
    grad_rate,  # (N, C), or (1, C) for BATCH, as grad_shift
    grad_shift,
    to_mean,  # from the kernel above, as to_var
    to_var,
    grad_mean,  # (N, C), as grad_var
    grad_var,
    grad_weight,  # (C,), as grad_bias
    grad_bias,
    images,
    channels,
    size,  # channels of a set
    EPS: tl.constexpr,
    OUTER_EPS: tl.constexpr,
    BATCH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = c < channels
    center, invstd, rate, shift = _inner_norm(pooled, variance, weight, bias, c, inside, EPS, ACC)
    rate_sums = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    shift_sums = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, images, BLOCK_R):
        n = start + tl.arange(0, BLOCK_R)[:, None]
        mask = (n < images) & inside
        each = n * 0 + c if BATCH else n * (channels // size) + c // size
        outer = tl.rsqrt(tl.load(outer_var + each, mask=mask, other=1).to(ACC) + OUTER_EPS)
        x = _read(mean, n * channels + c, mask, ACC)
        through = _read(to_var, each, mask, ACC)
        moved = rate * x + shift - _read(outer_mean, each, mask, ACC)
        moved = tl.where(mask, _read(to_mean, each, mask, ACC) + 2 * moved * through, 0)
        rate_sums += moved * x + 2 * rate * _read(var, n * channels + c, mask, ACC) * through
        shift_sums += moved
        own = mask & (n < 1) if BATCH else mask  # the gradients of batch norm are one row
        rate_sums += _read(grad_rate, n * channels + c, own, ACC) * outer
        shift_sums += _read(grad_shift, n * channels + c, own, ACC) * outer
    to_shift = tl.sum(shift_sums, 0)[None, :]
    to_rate = tl.sum(rate_sums, 0)[None, :] - center * to_shift  # of r = w t, with s = bias - M r
    tl.store(grad_weight + c, to_rate * invstd, mask=inside)
    tl.store(grad_bias + c, to_shift, mask=inside)

    to_variance = to_rate * rate * (invstd * invstd) * (-0.5 / images.to(ACC))
    for start in range(0, images, BLOCK_R):
        n = start + tl.arange(0, BLOCK_R)[:, None]
        mask = (n < images) & inside
        each = n * 0 + c if BATCH else n * (channels // size) + c // size
        x = _read(mean, n * channels + c, mask, ACC)
        through = _read(to_var, each, mask, ACC)
        moved = rate * x + shift - _read(outer_mean, each, mask, ACC)
        moved = _read(to_mean, each, mask, ACC) + 2 * moved * through
        to_x = moved * rate + to_shift * rate * (-1.0 / images.to(ACC)) + 2 * (x - center) * to_variance
        tl.store(grad_mean + n * channels + c, to_x, mask=mask)
        tl.store(grad_var + n * channels + c, rate * rate * through + to_variance, mask=mask)


@triton.jit(do_not_specialize=["channels"])
def _move_kernel(
    running_mean,  # (C,), as running_var
    running_var,
    mean,  # (1, C), as var
    var,
    channels,
    unbiased,
    step,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < channels
    old = tl.load(running_mean + c, mask=mask)
    tl.store(running_mean + c, old + step * (tl.load(mean + c, mask=mask) - old), mask=mask)
    old = tl.load(running_var + c, mask=mask)
    tl.store(running_var + c, old + step * (unbiased * tl.load(var + c, mask=mask) - old), mask=mask)


def form(
    mean: Tensor, var: Tensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forms.form`, in one launch."""
    if mean.numel() == 0:
        return forms.form(mean, var, groups, eps, weight, bias)
    return _launch_form(mean, var, groups, eps, (weight, bias), (None, None))


def _launch_form(
    mean: Tensor,
    var: Tensor,
    groups: int,
    eps: float,
    affine: tuple[Tensor | None, Tensor | None],
    inner: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`form` by the moments of x of the norm of inner_rate * x + inner_shift, (1, C) each."""
    of_form, of_pooled = forms.shapes(mean.shape[0], mean.shape[1], groups)
    rate, shift = mean.new_empty(of_form), mean.new_empty(of_form)
    pooled, variance = mean.new_empty(of_pooled), mean.new_empty(of_pooled)
    sets, size = pooled.numel(), mean.numel() // pooled.numel()
    blocks = _blocks(size, _ROWS if groups == BATCH else _ELEMENTS)
    with torch.cuda.device_of(mean):
        _form_kernel[(triton.cdiv(sets, blocks["BLOCK_S"]),)](
            *map(_dense, (mean, var, *affine, *inner)),
            *(rate, shift, pooled, variance),
            *(sets, size, groups),
            EPS=eps,
            BATCH=groups == BATCH,
            ACC=_accumulator(mean),
            **blocks,
        )
    return rate, shift, pooled, variance


def form_backward(
    pooled: Tensor,
    variance: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    grad_rate: Tensor,
    grad_shift: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forms.form_backward`, in one launch for norms without parameters and for batch norm."""
    if grad_rate.numel() == 0:
        return forms.form_backward(pooled, variance, groups, eps, weight, grad_rate, grad_shift, count)
    offset, slope = _room(grad_rate.shape, grad_rate), _room(grad_rate.shape, grad_rate)
    direct = weight is not None and len(grad_rate) == 1
    to_affine = [_room(weight.shape, grad_rate) for _ in range(2)] if weight is not None and direct else []
    sets, size = pooled.numel(), grad_rate.numel() // pooled.numel()
    blocks = _blocks(size, _ELEMENTS)
    with torch.cuda.device_of(grad_rate):
        _form_backward_kernel[(triton.cdiv(sets, blocks["BLOCK_S"]),)](
            *map(_dense, (pooled, variance, weight, grad_rate, grad_shift)),
            *(offset, slope, *(to_affine or (None, None))),
            *(sets, size, pooled.shape[1], count),
            EPS=eps,
            ACC=_accumulator(grad_rate),
            **blocks,
        )
    if direct:
        return offset, slope, to_affine[0], to_affine[1]
    return offset, slope, *forms.affine_backward(pooled, variance, groups, eps, weight, grad_rate, grad_shift)


def nested_form(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, outer_eps: float
) -> tuple[Tensor, ...]:
    """`forms.nested_form`, in two launches: each norm pools what the other keeps apart."""
    if mean.numel() == 0:
        return forms.nested_form(mean, var, weight, bias, eps, groups, outer_eps)
    rate, shift, pooled, variance = form(mean, var, BATCH, eps, weight, bias)
    rate, shift, *outer = _launch_form(mean, var, groups, outer_eps, (None, None), (rate, shift))
    return rate, shift, pooled, variance, *outer


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
    """`forms.nested_form_backward`, in two launches."""
    if mean.numel() == 0:
        return forms.nested_form_backward(mean, var, weight, bias, found, grads, eps, groups, outer_eps)
    images, channels = mean.shape
    outer_mean = found[2]
    grads = [_dense(g) for g in grads]
    mean, var, weight, bias, *found = map(_dense, (mean, var, weight, bias, *found))
    to_mean, to_var = torch.empty_like(outer_mean), torch.empty_like(outer_mean)
    to = [_room(shape, mean) for shape in (mean.shape, mean.shape, (channels,), (channels,))]
    sets, size = outer_mean.numel(), grads[0].numel() // outer_mean.numel()
    count = images if groups == BATCH else size
    settings = {"EPS": eps, "OUTER_EPS": outer_eps, "ACC": _accumulator(mean)}
    blocks = _blocks(size, _ELEMENTS)
    with torch.cuda.device_of(mean):
        _nested_outer_kernel[(triton.cdiv(sets, blocks["BLOCK_S"]),)](
            *(*found[:2], weight, bias, *found[2:], *grads, to_mean, to_var),
            *(sets, size, outer_mean.shape[1], count),
            **settings,
            **blocks,
        )
        _nested_inner_kernel[(triton.cdiv(channels, _ROWS),)](
            *(mean, var, weight, bias, *found, *grads, to_mean, to_var, *to),
            *(images, channels, size),
            **settings,
            BATCH=groups == BATCH,
            BLOCK_R=min(_ROWS, _power(images)),
            BLOCK_C=_ROWS,
        )
    return tuple(to)


def coefficients(
    weight: Tensor,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    first: int,
    branch: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """`forms.coefficients`, in one launch for up to 64 maps."""
    like, ahead = shifts[0], 0 if branch is None else 1
    if like.numel() == 0:
        return forms.coefficients(weight, rates, shifts, first, branch)
    rows, channels = like.shape
    scales = _room((len(rates) - first + ahead, rows, channels), like)
    bias: Tensor | None = None
    for a, b in _launches(len(shifts)):
        begin, total = max(a, first), _room(like.shape, like)
        own = tuple(map(_dense, rates[begin:b]))
        given = (None, None) if branch is None or a else tuple(map(_dense, branch))
        with torch.cuda.device_of(like):
            _coefficients_kernel[(triton.cdiv(rows * channels, _TERMS),)](
                weight[a:b].contiguous(),
                own or None,
                tuple(map(_dense, shifts[a:b])),
                bias,
                *given,
                None if given[0] is None else scales[0],
                scales[begin - first + ahead :] if own else None,
                *(total, rows, channels),
                ACC=_accumulator(like),
                BLOCK=_TERMS,
            )
        bias = total
    assert bias is not None
    return scales, bias


def coefficients_backward(
    weight: Tensor,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    first: int,
    has_branch: bool,
    grad_scales: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forms.coefficients_backward`, in one launch for up to 64 maps."""
    if grad_bias.numel() == 0:
        return forms.coefficients_backward(weight, rates, shifts, first, has_branch, grad_scales, grad_bias)
    rows, channels = grad_bias.shape
    weight, grad_scales, grad_bias = weight.contiguous(), grad_scales.contiguous(), grad_bias.contiguous()
    own_scales = grad_scales[1:] if has_branch else grad_scales
    to_weight, to_shifts = torch.empty_like(weight), _room((len(shifts), rows, channels), grad_bias)
    to_rates = torch.empty_like(own_scales)
    to_branch = [_room((1 if has_branch else 0, channels), grad_bias) for _ in range(2)]
    for a, b in _launches(len(shifts)):
        begin, last = max(a, first), has_branch and b == len(shifts)
        own = tuple(map(_dense, rates[begin:b]))
        with torch.cuda.device_of(grad_bias):
            _coefficients_backward_kernel[(triton.cdiv(channels, _ROWS), b - a + last)](
                weight[a:b],
                own or None,
                tuple(map(_dense, shifts[a:b])),
                own_scales[begin - first :] if own else None,
                grad_scales[0] if last else None,
                *(grad_bias, to_weight[a:b]),
                to_rates[begin - first :] if own else None,
                to_shifts[a:b],
                *(to_branch if last else (None, None)),
                *(rows, channels),
                ACC=_accumulator(grad_bias),
                BLOCK_R=min(_ROWS, _power(rows)),
                BLOCK_C=_ROWS,
            )
    return to_weight, to_rates, to_shifts, to_branch[0], to_branch[1]


def move(running: Sequence[Tensor], found: Sequence[Tensor], unbiased: float, step: float) -> None:
    """`joining.move` of float32 numbers, in one launch."""
    channels = running[0].shape[0]
    with torch.cuda.device_of(running[0]):
        _move_kernel[(triton.cdiv(channels, _TERMS),)](*running, *found, channels, unbiased, step, BLOCK=_TERMS)


def _launches(maps: int) -> list[tuple[int, int]]:
    """The maps of each launch, from and to."""
    return [(a, min(a + _LIST, maps)) for a in range(0, maps, _LIST)]


def _blocks(size: int, most: int) -> dict[str, int]:
    """How many sets of so many members a program takes, and how many members, at most `most`, at once."""
    members = min(most, _power(size))
    return {"BLOCK_S": _ELEMENTS // members, "BLOCK_M": members}


def _room(shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(tuple(shape))


def _dense(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous()


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
