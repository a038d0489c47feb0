"""The operator's kernels in plain PyTorch, written from the equations: any device; faster forms are held to these.

A back end is a module with the five functions `moments`, `join`, `pull`, `mix` and `dots` as they are here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and statistics are kept: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def new_map(x: Tensor) -> Tensor:
    """Room for a map in the form of x: channels_last where x is, else contiguous, so never with x's gaps or order."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x) if dense else torch.empty_like(x, memory_format=torch.contiguous_format)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the pixels of each channel of each image.

    All statistics used here (batch, group, layer, instance) follow from these two, so a feature map is read once
    whatever the norm, and no reshape is needed that would copy a channels_last map.

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
        addends: maps that are added as they stand, such as the residual branch F_l, each (N, C, H, W).
        maps: maps that are scaled, such as the finished X_0 .. X_{l-1}, each (N, C, H, W). There is at least one
            addend or map.
        scales: a_i, (len(maps), 1 or N, C); None adds the maps as they are.
        bias: b, (1 or N, C); None for zero.

    Returns:
        (N, C, H, W) in the dtype of the first addend, or without addends of the first map; the sum itself is kept in
        float32 or better.
    """
    first = (*addends, *maps)[0]
    total = torch.zeros_like(first, dtype=accumulation_dtype(first.dtype)) if not addends else None
    for x in addends:
        total = x.to(accumulation_dtype(first.dtype)) if total is None else total + x
    assert total is not None
    if bias is not None:
        total = total + bias[:, :, None, None]
    for i, x in enumerate(maps):
        # addcmul takes the map in its own dtype: no float32 copy of it is made or saved for the backward pass.
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
        relu: whether s is ReLU, else there is none.
        statistics: whether the moments are wanted.

    Returns:
        y, (N, C, H, W) in the dtype and layout of the first addend, or without addends of the first map; its mean and
        biased variance, both (N, C), or (0,) where they are not wanted. They are those of y as it is stored.
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
    """The gradient of a map from everything that used it, and what it means for the sum that made the map.

    Args:
        x: the map, (N, C, H, W).
        grad: gradient from the next block's residual branch, (N, C, H, W), or None for zero.
        offset, slope: gradient through the moments, offset + slope * x, both (1 or N, C), or None for zero.
        later_grads, later_scales: G_l (N, C, H, W) and a_{l,i} (1 or N, C) of the later sums.
        maps: the maps that were summed to x; none for a map that was not made by a sum.
        rows: rows of the scales of that sum, 1 or N; 0 where nothing but G is wanted.
        relu: whether x is behind ReLU.

    Returns:
        the gradient G of the sum, (N, C, H, W) in the dtype and layout of x, and those of its scales,
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
    """Several weighted sums of the same maps, each of which is read once: sum_i scales[j, i] * maps[i] for every j.

    This is a tile of the triangle of pairs: forwards, maps that are finished go into the sums of several later blocks;
    backwards, the gradients of several later blocks go to maps that are finished.

    Args:
        maps: at least one, each (N, C, H, W).
        scales: (outputs, len(maps), 1 or N, C).

    Returns:
        one tensor (N, C, H, W) an output, in the dtype and layout of the last map.
    """
    return [dense_sum([], maps, row, None).to(maps[-1].dtype) for row in scales]


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """Sums over pixels of grads[j] * maps[i]: the gradients of the scales of `mix`, with every tensor read once.

    Args:
        grads, maps: each (N, C, H, W), at least one of both.
        rows: 1 sums over images as well, N keeps them apart.

    Returns:
        (len(grads), len(maps), rows, C) in float32 (float64 for float64 maps).
    """
    dtype = accumulation_dtype(maps[0].dtype)
    return torch.stack([torch.stack([_pixel_sums(g.to(dtype) * x, rows) for x in maps]) for g in grads])


def _pixel_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, C) from (N, C, H, W)."""
    return x.sum((0, 2, 3) if rows == 1 else (2, 3)).view(rows, x.shape[1])
