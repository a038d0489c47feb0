"""N of the equations, as an affine form whose statistics are taken once a map.

The modules are PyTorch's own (GroupNorm, BatchNorm2d, InstanceNorm2d with affine=False), so that they print, save, move
and convert to SyncBatchNorm as everywhere else; only what they would compute is written down here as N(x) = r * x + s.
The last norm of a residual branch, with its affine parameters, has such a form too.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..errors import DenseShortcutError
from ..ops import BATCH, NONE, RAW, form, pool

NormFactory = Callable[[int], nn.Module]
Norm = str | NormFactory | None

NORMS = ("auto", "group", "batch", "layer", "instance", "none")
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # a tuple, for the compiler of PyTorch 2.9 does not know A | B
_KNOWN = (nn.GroupNorm, *BATCH_NORMS, nn.InstanceNorm2d)


def default_groups(channels: int) -> int:
    """32 groups as in Group Normalization (Wu and He, 2018), fewer in narrow stages: four channels a group at least."""
    limit = min(32, max(1, channels // 4))
    return next(g for g in range(limit, 0, -1) if channels % g == 0)


class TokenNorm(nn.LayerNorm):
    """Layer norm of each token over its channels, for tokens that come as maps, (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(norm: Norm, channels: int, groups: int | None = None, *, tokens: bool = False) -> nn.Module | None:
    """A fresh norm for maps of `channels` channels, or None where maps are used as they are.

    "layer" is over all of an image, group norm with one group, as is usual for feature maps; for tokens it is over the
    channels of each token, as is usual there. "auto" is "layer" for tokens and "group" for feature maps. "none" is
    another word for None, which `timm.create_model` does not hand on.

    Raises:
        DenseShortcutError: unknown name, or a group count that does not divide the channels.
    """
    if groups is not None and norm not in ("auto", "group"):
        raise DenseShortcutError(f"groups={groups} goes with norm='group', not with norm={norm!r}: leave groups out.")
    if norm == "auto":
        norm = "layer" if tokens else "group"
    if norm is None or norm == "none":
        return None
    if norm == "layer" and tokens:
        return TokenNorm(channels, elementwise_affine=False)
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
    raise DenseShortcutError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}, or a factory.")


def has_affine_form(norm: nn.Module) -> bool:
    """Whether `affine_form` knows this module; any other norm is called as it stands."""
    return type(norm) in _KNOWN and not (isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats)


def joins(norm: nn.Module) -> bool:
    """Whether the last norm of a residual branch may be computed by the operator: batch norm on one process."""
    return type(norm) in BATCH_NORMS and not _is_synchronised(norm)


@contextlib.contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Batch norms in these modules normalise as ever but leave their running statistics and counters as they are.

    A forward pass that is run a second time to recompute activations would otherwise count its batch twice.
    """
    norms = [
        norm
        for module in modules
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and norm.track_running_stats
    ]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, counter in kept:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if counter is None else counter.clone()
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum, norm.num_batches_tracked = momentum, counter


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether statistics are over the batch, so that the affine form is the same for all its images."""
    return isinstance(norm, BATCH_NORMS)


def uses_running_statistics(norm: nn.Module) -> bool:
    """Whether the norm goes by its running statistics alone: batch norm in eval mode."""
    return (
        isinstance(norm, BATCH_NORMS)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def statistics(norm: nn.Module | None) -> tuple[int, float]:
    """What the operator is to gather of a map for this norm, and eps: a number of groups, BATCH, RAW or NONE."""
    if norm is None or uses_running_statistics(norm):
        return NONE, 0.0
    assert isinstance(norm, _KNOWN)
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups, norm.eps
    if isinstance(norm, nn.InstanceNorm2d):
        return norm.num_features, norm.eps
    return RAW if _is_synchronised(norm) else BATCH, norm.eps


def known(norm: nn.Module) -> ops.KnownNorm | None:
    """What a kernel needs to compute a norm by itself; None for one that moves statistics or is no known one."""
    if not has_affine_form(norm) or (is_batch_norm(norm) and not uses_running_statistics(norm)):
        return None
    affine, eps = (_tensor(norm.weight), _tensor(norm.bias)), _tensor(norm.eps)
    if is_batch_norm(norm):
        return ops.KnownNorm(ops.RUNNING, eps, *affine, _tensor(norm.running_mean), _tensor(norm.running_var))
    return ops.KnownNorm(statistics(norm)[0], eps, *affine)


def goes_by_batch(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a norm is batch norm by the batch at hand alone, with running statistics that it moves by a fixed share.

    Its parameters and statistics are then its own, in this dtype, one number behind the other.
    """
    if type(norm) is not nn.BatchNorm2d or not norm.training or not norm.track_running_stats:
        return False
    parameters, buffers = norm._parameters, norm._buffers
    if not {"weight", "bias"} <= parameters.keys() or not isinstance(norm.momentum, float):
        return False
    if any(buffers.get(name) is None for name in ("running_mean", "running_var", "num_batches_tracked")):
        return False
    given = (parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"])
    return all(t is None or (t.dtype == dtype and t.is_contiguous()) for t in given)


def affine_form(norm: nn.Module, gathered: Sequence[Tensor], x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """r and s with norm(x) = r * x + s; in training, batch norm updates its running statistics as PyTorch's does.

    Args:
        norm: a module for which `has_affine_form` holds.
        gathered: what the operator gave for `statistics` of the norm: r and s without affine parameters, pooled mean
            and variance; for RAW the mean and variance of each channel and image in place of r and s.
        x: the map, (N, C, H, W).
        backend: from `ops.choose`.

    Returns:
        r and s, (1, C) for batch norm and (N, C) for the others, in float32 (float64 for a float64 map).
    """
    assert isinstance(norm.eps, float)
    weight, bias = _tensor(norm.weight), _tensor(norm.bias)
    if uses_running_statistics(norm):
        return running_form(norm, x, backend)
    rate, shift, pooled, variance = gathered
    if isinstance(norm, BATCH_NORMS):
        count = _counted(x.shape[0], x.shape[2] * x.shape[3])
        if _is_synchronised(norm):
            rate, shift, pooled, variance, total = _across_processes(norm, rate, shift, count)
            rate = move_statistics(norm, rate, pooled, variance, total, backend)
        else:
            rate = move_statistics(norm, rate, pooled, variance, count, backend)
    if weight is not None:
        rate, shift = rate * weight.to(rate.dtype), shift * weight.to(shift.dtype)
    return rate, shift if bias is None else shift + bias.to(shift.dtype)


@torch.fx.wrap
def _counted(images: int, pixels: int) -> int:
    """Values a channel of batch norm is normalised over."""
    if images * pixels == 1:  # as F.batch_norm does
        raise ValueError("Expected more than 1 value per channel when training, got one image of one pixel")
    return images * pixels


def _tensor(value: Any) -> Any:
    """A norm's parameter or buffer, which may be None; PyTorch annotates these as modules too."""
    return value


def running_form(norm: nn.Module, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """r and s of batch norm by its running statistics, both (1, C), for a map x (N, C, H, W)."""
    assert isinstance(norm, BATCH_NORMS)
    mean, var = _tensor(norm.running_mean), _tensor(norm.running_var)
    return _running_form(x, mean, var, norm.eps, norm.weight, norm.bias, backend)


@torch.fx.wrap  # one node of a traced graph, whose buffers stay buffers
def _running_form(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    # x is also taken so that a trace has something to hang the node on: it would fold the buffers into constants else
    if mean.shape[0] != x.shape[1]:
        raise ValueError(f"a batch norm of {mean.shape[0]} channels was given a map of {x.shape[1]} channels")
    return ops.running_form(mean, var, eps, weight, bias, backend)


def move_statistics(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm,
    rate: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    backend: str,
) -> Tensor:
    """One step of the running statistics by a batch's mean and biased variance, both (1, C), over `count` values.

    Gives `rate` back as it is: a traced graph would drop a step whose result nobody takes.
    """
    if not (norm.training and norm.track_running_stats):
        return rate
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return _move_statistics(rate, mean, var, count, norm.momentum, *buffers, backend)


@torch.fx.wrap
def _move_statistics(
    rate: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    backend: str,
) -> Tensor:
    if running_mean is None or running_var is None or num_batches_tracked is None:
        return rate
    num_batches_tracked.add_(1)
    if isinstance(count, int) and count == 0:  # an empty batch says nothing, as with PyTorch's own
        return rate
    dtype = running_mean.dtype
    # momentum=None asks for the cumulative average, as in PyTorch
    step: float | Tensor = 1.0 / num_batches_tracked.to(dtype) if momentum is None else momentum
    ops.move((running_mean, running_var), (mean, var), count / (count - 1), step, backend)
    return rate


def _is_synchronised(norm: nn.Module) -> bool:
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and _world_size(norm) > 1


def _world_size(norm: nn.SyncBatchNorm) -> int:
    return dist.get_world_size(norm.process_group) if dist.is_available() and dist.is_initialized() else 1


def _across_processes(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor, var: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch norm over the batches of all processes, which may differ in size; gradients cross the processes too.

    Returns:
        r and s without affine parameters, mean and variance, all (1, C), and the number of values a channel has.
    """
    from torch.distributed.nn.functional import all_reduce

    group = _tensor(norm.process_group) or dist.group.WORLD
    # a process without images takes part with zeros that weigh nothing: a mean over none would be NaN for all
    mean, var = pool(mean, var, 0) if count else (mean.sum(0, keepdim=True), var.sum(0, keepdim=True))
    total = mean.new_tensor(float(count))
    dist.all_reduce(total, group=group)
    share = count / total.clamp(min=1)
    joint = all_reduce(mean * share, group=group)
    var = all_reduce((var + (mean - joint).square()) * share, group=group)
    rate, shift, _, _ = form(joint, var, BATCH, norm.eps, None, None)
    return rate, shift, joint, var, total
