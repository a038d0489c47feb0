"""The arithmetic per channel around the operator: from moments to N(x) = rate * x + shift, and on to a_i and b.

Tensors here are small, (N, C) at most. The gradients are written out, since in eager mode a small step costs as much as
it makes PyTorch calls and nodes that autograd keeps; all functions are differentiable PyTorch themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import accumulation_dtype

# In place of a number of groups: each channel is normalised over all images; no statistics; each channel's moments;
# batch norm by its running statistics.
BATCH, NONE, RAW, RUNNING = 0, -1, -2, -3


def form(
    mean: Tensor, var: Tensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rate and shift with N(x) = rate * x + shift, for a norm whose statistics pool the channels' own.

    Args:
        mean, var: `moments` of x, both (N, C).
        groups: number of groups of channels that are normalised together, or BATCH.
        eps: added to the variance.
        weight, bias: affine parameters of the norm, (C,), or None.

    Returns:
        rate and shift, (N, C), or (1, C) for batch norm; the pooled mean and biased variance, (N, groups) or (1, C).
    """
    dim = 0 if groups == BATCH else 2
    pooled, variance = pool(_sets(mean, groups), _sets(var, groups), dim)
    invstd = torch.rsqrt(variance + eps)
    rate, shift = _spread(invstd, mean, groups), _spread(-pooled * invstd, mean, groups)
    if weight is not None:
        rate, shift = rate * weight.to(rate.dtype), shift * weight.to(shift.dtype)
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return rate, shift, pooled.flatten(1), variance.flatten(1)


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
    """The gradient of x through `form` and `moments`, as offset + slope * x, and those of the norm's parameters.

    Args:
        pooled, variance, groups, eps, weight: as in `form`.
        grad_rate, grad_shift: (N, C), or (1, C) for batch norm.
        count: number of pixels that are normalised together.

    Returns:
        offset, slope, (N, C) or (1, C); the gradients of weight and bias, both (C,).
    """
    invstd = torch.rsqrt(variance + eps)
    mean_of_each, invstd_of_each = (_spread(t[..., None] if groups else t, grad_rate, groups) for t in (pooled, invstd))

    # with t = invstd: rate = w t and shift = b - w M t, so dt = w (grad_rate - M grad_shift) and dM = -w t grad_shift
    through, moved = grad_rate - mean_of_each * grad_shift, grad_shift
    grad_weight = (through * invstd_of_each).sum(0)
    if weight is not None:
        through, moved = through * weight.to(through.dtype), moved * weight.to(through.dtype)
    if groups != BATCH:
        through, moved = _sets(through, groups).sum(2), _sets(moved, groups).sum(2)
    # d variance = 2 (x - M) dx / count and d M = dx / count
    slope = through * (invstd * invstd * invstd) * (-1.0 / count)
    offset = moved * invstd * (-1.0 / count) - slope * pooled
    if groups != BATCH:
        offset, slope = (_spread(t[..., None], grad_rate, groups) for t in (offset, slope))
    return offset, slope, grad_weight, grad_shift.sum(0)


def _sets(x: Tensor, groups: int) -> Tensor:
    """(N, C) with what is pooled along one dimension: (N, C) for batch norm, else (N, groups, C / groups)."""
    return x if groups == BATCH else x.reshape(x.shape[0], groups, x.shape[1] // groups)


def pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Moments of a union of equally large sets (law of total variance), without the cancellation of E[x^2] - E[x]^2."""
    pooled = mean.mean(dim, keepdim=True)
    between = mean - pooled
    return pooled, torch.addcmul(var, between, between).mean(dim, keepdim=True)


def _spread(x: Tensor, like: Tensor, groups: int) -> Tensor:
    """A number of each set, (N, groups, 1), for each of its channels, (N, C); for batch norm as it is."""
    return x if groups == BATCH else x.expand(_sets(like, groups).shape).reshape(like.shape).contiguous()


def unnormalised_scales(weight: Tensor | None, maps: Sequence[Tensor], like: Tensor) -> Tensor:
    """a_i of maps that are summed without a norm, (len(maps), 1, C): the last rows of `weight`, or ones."""
    dtype = accumulation_dtype(like.dtype)
    if weight is None:
        return like.new_ones((len(maps), 1, like.shape[1]), dtype=dtype)
    return weight[weight.shape[0] - len(maps) :, None].to(dtype)


def coefficients(
    weight: Tensor,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    first: int,
    branch: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """a_i and b of a weighted sum of normalised maps: a_i = w_i * rate_i and b = sum_i w_i * shift_i.

    Args:
        weight: w, (maps, C).
        rates, shifts: of each map, (1 or N, C).
        first: the maps before this one are summed elsewhere, so only their shifts count.
        branch: rate and shift of the residual branch's own last norm, (1, C), which then come in front.

    Returns:
        scales, (maps from `first` on, and one for the branch, 1 or N, C), and bias, (1 or N, C).
    """
    shift = torch.stack(list(shifts))
    weight = weight[:, None].to(shift.dtype)
    bias = (weight * shift).sum(0)
    own = [weight[first:] * torch.stack(list(rates[first:]))] if first < len(rates) else []
    if branch is None:
        return own[0] if own else shift[:0], bias
    rate = branch[0].expand(1, *bias.shape)
    return torch.cat([rate, *own]), bias + branch[1]


def coefficients_backward(
    weight: Tensor,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    first: int,
    has_branch: bool,
    grad_scales: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """The gradients of weight, of each rate from `first` on, of each shift, and of the branch's rate and shift, (1, C).

    Those of a branch that is not there are empty.
    """
    wide = weight[:, None].to(grad_bias.dtype)
    own = grad_scales[1:] if has_branch else grad_scales
    grad_weight = (torch.stack(list(shifts)) * grad_bias).sum(1)
    grad_rates: list[Tensor] = []
    if first < len(rates):
        through = (torch.stack(list(rates[first:])) * own).sum(1)
        grad_weight = torch.cat([grad_weight[:first], grad_weight[first:] + through])
        grad_rates = list((wide[first:] * own).unbind())
    grad_shifts = list((wide * grad_bias).unbind())
    none = grad_bias[:0]
    to_branch = (grad_scales[0].sum(0, keepdim=True), grad_bias.sum(0, keepdim=True)) if has_branch else (none, none)
    return grad_weight.to(weight.dtype), grad_rates, grad_shifts, *to_branch
