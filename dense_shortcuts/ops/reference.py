"""The operator in plain PyTorch, written from the equations: runs on any device; faster forms are held to it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and statistics are kept: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


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


def dense_sum(branch: Tensor, maps: Sequence[Tensor], scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """branch + bias + sum_i scales[i] * maps[i], the affine form of Eq. (DS): a = w / sigma, b = -sum w * mu / sigma.

    Args:
        branch: residual branch F_l, (N, C, H, W).
        maps: the finished feature maps X_0 .. X_{l-1}, each (N, C, H, W).
        scales: a_i, (len(maps), 1 or N, C); None adds the maps as they are.
        bias: b, (1 or N, C); None for zero.

    Returns:
        (N, C, H, W) in the branch's dtype; the sum itself is kept in float32 or better.
    """
    total = branch.to(accumulation_dtype(branch.dtype))
    if bias is not None:
        total = total + bias[:, :, None, None]
    for i, x in enumerate(maps):
        # addcmul takes the map in its own dtype: no float32 copy of it is made or saved for the backward pass.
        total = total + x if scales is None else torch.addcmul(total, x, scales[i][:, :, None, None])
    return total.to(branch.dtype)


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
        offset, slope: gradient through the moments, offset + slope * x, both (N, C), or None for zero.
        later_grads, later_scales: G_l (N, C, H, W) and a_{l,i} (rows, C) of the later sums.
        maps: the maps that were summed to x; none for a map that was not made by a sum.
        rows: rows of the scales of that sum, 1 or N.
        relu: whether x is behind ReLU.

    Returns:
        the gradient G of the sum, (N, C, H, W), and those of its scales, (len(maps), rows, C), and bias, (rows, C).
    """
    dtype = accumulation_dtype(x.dtype)
    total = torch.zeros_like(x, dtype=dtype) if grad is None else grad.to(dtype)
    if offset is not None and slope is not None:
        total = total + offset[:, :, None, None] + slope[:, :, None, None] * x
    for later, scale in zip(later_grads, later_scales, strict=True):
        total = total + scale[:, :, None, None] * later
    if relu:
        total = total.masked_fill(x <= 0, 0)
    over = (0, 2, 3) if rows == 1 else (2, 3)
    sums = [(total * earlier).sum(over).view(rows, x.shape[1]) for earlier in maps]
    grad_scales = torch.stack(sums) if maps else total.new_zeros((0, rows, x.shape[1]))
    return total.to(x.dtype), grad_scales, total.sum(over).view(rows, x.shape[1])
