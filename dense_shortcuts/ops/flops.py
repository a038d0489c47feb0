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


def _block(addends: Any, branch: Any, affine: Any, fixed: Any, eps: float, maps: Any, *rest: Any, **_: Any) -> int:
    weight, all_maps = rest[0], [*maps, branch, *addends]
    numbers = math.prod(next(shape for shape in all_maps if shape is not None))
    return 2 * numbers * (len(maps) * (weight is not None) + (branch is not None))


def _pull_block(
    y: Shape, own: Any, grad: Any, grad_rate: Any, grad_shift: Any, later: Any, *rest: Any, **_: Any
) -> int:
    branch, maps = rest[2], rest[6]
    statistics = grad_rate is not None or grad_shift is not None
    # the later gradients and the statistics' own into G; a product with each map for its scale; G into the branch
    return 2 * math.prod(y) * (len(later) + statistics + len(maps) + 3 * (branch is not None))


def _pull_entered(x: Shape, own: Any, grad_rate: Any, grad_shift: Any, later: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * (len(later) + (grad_rate is not None or grad_shift is not None))


def _mix(maps: list[Shape], scales: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(maps[0]) * len(maps) * scales[0]


def _ahead(maps: list[Shape], links: Any, scales: Shape, *_: Any, **__: Any) -> int:
    return _mix(maps, scales)


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
        (operators.block, _block),
        (operators.pull_block, _pull_block),
        (operators.pull_entered, _pull_entered),
        (operators.ahead, _ahead),
        (operators.mix, _mix),
        (operators.dots, _dots),
    ]
    for operator, formula in formulas:
        register_flop_formula(operator)(formula)
