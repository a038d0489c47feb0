"""The operation for who has maps and coefficients at hand, apart from any stage."""

from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .dispatch import choose
from .forms import NONE
from .joining import enter, join
from .reference import accumulation_dtype

_RELUS = (F.relu, torch.relu)


def dense_sum(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """s(sum of addends + b + sum_i a_i * X_i), differentiable in all of them, in one pass over each map.

    Args:
        addends: maps that are added as they stand, such as the residual branch F_l, each (N, C, H, W).
        maps: maps that are scaled, such as the finished X_0 .. X_{l-1}, each (N, C, H, W). There is at least one addend
            or map, and all have one shape.
        scales: a_i, (len(maps), 1 or N, C); None adds the maps as they are.
        bias: b, (1 or N, C); None for zero.
        activation: s; None for none. ReLU, as a module or a function, joins the pass.
        backend: "auto", "plain" (PyTorch alone, any device), "cpu", "native" or "triton", see `choose`.

    Returns:
        (N, C, H, W) in the dtype of the first addend, or without addends of the first map; the sum itself is kept in
        float32 or better.

    Raises:
        ValueError: shapes that do not go together.
        DenseShortcutError: a named back end that cannot run here.

    Source: the affine form of DS, a = w / sigma and b = -sum w * mu / sigma (docs/paper-map.md).
    """
    first = (*addends, *maps)[0]
    if not isinstance(first, torch.fx.Proxy):  # which knows no shapes
        _check(first, addends, maps, scales, bias)
    backend = choose(first, backend)
    if backend == "plain" or not maps:
        y = reference.dense_sum(addends, maps, scales, bias)
        return y if activation is None else activation(y)
    rates, shifts = _forms(first, len(maps), scales, bias)
    rows = rates[0].shape[0] if rates else 1
    entered = [enter(x, groups=NONE, eps=0.0, later=1, rows=rows, backend=backend) for x in maps]
    relu = is_relu(activation)
    y = join(
        addends,
        None,
        maps,
        [each.links for each in entered],
        rates[0].new_ones(len(maps), first.shape[1]) if rates else None,
        rates,
        shifts,
        relu=relu,
        groups=NONE,
        eps=0.0,
        later=0,
        backend=backend,
    ).map
    return y if relu or activation is None else activation(y)


def is_relu(activation: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether an activation is ReLU, which the kernels compute."""
    return type(activation) is nn.ReLU or activation in _RELUS


def _forms(first: Tensor, count: int, scales: Tensor | None, bias: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """a_i and shares of b for each map, (1 or N, C), as the operator takes them; nothing for a sum of maps alone."""
    if scales is None and bias is None:
        return [], []
    dtype, channels = accumulation_dtype(first.dtype), first.shape[1]
    scales = first.new_ones((count, 1, channels), dtype=dtype) if scales is None else scales.to(dtype)
    bias = scales.new_zeros(1, channels) if bias is None else bias.to(dtype)
    rows = max(scales.shape[1], bias.shape[0])
    shifts = [bias.expand(rows, -1), *[scales.new_zeros(rows, channels)] * (count - 1)]
    return [a.expand(rows, -1) for a in scales], shifts


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
