"""The five map-sized passes in plain PyTorch, written from the equations, for any device; tests hold kernels to it.

A back end is a module with the functions `moments`, `join`, `pull`, `mix` and `dots`, as specified here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def new_map(x: Tensor) -> Tensor:
    """An uninitialised map like x: channels_last if x is, else contiguous, never with x's gaps or stride order."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x) if dense else torch.empty_like(x, memory_format=torch.contiguous_format)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the pixels of each channel of each image.

    The statistics of batch, group, layer and instance norm all follow from these two, so a feature map is read once
    whatever the norm, and without a reshape that would copy a channels_last map.

    Args:
        x: feature map, (N, C, H, W).

    Returns:
        mean and variance, both (N, C), in float32 (float64 for a float64 map).
    """
    var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dim=(2, 3), correction=0)
    return mean, var


def dense_sum(addends: Sequence[Tensor], maps: Sequence[Tensor], scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """sum of addends + bias + sum_i scales[i] * maps[i]: the affine form of DS, a = w / sigma, b = -sum w * mu / sigma.

    Args:
        addends: maps that are added unscaled, such as the residual branch F_l, each (N, C, H, W).
        maps: maps that are scaled, such as the finished X_0 .. X_{l-1}, each (N, C, H, W). At least one addend or map
            is required.
        scales: the coefficients a_i, (len(maps), 1 or N, C); None for ones.
        bias: b, (1 or N, C); None for zero.

    Returns:
        (N, C, H, W) in the dtype of the first addend, or of the first map if there are no addends; the sum is
        accumulated in float32 or better.
    """
    first = (*addends, *maps)[0]
    total = torch.zeros_like(first, dtype=accumulation_dtype(first.dtype)) if not addends else None
    for x in addends:
        total = x.to(accumulation_dtype(first.dtype)) if total is None else total + x
    assert total is not None
    if bias is not None:
        total = total + bias[:, :, None, None]
    for i, x in enumerate(maps):
        # addcmul accepts the map in its own dtype: no float32 copy is made, nor saved for the backward pass
        total = total + x if scales is None else torch.addcmul(total, x, scales[i][:, :, None, None])
    return total.to(first.dtype)


def join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """s(dense_sum(...)) and the moments of the result.

    Args:
        addends, maps, scales, bias: as in `dense_sum`.
        relu: whether s is ReLU; otherwise there is no activation.
        statistics: whether to compute the moments.

    Returns:
        y, (N, C, H, W) in the dtype and layout of the first addend, or of the first map if there are no addends; its
        mean and biased variance, both (N, C), or (0,) if not requested. The moments are those of y as stored, rounded
        to its dtype.
    """
    y = dense_sum(addends, maps, scales, bias)
    y = torch.relu(y) if relu else y
    if statistics:
        return y, *moments(y)
    none = y.new_empty(0, dtype=accumulation_dtype(y.dtype))
    return y, none, none.clone()


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
    """The gradient of a map from all its uses, and from it the gradients of the sum that made the map.

    Args:
        x: the map, (N, C, H, W).
        grad: gradient from the next block's residual branch, (N, C, H, W), or None for zero.
        offset, slope: gradient through the moments, offset + slope * x, both (1 or N, C), or None for zero.
        later_grads, later_scales: G_l (N, C, H, W) and a_{l,i} (1 or N, C) of the later sums.
        maps: the maps that were summed to x; empty if x is not the result of a sum.
        rows: rows of the coefficients of that sum, 1 or N; 0 if only G is needed.
        relu: whether x is the output of ReLU.

    Returns:
        the gradient G of the sum, (N, C, H, W) in the dtype and layout of x, and those of its coefficients,
        (len(maps), rows, C), and bias, (rows, C), in float32 (float64 for a float64 map).
    """
    dtype = accumulation_dtype(x.dtype)
    total = torch.zeros_like(x, dtype=dtype) if grad is None else grad.to(dtype)
    if offset is not None and slope is not None:
        total = total + offset[:, :, None, None] + slope[:, :, None, None] * x
    for later, scale in zip(later_grads, later_scales, strict=True):
        total = total + scale[:, :, None, None] * later
    if relu:
        total = torch.where(x <= 0, total.new_zeros(()), total)  # masked_fill would lose channels_last
    bias = _pixel_sums(total, rows) if rows else total.new_zeros((0, x.shape[1]))
    scales = dots([total], maps, rows)[0] if rows and maps else total.new_zeros((len(maps), rows, x.shape[1]))
    return total.to(x.dtype), scales, bias


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """Several weighted sums of the same maps, reading each map once: sum_i scales[j, i] * maps[i] for every j.

    This is a tile of the triangle of pairs (l, i). In the forward pass, finished maps go into the sums of several later
    blocks; in the backward pass, the gradients of several later blocks go to finished maps.

    Args:
        maps: at least one, each (N, C, H, W).
        scales: (outputs, len(maps), 1 or N, C).

    Returns:
        one tensor (N, C, H, W) per output, in the dtype and layout of the last map.
    """
    return [dense_sum([], maps, row, None).to(maps[-1].dtype) for row in scales]


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """Sums over pixels of grads[j] * maps[i]: the gradients of the coefficients of `mix`, reading every tensor once.

    Args:
        grads, maps: at least one each, (N, C, H, W).
        rows: 1 sums over images as well, N keeps images separate.

    Returns:
        (len(grads), len(maps), rows, C) in float32 (float64 for float64 maps).
    """
    dtype = accumulation_dtype(maps[0].dtype)
    return torch.stack([torch.stack([_pixel_sums(g.to(dtype) * x, rows) for x in maps]) for g in grads])


def _pixel_sums(x: Tensor, rows: int) -> Tensor:
    """Sums over the pixels of x, (N, C, H, W): (rows, C), with rows 1 or N."""
    return x.sum((0, 2, 3) if rows == 1 else (2, 3)).view(rows, x.shape[1])
