"""N of the equations: normalisation without affine parameters, as an affine form whose statistics are taken once a map.

The modules are PyTorch's own (GroupNorm, BatchNorm2d, InstanceNorm2d with affine=False), so that they print, save, move
and convert to SyncBatchNorm as everywhere else; only what they would compute is written down here as N(x) = r * x + s.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from .errors import DenseShortcutError

NormFactory = Callable[[int], nn.Module]
Norm = str | NormFactory | None

NORMS = ("group", "batch", "layer", "instance")


def default_groups(channels: int) -> int:
    """32 groups as in Group Normalization (Wu and He, 2018), fewer in narrow stages: four channels a group at least."""
    limit = min(32, max(1, channels // 4))
    return next(g for g in range(limit, 0, -1) if channels % g == 0)


def make_norm(norm: Norm, channels: int, groups: int | None = None) -> nn.Module | None:
    """A fresh norm for maps of `channels` channels, or None where maps are used as they are.

    Raises:
        DenseShortcutError: unknown name, or a group count that does not divide the channels.
    """
    if groups is not None and norm != "group":
        raise DenseShortcutError(f"groups={groups} goes with norm='group', not with norm={norm!r}: leave groups out.")
    if norm is None:
        return None
    if norm == "group":
        groups = default_groups(channels) if groups is None else groups
        if groups < 1 or channels % groups:
            raise DenseShortcutError(
                f"{groups} groups do not divide the {channels} channels of a stage: choose a divisor of {channels}."
            )
        return nn.GroupNorm(groups, channels, affine=False)
    if norm == "layer":
        return nn.GroupNorm(1, channels, affine=False)
    if norm == "batch":
        return nn.BatchNorm2d(channels, affine=False)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=False)
    if callable(norm):
        module = norm(channels)
        if not isinstance(module, nn.Module):
            raise DenseShortcutError(
                f"the norm factory returned {type(module).__name__}: it must take a channel count and return a module."
            )
        return module
    raise DenseShortcutError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}, None, or a factory.")


def has_affine_form(norm: nn.Module) -> bool:
    """Whether `affine_form` knows this module; any other norm is called as it stands."""
    known = type(norm) in (nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)
    if not known or norm.affine:
        return False
    return not (isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats)


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether statistics are over the batch, so that the affine form is the same for all its images."""
    return isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)


def uses_running_statistics(norm: nn.Module) -> bool:
    """Whether the norm goes by its running statistics alone: batch norm in eval mode."""
    return (
        isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def affine_form(norm: nn.Module, mean: Tensor | None, var: Tensor | None, pixels: int) -> tuple[Tensor, Tensor]:
    """r and s with norm(x) = r * x + s; in training, batch norm updates its running statistics as PyTorch's does.

    Args:
        norm: a module for which `has_affine_form` holds.
        mean, var: `moments` of x, both (N, C); None where `uses_running_statistics` holds.
        pixels: H * W of x.

    Returns:
        r and s, (1, C) for batch norm and (N, C) for the others, in float32 (float64 for a float64 map).
    """
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        mean, var = _batch_moments(norm, mean, var, pixels)
    assert mean is not None and var is not None
    if isinstance(norm, nn.GroupNorm):
        mean, var = _group_moments(mean, var, norm.num_groups)
    assert isinstance(norm.eps, float)
    r = torch.rsqrt(var + norm.eps)
    return r, -mean * r


def _group_moments(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    n, c = mean.shape
    mean, var = _pool(mean.view(n, groups, c // groups), var.view(n, groups, c // groups), dim=2)
    return mean.expand(n, groups, c // groups).reshape(n, c), var.expand(n, groups, c // groups).reshape(n, c)


def _pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Moments of a union of equally large sets (law of total variance), without the cancellation of E[x^2] - E[x]^2."""
    between, pooled = torch.var_mean(mean, dim=dim, correction=0, keepdim=True)
    return pooled, var.mean(dim=dim, keepdim=True) + between


def _batch_moments(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor | None, var: Tensor | None, pixels: int
) -> tuple[Tensor, Tensor]:
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    synchronised = isinstance(norm, nn.SyncBatchNorm) and norm.training and _world_size(norm) > 1
    group = (norm.process_group or dist.group.WORLD) if synchronised else None
    return _batch_statistics(mean, var, pixels, *buffers, norm.momentum, norm.training, group)


@torch.fx.wrap  # one node of a traced graph, whose buffers stay buffers
def _batch_statistics(
    mean: Tensor | None,
    var: Tensor | None,
    pixels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    training: bool,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """Batch norm's mean and variance, (1, C): the running ones in eval mode, else the batch's, which move those on."""
    if not training and running_mean is not None and running_var is not None:
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        return running_mean.to(dtype)[None], running_var.to(dtype)[None]
    assert mean is not None and var is not None
    images = mean.shape[0] * pixels
    count: int | Tensor = images
    mean, var = _pool(mean, var, dim=0)
    if group is not None:
        mean, var, count = _across_processes(mean, var, images, group)
    elif count == 1:  # as F.batch_norm does
        raise ValueError("Expected more than 1 value per channel when training, got one image of one pixel")
    if training and running_mean is not None and running_var is not None and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        dtype = running_mean.dtype
        # momentum=None asks for the cumulative average, as in PyTorch
        step: float | Tensor = 1.0 / num_batches_tracked.to(dtype) if momentum is None else momentum
        running_mean.lerp_(mean.detach()[0].to(dtype), step)
        running_var.lerp_((var * count / (count - 1)).detach()[0].to(dtype), step)
    return mean, var


def _world_size(norm: nn.SyncBatchNorm) -> int:
    return dist.get_world_size(norm.process_group) if dist.is_available() and dist.is_initialized() else 1


def _across_processes(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Moments over the batches of all processes, which may differ in size; gradients cross the processes too."""
    from torch.distributed.nn.functional import all_reduce

    total = mean.new_tensor(float(count))
    dist.all_reduce(total, group=group)
    share = count / total
    joint = all_reduce(mean * share, group=group)
    return joint, all_reduce((var + (mean - joint).square()) * share, group=group), total
