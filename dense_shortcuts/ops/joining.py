"""The operator as modules call it: one function whatever the back end."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DenseShortcutError
from .reference import accumulation_dtype, dense_sum, moments


class Joined(NamedTuple):
    """A finished feature map, (N, C, H, W), its moments, both (N, C) or None, and the links of later sums to it."""

    map: Tensor
    mean: Tensor | None
    var: Tensor | None
    links: tuple[Tensor, ...]


def join(
    branch: Tensor,
    maps: Sequence[Tensor],
    links: Sequence[tuple[Tensor, ...]],
    scales: Tensor | None,
    bias: Tensor | None,
    *,
    relu: bool,
    statistics: bool,
    later: int,
    backend: str,
) -> Joined:
    """s(branch + bias + sum_i scales[i] * maps[i]) with what later sums need of it.

    Args:
        branch: residual branch, (N, C, H, W).
        maps: earlier feature maps, each (N, C, H, W).
        links: the link of each map to this sum; empty tuples on the plain path and where no gradient is asked for.
        scales: (len(maps), 1 or N, C); None for ones.
        bias: (1 or N, C); None for zero.
        relu: whether s is ReLU, else there is none.
        statistics: whether the moments are wanted.
        later: number of later sums that take the result.
        backend: from `choose`.

    Raises:
        DenseShortcutError: gradients are on, but a map was made while they were off.
    """
    if backend == "plain":
        y = dense_sum(branch, maps, scales, bias)
        y = torch.relu(y) if relu else y
        mean, var = moments(y) if statistics else (None, None)
        return Joined(y, mean, var, ())
    from . import fused

    linked = torch.is_grad_enabled()
    if linked and not all(links):
        raise DenseShortcutError(
            "a stage ran in part without gradients, so its shortcuts would get none: run it whole under one mode "
            "(for activation checkpointing, with use_reentrant=False)."
        )
    if scales is None:
        scales = branch.new_ones((len(maps), 1, branch.shape[1]), dtype=accumulation_dtype(branch.dtype))
    flat = [t for link in links for t in link] if linked else []
    y, mean, var, new = fused.join(branch, maps, flat, scales, bias, relu, statistics, later if linked else 0, backend)
    return Joined(y, mean, var, tuple(new)) if statistics else Joined(y, None, None, tuple(new))


def enter(x: Tensor, *, statistics: bool, later: int, rows: int, backend: str) -> Joined:
    """A map that no `join` made, (N, C, H, W), with what later sums need of it; `rows` are those of their scales."""
    if backend == "plain":
        mean, var = moments(x) if statistics else (None, None)
        return Joined(x, mean, var, ())
    from . import fused

    mean, var, new = fused.enter(x, statistics, later if torch.is_grad_enabled() else 0, rows, backend)
    return Joined(x, mean, var, tuple(new)) if statistics else Joined(x, None, None, tuple(new))
