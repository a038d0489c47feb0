"""The operator as modules and users call it: one function for every back end.

Functions under `torch.fx.wrap` are traced as a single call, so a traced graph chooses its back end when it runs, as the
network itself does. Modules call them as attributes of this module, because that is where torch.fx patches them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn

from ..errors import DenseShortcutError
from . import autograd
from .backend import choose
from .backends import native, reference
from .backends.reference import accumulation_dtype

Links = Sequence[Tensor]


class MapStats(NamedTuple):
    """A map (N, C, H, W), its moments, (N, C) each, or (0,) if not requested, and the links of later sums to it."""

    map: Tensor
    mean: Tensor
    var: Tensor
    links: Links


def dense_add(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """s(sum of addends + b + sum_i a_i * X_i), differentiable in all its inputs, in one pass over each map.

    Args:
        addends: maps that are added unscaled, such as the residual branch F_l, each (N, C, H, W).
        maps: maps that are scaled, such as the finished X_0 .. X_{l-1}, each (N, C, H, W). At least one addend or map
            is required, and all must have one shape.
        scales: the coefficients a_i, (len(maps), 1 or N, C); None for ones.
        bias: b, (1 or N, C); None for zero.
        activation: s; None for none. ReLU, as a module or a function, is part of the pass.
        backend: "auto", "plain" (PyTorch only, any device), "native" or "triton", see `backend.choose`.

    Returns:
        (N, C, H, W) in the dtype of the first addend, or of the first map if there are no addends; the sum is
        accumulated in float32 or better.

    Raises:
        ValueError: shapes that do not match.
        DenseShortcutError: a named back end that cannot run here.

    Source: the affine form of DS, a = w / sigma and b = -sum w * mu / sigma (docs/paper-map.md).
    """
    relu = is_relu(activation)
    y = _dense_add(addends, maps, scales, bias, relu, backend)
    return y if relu or activation is None else activation(y)


@torch.fx.wrap
def _dense_add(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    backend: str,
) -> Tensor:
    first = (*addends, *maps)[0]
    _check(first, addends, maps, scales, bias)
    backend = choose(first, backend)
    per_image = scales is not None and scales.shape[1] > 1
    options: dict[str, Any] = {"statistics": False, "num_consumers": 1, "per_image": per_image, "backend": backend}
    links = [feature_stats(x, **options).links for x in maps]
    return add_features(addends, maps, links, scales, bias, relu=relu, backend=backend).map


def is_relu(activation: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether an activation is ReLU, which the kernels compute."""
    return type(activation) is nn.ReLU or activation in (F.relu, torch.relu)


@torch.fx.wrap
def add_features(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    links: Sequence[Links],
    scales: Tensor | None,
    bias: Tensor | None,
    *,
    relu: bool = False,
    statistics: bool = False,
    num_consumers: int = 0,
    per_image: bool = False,
    backend: str,
    overwrite: bool = False,
) -> MapStats:
    """`dense_add`, with the moments and links of its result that later sums need.

    Args:
        addends, maps, scales, bias: as in `dense_add`.
        links: the link of each map to this sum, two tensors; empty on the plain path and where gradients are off.
        relu: whether s is ReLU; otherwise there is no activation.
        statistics: whether to compute the moments of the result.
        num_consumers: number of later sums that read the result, each of which takes a link.
        per_image: whether the coefficients in those sums have a row for each image; otherwise one row.
        backend: "auto", or a result of `choose`.
        overwrite: whether the native back end may write the result over the first addend or map; gradients must be off.

    Raises:
        DenseShortcutError: gradients are on, but a map was made while they were off.
    """
    first = (*addends, *maps)[0]
    backend = choose(first, backend)
    if backend == "plain":
        return MapStats(*reference.join(addends, maps, scales, bias, relu, statistics), ())
    recorded = is_grad_enabled()
    if recorded and not all(links):
        raise DenseShortcutError(
            "a part of a stage ran without gradients, so its shortcuts would get none: run the whole stage in one mode "
            "(for activation checkpointing, with use_reentrant=False)."
        )
    if scales is None:
        scales = first.new_ones((len(maps), 1, first.shape[1]), dtype=accumulation_dtype(first.dtype))
    if overwrite:
        return MapStats(*native.join(addends, maps, scales, bias, relu, statistics, overwrite=True), ())
    flat = [t for link in links for t in link] if recorded else []
    consumers, rows = num_consumers if recorded else 0, first.shape[0] if per_image else 1
    return MapStats(*autograd.dense_add(addends, maps, flat, scales, bias, relu, statistics, consumers, rows, backend))


@torch.fx.wrap
def feature_stats(x: Tensor, *, statistics: bool, num_consumers: int, per_image: bool, backend: str) -> MapStats:
    """Moments and links of a map (N, C, H, W) that is not the result of a sum; arguments as in `add_features`."""
    recorded = is_grad_enabled()
    backend = choose(x, backend) if statistics or recorded else "plain"
    if backend == "plain":
        mean, var = reference.moments(x) if statistics else [x.new_empty(0)] * 2
        return MapStats(x, mean, var, ())
    rows = x.shape[0] if per_image else 1
    return MapStats(x, *autograd.feature_stats(x, statistics, num_consumers if recorded else 0, rows, backend))


def _check(
    first: Tensor, addends: Sequence[Tensor], maps: Sequence[Tensor], scales: Tensor | None, bias: Tensor | None
) -> None:
    shapes = {tuple(x.shape) for x in (*addends, *maps)}
    if len(shapes) > 1 or first.ndim != 4:
        raise ValueError(f"the maps of a sum must have one shape (N, C, H, W), not {', '.join(map(str, shapes))}.")
    rows = {(1, first.shape[1]), (first.shape[0], first.shape[1])}
    if scales is not None and (scales.shape[0] != len(maps) or tuple(scales.shape[1:]) not in rows):
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit: give ({len(maps)}, 1 or N, C).")
    if bias is not None and tuple(bias.shape) not in rows:
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit: give (1 or N, C).")
