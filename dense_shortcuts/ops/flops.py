"""FLOP formulas of the operator: a multiply-add (two operations) for each element of each map in a weighted sum.

`torch.utils.flop_counter.FlopCounterMode` knows the registered operators. On the plain path, sums are PyTorch's
addcmul, which counters ignore: `PLAIN` is a custom mapping for FlopCounterMode, and `FVCORE_HANDLES` is for fvcore
(`FlopCountAnalysis(...).set_op_handle(**FVCORE_HANDLES)`), which traces the plain path and counts multiply-adds. As
usual, norms and activations are not counted.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _addcmul(first: Shape, x: Shape, scale: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) if len(out_shape) == 4 else 0  # maps only, not per-channel arithmetic


def _dense_add(addends: Any, maps: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod((*addends, *maps)[0]) * len(maps)


def _pull(x: Shape, grad: Any, offset: Any, slope: Any, later: list[Shape], *rest: Any, **_: Any) -> int:
    # G from the later gradients and the moments; a product with each map for the gradient of its coefficient
    return 2 * math.prod(x) * (len(later) + (slope is not None) + len(rest[1]))


def _partial_sums(maps: list[Shape], links: Any, scales: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(maps[0]) * len(maps) * scales[0]


def _dots(grads: list[Shape], maps: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(maps[0]) * len(maps) * len(grads)


def _fvcore_addcmul(inputs: list[Any], outputs: list[Any]) -> int:
    sizes = outputs[0].type().sizes()
    return math.prod(sizes) if len(sizes) == 4 else 0


PLAIN: dict[Any, Callable[..., int]] = {torch.ops.aten.addcmul: _addcmul}
FVCORE_HANDLES: dict[str, Callable[..., int]] = {"aten::addcmul": _fvcore_addcmul}


def register() -> None:
    """Register the formulas with PyTorch's counter."""
    operators = torch.ops.dense_shortcuts
    formulas: list[tuple[Any, Callable[..., int]]] = [
        (operators.dense_add, _dense_add),
        (operators.pull, _pull),
        (operators.partial_sums, _partial_sums),
        (operators.dots, _dots),
    ]
    for operator, formula in formulas:
        register_flop_formula(operator)(formula)
