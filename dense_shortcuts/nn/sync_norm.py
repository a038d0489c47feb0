"""Batch norm over the batches of several processes."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..ops.affine import pool


def is_synchronised(norm: nn.Module) -> bool:
    """Whether a batch norm takes its statistics over the batches of several processes."""
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and _world_size(norm) > 1


def _world_size(norm: nn.SyncBatchNorm) -> int:
    return dist.get_world_size(norm.process_group) if dist.is_available() and dist.is_initialized() else 1


def across_processes(norm: Any, mean: Tensor, var: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments over the batches of all processes, which may differ in size; gradients cross the processes too.

    Returns:
        mean and variance, both (1, C), and the number of values a channel has.
    """
    from torch.distributed.nn.functional import all_reduce

    group = norm.process_group or dist.group.WORLD
    # a process without images takes part with zeros that weigh nothing: a mean over none would be NaN for all
    mean, var = pool(mean, var, 0) if count else (mean.sum(0, keepdim=True), var.sum(0, keepdim=True))
    total = mean.new_tensor(float(count))
    dist.all_reduce(total, group=group)
    share = count / total.clamp(min=1)
    joint = all_reduce(mean * share, group=group)
    return joint, all_reduce((var + (mean - joint).square()) * share, group=group), total
