"""Per-channel arithmetic around the passes: from moments to N(x) = scale * x + shift, and from there to a_i and b.

The tensors here are small: a number per channel, or per image and channel. All of it is plain differentiable PyTorch,
so autograd derives the gradients and torch.compile fuses it.

Source: a sum of DS (Sec. 3) is one affine combination of maps, with a = w / sigma and b = -sum w * mu / sigma.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.reference import accumulation_dtype


def pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Moments of a union of sets of equal size (law of total variance), without the cancellation of E[x^2] - E[x]^2."""
    pooled = mean.mean(dim, keepdim=True)
    between = mean - pooled
    return pooled, torch.addcmul(var, between, between).mean(dim, keepdim=True)


def affine_from_moments(
    mean: Tensor, var: Tensor, groups: int | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale and shift with N(x) = scale * x + shift, for a norm that pools the moments of single channels.

    Args:
        mean, var: `reference.moments` of x, both (N, C).
        groups: number of channel groups, each normalised as a whole; None pools each channel over the batch.
        eps: added to the variance.

    Returns:
        scale and shift, (N, C), or (1, C) over the batch; the pooled mean and biased variance, (N, groups) or (1, C).
    """
    if groups is None:
        pooled, variance = pool(mean, var, 0)
        invstd = torch.rsqrt(variance + eps)
        return invstd, -pooled * invstd, pooled, variance
    sets = (mean.shape[0], groups, mean.shape[1] // groups)
    pooled, variance = pool(mean.reshape(sets), var.reshape(sets), 2)
    invstd = torch.rsqrt(variance + eps)
    scale, shift = (x.expand(sets).reshape(mean.shape) for x in (invstd, -pooled * invstd))
    return scale, shift, pooled.flatten(1), variance.flatten(1)


def affine_from_running(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """scale and shift, (1, C), of a batch norm from its running statistics, (C,), and affine parameters, if any.

    They are computed at each use, because the buffers may change in between.
    """
    mean, var = _wide(mean), _wide(var)
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * _wide(weight)
    shift = -mean * scale if bias is None else torch.addcmul(_wide(bias), mean, scale, value=-1)
    return scale.unsqueeze(0), shift.unsqueeze(0)


def sum_coeffs(
    weight: Tensor | None, scales: Sequence[Tensor], shifts: Sequence[Tensor | None], first: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Coefficients of a weighted sum of normalised maps: a_i = w_i * scale_i and b = sum_i w_i * shift_i.

    Args:
        weight: w, (maps, 1 or N, C); None for ones.
        scales, shifts: the affine form of each map, (1 or N, C). No scales if maps are used without a norm; a shift is
            None for a norm without centring.
        first: the first map whose coefficient is needed; those before are in a partial sum.

    Returns:
        a, (maps - first, 1 or N, C), or None for ones; b, (1 or N, C), of all maps, or None for zero.
    """
    if weight is None:
        return None, None
    weight = _wide(weight)
    part = weight[first:] if first else weight
    if not scales:
        return part, None
    own = torch.stack(torch.broadcast_tensors(*scales[first:])) if scales[first:] else scales[-1]
    shifted = [i for i, shift in enumerate(shifts) if shift is not None]
    if not shifted:
        return part * own, None
    shift = torch.stack(torch.broadcast_tensors(*(each for each in shifts if each is not None)))
    return part * own, ((weight if len(shifted) == len(shifts) else weight[shifted]) * shift).sum(0)


def _wide(x: Tensor) -> Tensor:
    """x in the accumulation type, without a call to PyTorch for those that are: there are a dozen for every block."""
    dtype = accumulation_dtype(x.dtype)
    return x if x.dtype is dtype else x.to(dtype)
