"""The affine form of a norm, N(x) = scale * x + shift, from statistics that are computed once per map.

It covers N of the equations, and the last norm of a residual branch with its affine parameters.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.affine import affine_from_moments, affine_from_running
from .sync_norm import across_processes, is_synchronised

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # a tuple: torch.compile of PyTorch 2.9 does not support A | B
_KNOWN = (nn.GroupNorm, *BATCH_NORMS, nn.InstanceNorm2d)


def has_affine_form(norm: nn.Module) -> bool:
    """Whether `affine_form` supports this module; any other norm is called as a module."""
    return type(norm) in _KNOWN and not (isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats)


def is_fusable(norm: nn.Module) -> bool:
    """Whether the last norm of a residual branch may be part of the sum: batch norm on one process."""
    return type(norm) in BATCH_NORMS and not is_synchronised(norm)


def is_batch_norm(norm: nn.Module | None) -> bool:
    """Whether statistics are taken over the batch, so all images share one affine form."""
    return isinstance(norm, BATCH_NORMS)


def is_per_image(norm: nn.Module | None) -> bool:
    """Whether each image has its own affine form."""
    return norm is not None and has_affine_form(norm) and not is_batch_norm(norm)


def needs_moments(norm: nn.Module | None) -> bool:
    """Whether the affine form depends on the map's moments: not for batch norm in eval mode."""
    return norm is not None and not uses_running_stats(norm)


def uses_running_stats(norm: Any) -> bool:
    """Whether the norm uses its running statistics only: batch norm in eval mode."""
    tracked = is_batch_norm(norm) and not norm.training
    return tracked and norm.running_mean is not None and norm.running_var is not None


def affine_form(
    norm: nn.Module, mean: Tensor, var: Tensor, x: Tensor, *, center: bool = True
) -> tuple[Tensor, Tensor | None]:
    """scale and shift with norm(x) = scale * x + shift. In training, batch norm updates its running statistics.

    Args:
        norm: a module for which `has_affine_form` is true.
        mean, var: moments of x, (N, C) each; not read if `needs_moments` is false.
        x: the map, (N, C, H, W).
        center: whether the norm subtracts the mean. Otherwise it divides by the root mean square, of which batch norm
            keeps the running square in place of its running variance, with a running mean of zero.

    Returns:
        scale and shift, (1, C) for batch norm and (N, C) for the others, in float32 (float64 for a float64 map); the
        shift is None if there is none.

    Raises:
        ValueError: norm and map have different numbers of channels.
    """
    assert isinstance(norm.eps, float)
    width = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if not isinstance(x, torch.fx.Proxy) and x.shape[1] != width:
        raise ValueError(f"a norm of {width} channels was given a map of {x.shape[1]} channels.")
    weight, bias = _tensor(norm.weight), _tensor(norm.bias)
    if uses_running_stats(norm):
        form = _running_form(x, _tensor(norm.running_mean), _tensor(norm.running_var), norm.eps, weight, bias)
        return form[0], form[1] if center or bias is not None else None  # by index: a traced graph cannot unpack
    if not center:
        mean, var = torch.zeros_like(mean), torch.addcmul(var, mean, mean)
    if isinstance(norm, BATCH_NORMS):
        scale, shift = _batch_form(norm, mean, var, _count(x), center)
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
        scale, shift = affine_from_moments(mean, var, _tensor(groups), norm.eps)[:2]
    if weight is not None:
        scale, shift = scale * weight.to(scale.dtype), shift * weight.to(shift.dtype)
    if bias is not None:
        return scale, shift + bias.to(shift.dtype)
    return scale, shift if center else None


def _batch_form(norm: nn.Module, mean: Tensor, var: Tensor, count: int | Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """scale and shift, (1, C), of batch norm over this batch, without affine parameters."""
    assert isinstance(norm, BATCH_NORMS)
    if is_synchronised(norm):
        mean, var, count = across_processes(norm, mean, var, count)
    if isinstance(count, int) and count == 0:  # zeros, since the mean of nothing is NaN and would reach gradients
        scale = shift = mean = var = mean.sum(0, keepdim=True)
    else:
        scale, shift, mean, var = affine_from_moments(mean, var, None, norm.eps)
    if not (norm.training and norm.track_running_stats):
        return scale, shift
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return _update_running(scale, mean, var, count, int(center), norm.momentum, *buffers), shift


@torch.fx.wrap
def _count(x: Tensor) -> int:
    """Number of values per channel that batch norm normalises over."""
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count == 1:  # as F.batch_norm does
        raise ValueError("Expected more than 1 value per channel when training, got one image of one pixel")
    return count


def _tensor(value: Any) -> Any:
    """A norm's parameter or buffer, possibly None; PyTorch's annotations also allow modules."""
    return value


@torch.fx.wrap  # one node of a traced graph, with the buffers as inputs
def _running_form(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    # x is unused, but makes the call depend on traced data: otherwise torch.fx would turn the buffers into constants
    return affine_from_running(mean, var, eps, weight, bias)


@torch.fx.wrap
def _update_running(
    scale: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    fitted: int,
    momentum: float | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Update the running statistics from a batch's mean and biased variance, both (1, C), over `count` values.

    `fitted` is 1 if the variance is about a mean of the same values, so it is too small, and 0 if it is about zero.
    Returns `scale` unchanged: a traced graph would drop an update whose result is not used.
    """
    if running_mean is None or running_var is None or num_batches_tracked is None:
        return scale
    num_batches_tracked.add_(1)
    if isinstance(count, int) and count == 0:
        return scale
    dtype = running_mean.dtype
    # momentum=None means a cumulative average, as in PyTorch
    step: float | Tensor = 1.0 / num_batches_tracked.to(dtype) if momentum is None else momentum
    unbiased = (var[0].detach() * (count / (count - fitted))).to(dtype)
    running_mean.lerp_(mean[0].detach().to(dtype), step)
    running_var.lerp_(unbiased, step)
    return scale
