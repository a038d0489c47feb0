"""What the operator costs, for counters: two operations (a multiply-add) for each number of each map in a weighted sum.

`torch.utils.flop_counter.FlopCounterMode` knows the registered operators once they are in use. Where the plain form
runs, its sums are PyTorch's addcmul, which counters pass over: `PLAIN` is a custom mapping for FlopCounterMode, and
`FVCORE_HANDLES` are for fvcore (`FlopCountAnalysis(...).set_op_handle(**FVCORE_HANDLES)`), which traces the plain form
and counts multiply-adds. As everywhere, norms and activations are not counted.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _addcmul(first: Shape, x: Shape, scale: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) if len(out_shape) == 4 else 0  # maps, not the arithmetic per channel


def _dense_add(addends: Any, maps: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod((*addends, *maps)[0]) * len(maps)


def _pull(x: Shape, grad: Any, offset: Any, slope: Any, later: list[Shape], *rest: Any, **_: Any) -> int:
    # the later gradients and that of the moments into G, and a product with each map for its scale
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
    """Tell PyTorch's counter about the registered operators."""
    operators = torch.ops.dense_shortcuts
    formulas: list[tuple[Any, Callable[..., int]]] = [
        (operators.dense_add, _dense_add),
        (operators.pull, _pull),
        (operators.partial_sums, _partial_sums),
        (operators.dots, _dots),
    ]
    for operator, formula in formulas:
        register_flop_formula(operator)(formula)
