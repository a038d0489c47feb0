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


def shapes(images: int, channels: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of rate and shift, and of the pooled mean and variance, of a norm: a number of groups or one above."""
    of_form = {NONE: (0,), BATCH: (1, channels)}.get(groups, (images, channels))
    return of_form, {NONE: (0,), RAW: (0,), BATCH: (1, channels)}.get(groups, (images, groups))


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
        offset, slope, (N, C) or (1, C); the gradients of weight and bias, both (C,), or empty without a weight.
    """
    invstd = torch.rsqrt(variance + eps)
    mean_of_each = _spread(pooled[..., None] if groups else pooled, grad_rate, groups)

    # with t = invstd: rate = w t and shift = b - w M t, so dt = w (grad_rate - M grad_shift) and dM = -w t grad_shift
    through, moved = grad_rate - mean_of_each * grad_shift, grad_shift
    if weight is not None:
        through, moved = through * weight.to(through.dtype), moved * weight.to(through.dtype)
    if groups != BATCH:
        through, moved = _sets(through, groups).sum(2), _sets(moved, groups).sum(2)
    # d variance = 2 (x - M) dx / count and d M = dx / count
    slope = through * (invstd * invstd * invstd) * (-1.0 / count)
    offset = moved * invstd * (-1.0 / count) - slope * pooled
    if groups != BATCH:
        offset, slope = (_spread(t[..., None], grad_rate, groups) for t in (offset, slope))
    return offset, slope, *affine_backward(pooled, variance, groups, eps, weight, grad_rate, grad_shift)


def affine_backward(
    pooled: Tensor,
    variance: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    grad_rate: Tensor,
    grad_shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """The last two results of `form_backward`."""
    if weight is None:
        return grad_shift.new_empty(0), grad_shift.new_empty(0)
    invstd = torch.rsqrt(variance + eps)
    mean, invstd = (_spread(t[..., None] if groups else t, grad_rate, groups) for t in (pooled, invstd))
    return ((grad_rate - mean * grad_shift) * invstd).sum(0), grad_shift.sum(0)


def nested_form(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int, outer_eps: float
) -> tuple[Tensor, ...]:
    """rate and shift of N(b(x)) for a batch norm b by the batch's statistics and a norm N without affine parameters.

    Args:
        mean, var: `moments` of x, both (N, C).
        weight, bias, eps: of b, the parameters (C,) or None.
        groups, outer_eps: of N, a number of groups or BATCH.

    Returns:
        rate and shift, (N, C) or (1, C); mean and biased variance of x by channel, (1, C); those that N pools of b(x),
        (N, groups) or (1, C).
    """
    r, s, pooled, variance = form(mean, var, BATCH, eps, weight, bias)
    moved = torch.addcmul(s, r, mean)
    rate, shift, *outer = form(moved, r.square() * var, groups, outer_eps, None, None)
    return rate * r, torch.addcmul(shift, rate, s), pooled, variance, *outer


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
    """The gradients of mean and var, (N, C), and of weight and bias, (C,).

    Args:
        found: the last four results of `nested_form`.
        grads: the gradients of its rate and shift.
    """
    pooled, variance, outer_mean, outer_var = found
    grad_rate, grad_shift = grads
    images, channels = mean.shape
    count = images if groups == BATCH else channels // groups
    t = torch.rsqrt(variance + eps)
    r = t if weight is None else t * weight.to(t.dtype)
    s = -pooled * r if bias is None else bias.to(t.dtype) - pooled * r
    each = (outer_mean[..., None], outer_var[..., None]) if groups != BATCH else (outer_mean, outer_var)
    center, rate = _spread(each[0], mean, groups), _spread(torch.rsqrt(each[1] + outer_eps), mean, groups)

    # through N: the results are R r and R (s - M), with R its rate and M its mean
    to_mean = _over_sets(grad_shift * rate, groups) * (-1.0 / count)
    to_var = _over_sets(grad_rate * r + grad_shift * (s - center), groups) * rate.pow(3) * (-0.5 / count)
    to_moved = to_mean + 2 * (torch.addcmul(s, r, mean) - center) * to_var
    # through b: r = w t and s = bias - M r
    to_s = (grad_shift * rate).sum(0, keepdim=True) + to_moved.sum(0, keepdim=True)
    to_r = (grad_rate * rate).sum(0, keepdim=True) + (to_moved * mean + 2 * r * var * to_var).sum(0, keepdim=True)
    to_r = to_r - pooled * to_s
    to_variance = to_r * r * t.square() * (-0.5 / images)  # of t = (V + eps)^-1/2, times w
    to_x = to_moved * r + to_s * r * (-1.0 / images) + 2 * (mean - pooled) * to_variance
    return to_x, (r.square() * to_var + to_variance).expand_as(var), (to_r * t)[0], to_s[0]


def _over_sets(x: Tensor, groups: int) -> Tensor:
    """The sum over each set that is normalised together, for each of its channels; a row of batch norm is one."""
    return x if groups == BATCH else _spread(_sets(x, groups).sum(2, keepdim=True), x, groups)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of weight, of the rates from `first` on, of all shifts, and of the branch's rate and shift, (1, C).

    Those of a branch that is not there are empty.
    """
    wide = weight[:, None].to(grad_bias.dtype)
    own = grad_scales[1:] if has_branch else grad_scales
    grad_weight = (torch.stack(list(shifts)) * grad_bias).sum(1)
    grad_rates = wide[first:] * own
    if first < len(rates):
        through = (torch.stack(list(rates[first:])) * own).sum(1)
        grad_weight = torch.cat([grad_weight[:first], grad_weight[first:] + through])
    none = grad_bias[:0]
    to_branch = (grad_scales[0].sum(0, keepdim=True), grad_bias.sum(0, keepdim=True)) if has_branch else (none, none)
    return grad_weight.to(weight.dtype), grad_rates, wide * grad_bias, *to_branch
