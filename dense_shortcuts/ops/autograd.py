"""The operator as registered PyTorch operators, whose gradients are pulled rather than pushed.

In a sum y_l = s(f_l + b_l + sum_i a_{l,i} * X_i), autograd would push a gradient a_{l,i} * G_l to every earlier map
X_i, and each would be written to memory and accumulated; G_l is the gradient of y_l before the activation. Instead,
each pair (l, i) has a *link*: two outputs of the operator that made X_i, which are inputs of the operator that makes
y_l. Links hold no data (one element, expanded); in the backward pass their gradients are G_l and a_{l,i} themselves.
The operator that made X_i thus receives all later gradients together and sums a_{l,i} * G_l in one pass, which also
adds the gradient through X_i's moments, applies the activation's mask, and computes the gradients of its own
coefficients and bias. Saved for the backward pass are the maps, which the host's next convolutions save anyway, and
numbers per channel.

Eager code, torch.compile, torch.export and fake tensors all use these operators; `tiled.py` has those of deep stages.

Source: the affine form in docs/paper-map.md; the operators are tested against `backends/reference.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import kernels
from .backends import reference
from .backends.reference import accumulation_dtype, new_map

custom_op: Any = torch.library.custom_op


def new_links(x: Tensor, num_consumers: int, rows: int) -> list[Tensor]:
    """Two tensors for each later sum that reads x; only their gradients matter."""
    dtype = accumulation_dtype(x.dtype)
    links = []
    for _ in range(num_consumers):  # outputs of an operator must not share memory
        links += [x.new_zeros(1).expand(x.shape), x.new_zeros(1, dtype=dtype).expand(rows, x.shape[1])]
    return links


def _new_moments(x: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if statistics else (0,)
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@custom_op("dense_shortcuts::dense_add", mutates_args=())
def dense_add(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    links: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    num_consumers: int,
    rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """A weighted sum of maps, and the moments of the result.

    Args:
        addends, maps, scales, bias, relu, statistics: as in `reference.join`.
        links: two tensors per map, from the operator that made it; empty if no gradient is needed.
        num_consumers: number of later sums that read the result, each of which takes a link.
        rows: rows of the coefficients in those sums, 1 or N.
        backend: name of the back end whose kernels run.

    Returns:
        y (N, C, H, W); its moments, (N, C) each, or (0,); the links.
    """
    y, mean, var = kernels(backend).join(addends, maps, scales, bias, relu, statistics)
    return y, mean, var, new_links(y, num_consumers, rows)


@dense_add.register_fake
def _(addends: Sequence[Tensor], maps: Sequence[Tensor], *settings: Any) -> Any:
    *_, statistics, num_consumers, rows, _ = settings
    y = new_map((*addends, *maps)[0])
    return y, *_new_moments(y, statistics), new_links(y, num_consumers, rows)


def _dense_add_setup(ctx: Any, inputs: Any, output: Any) -> None:
    addends, maps, links, scales, bias, relu, statistics, _, _, backend = inputs
    y, mean, _, _ = output
    ctx.set_materialize_grads(False)
    # y is read again for ReLU's mask and for its moments; without either, a later activation may overwrite it
    kept = (y, mean) if statistics else (y, None) if relu else (None, None)
    ctx.save_for_backward(*kept, scales, *maps)
    ctx.counts, ctx.bias_rows = (len(addends), len(links)), None if bias is None else bias.shape[0]
    ctx.relu, ctx.backend = relu, backend


def _dense_add_backward(ctx: Any, grad: Any, grad_mean: Any, grad_var: Any, grad_links: Any) -> Any:
    y, mean, scales, *maps = ctx.saved_tensors
    num_addends, num_links = ctx.counts
    grads: list[Any] = [[None] * num_addends, [None] * len(maps), [None] * num_links, *[None] * 7]
    later = pairs(grad_links)
    if grad is None and grad_mean is None and grad_var is None and not later[0]:
        return tuple(grads)
    y = next(g for g in (grad, *later[0]) if g is not None) if y is None else y
    moved = through_moments(y, mean, grad_mean, grad_var)
    needed = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    rows = max(scales.shape[1], ctx.bias_rows or 1) if needed else 0
    g, grad_scales, grad_bias = pull(y, grad, *moved, *later, maps if needed else [], rows, ctx.relu, ctx.backend)
    grads[0] = [g] * num_addends
    grads[2] = [t for a in scales for t in (g, a)] if num_links else []
    if needed:
        grads[3] = grad_scales if scales.shape[1] == rows else grad_scales.sum(1, keepdim=True)
    if needed and ctx.bias_rows is not None:
        grads[4] = grad_bias if ctx.bias_rows == rows else grad_bias.sum(0, keepdim=True)
    return tuple(grads)


dense_add.register_autograd(_dense_add_backward, setup_context=_dense_add_setup)


@custom_op("dense_shortcuts::feature_stats", mutates_args=())
def feature_stats(
    x: Tensor, statistics: bool, num_consumers: int, rows: int, backend: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Moments and links of a map that `dense_add` did not make: X_0, a branch, a map after a separate activation.

    Args and returns as in `dense_add`.
    """
    mean, var = kernels(backend).moments(x) if statistics else _new_moments(x, False)
    return mean, var, new_links(x, num_consumers, rows)


@feature_stats.register_fake
def _(x: Tensor, statistics: bool, num_consumers: int, rows: int, backend: str) -> Any:
    return *_new_moments(x, statistics), new_links(x, num_consumers, rows)


def _feature_stats_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, statistics, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[0] if statistics else None)


def _feature_stats_backward(ctx: Any, grad_mean: Any, grad_var: Any, grad_links: Any) -> Any:
    x, mean = ctx.saved_tensors
    later = pairs(grad_links)
    if grad_mean is None and grad_var is None and not later[0]:
        return (None,) * 5
    moved = through_moments(x, mean, grad_mean, grad_var)
    return pull(x, None, *moved, *later, [], 0, False, ctx.backend)[0], *[None] * 4


feature_stats.register_autograd(_feature_stats_backward, setup_context=_feature_stats_setup)


def pairs(grad_links: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The later gradients and coefficients that came back through links; links of unused sums bring None."""
    found = [(g, a) for g, a in zip(grad_links[::2], grad_links[1::2], strict=True) if g is not None and a is not None]
    return [g for g, _ in found], [a for _, a in found]


def through_moments(
    x: Tensor, mean: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of x through its moments, as offset + slope * x, (N, C) each; None if there is none.

    Over P pixels, d mean = dx / P and d var = 2 (x - mean) dx / P.
    """
    if mean is None or (grad_mean is None and grad_var is None):
        return None, None
    pixels = x.shape[2] * x.shape[3]
    slope = torch.zeros_like(mean) if grad_var is None else grad_var * (2 / pixels)
    own = torch.zeros_like(mean) if grad_mean is None else grad_mean / pixels
    return torch.addcmul(own, slope, mean, value=-1), slope


def pull(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.pull` by a back end, whose name is the last argument.

    Under create_graph=True the result must be differentiable itself, which kernels are not, so the reference runs.
    """
    if torch.is_grad_enabled():
        return reference.pull(x, *arguments[:-1])
    pulled: tuple[Tensor, Tensor, Tensor] = _pull(x, *arguments)
    return pulled


@custom_op("dense_shortcuts::pull", mutates_args=())
def _pull(
    x: Tensor,
    grad: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    maps: Sequence[Tensor],
    rows: int,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pulled: tuple[Tensor, Tensor, Tensor] = kernels(backend).pull(
        x, grad, offset, slope, later_grads, later_scales, maps, rows, relu
    )
    return pulled


@_pull.register_fake
def _(x: Tensor, *arguments: Any) -> Any:
    *_, maps, rows, _, _ = arguments
    shapes = (len(maps), rows, x.shape[1]), (rows, x.shape[1])
    return new_map(x), *(x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for shape in shapes)
