"""The operator as registered PyTorch operators, with gradients that are pulled rather than pushed.

A sum y_l = s(f_l + b_l + sum_i a_{l,i} * X_i) would push a gradient a_{l,i} * G_l to every earlier map X_i, each one
written to memory and added to what came before; G_l is the gradient of y_l before the activation. Instead, each pair
(l, i) has a *link*: two outputs of the operator that made X_i and inputs of the one that makes y_l. They hold no data
(one element, expanded); backwards they carry G_l and a_{l,i} as they stand. The operator that made X_i then has all
of its later gradients at hand and sums a_{l,i} * G_l in one pass, together with the gradient of X_i's statistics, the
mask of the activation and the sums that give the gradients of its own scales and bias. Only the maps are saved,
which the host's next convolutions save as well.

Source: the affine form in docs/paper-map.md; `reference.py` is what these operators are held to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .reference import accumulation_dtype

_KERNELS = {"cpu": cpu}


def _new_links(x: Tensor, later: int, rows: int) -> list[Tensor]:
    """Two empty tensors a later block, of one element each; only their gradients matter."""
    shapes = [(x.shape, x.dtype), ((rows, x.shape[1]), accumulation_dtype(x.dtype))] * later
    return [x.new_zeros(1, dtype=dtype).expand(shape) for shape, dtype in shapes]


@torch.library.custom_op("dense_shortcuts::join", mutates_args=())
def join(
    branch: Tensor,
    maps: Sequence[Tensor],
    links: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    later: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """s(branch + bias + sum_i scales[i] * maps[i]) with the moments of the result, in one pass.

    Args:
        branch: (N, C, H, W).
        maps: earlier feature maps, each (N, C, H, W).
        links: two tensors a map, from the operator that made it; none where no gradient is asked for.
        scales: (len(maps), rows, C) with rows = 1 or N.
        bias: (rows, C), or None for zero.
        relu: whether s is ReLU, else there is none.
        statistics: whether to give the moments.
        later: number of later sums that will take the result, for which links are made.
        backend: whose kernels run, by name.

    Returns:
        y (N, C, H, W), mean and biased variance of y over its pixels, both (N, C), and the links.
    """
    y, mean, var = _KERNELS[backend].join(branch, maps, scales, bias, relu, statistics)
    return y, mean, var, _new_links(branch, later, scales.shape[1])


@join.register_fake
def _(
    branch: Tensor,
    maps: Sequence[Tensor],
    links: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    later: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    shape = branch.shape[:2] if statistics else (0,)
    mean = branch.new_empty(shape, dtype=accumulation_dtype(branch.dtype))
    return torch.empty_like(branch), mean, torch.empty_like(mean), _new_links(branch, later, scales.shape[1])


@torch.library.custom_op("dense_shortcuts::enter", mutates_args=())
def enter(x: Tensor, statistics: bool, later: int, rows: int, backend: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Moments and links of a map that no join made: X_0, a branch output, a map behind an activation of its own.

    Args:
        x: (N, C, H, W).
        statistics, later, backend: as in `join`.
        rows: 1 or N, the rows of the scales with which it will be summed.

    Returns:
        mean and biased variance, both (N, C), and the links.
    """
    if statistics:
        mean, var = _KERNELS[backend].moments(x)
    else:
        mean, var = (x.new_empty(0, dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return mean, var, _new_links(x, later, rows)


@enter.register_fake
def _(x: Tensor, statistics: bool, later: int, rows: int, backend: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    mean = x.new_empty(x.shape[:2] if statistics else (0,), dtype=accumulation_dtype(x.dtype))
    return mean, torch.empty_like(mean), _new_links(x, later, rows)


@torch.library.custom_op("dense_shortcuts::pull", mutates_args=())
def pull(
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
    """`reference.pull` in one pass; backend as in `join`."""
    return _KERNELS[backend].pull(x, grad, offset, slope, later_grads, later_scales, maps, rows, relu)


@pull.register_fake
def _(
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
    dtype = accumulation_dtype(x.dtype)
    grad_scales = x.new_empty((len(maps), rows, x.shape[1]), dtype=dtype)
    return torch.empty_like(x), grad_scales, x.new_empty((rows, x.shape[1]), dtype=dtype)


def _pull(
    x: Tensor,
    mean: Tensor,
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    grad_links: Sequence[Tensor | None],
    maps: Sequence[Tensor],
    rows: int,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pull` from the gradients that autograd hands over, some of them None."""
    offset, slope = _through_moments(x, mean, grad_mean, grad_var)
    pairs = list(zip(grad_links[::2], grad_links[1::2], strict=True))
    later_grads = [g for g, a in pairs if g is not None and a is not None]
    later_scales = [a for g, a in pairs if g is not None and a is not None]
    arguments = (x, grad, offset, slope, later_grads, later_scales, maps, rows, relu)
    # Under create_graph=True the gradient is to be differentiated in its turn, which the kernels cannot be.
    return reference.pull(*arguments) if torch.is_grad_enabled() else pull(*arguments, backend)


def _through_moments(
    x: Tensor, mean: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """offset and slope with gradient = offset + slope * x: d mean = 1 / HW, d var = 2 (x - mean) / HW."""
    if mean.numel() == 0 or (grad_mean is None and grad_var is None):
        return None, None
    pixels = x.shape[2] * x.shape[3]
    slope = torch.zeros_like(mean) if grad_var is None else grad_var * (2 / pixels)
    offset = -slope * mean if grad_mean is None else grad_mean / pixels - slope * mean
    return offset, slope


def _join_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, maps, links, scales, bias, relu, _, _, backend = inputs
    y, mean, _, _ = output
    ctx.set_materialize_grads(False)
    # The map is looked at again for ReLU's mask and for its statistics; without both, a later activation may
    # overwrite it in place.
    ctx.save_for_backward(y if relu or mean.numel() else None, mean, scales, *maps)
    ctx.relu, ctx.linked, ctx.has_bias, ctx.backend = relu, len(links) > 0, bias is not None, backend


def _join_backward(ctx: Any, grad: Any, grad_mean: Any, grad_var: Any, grad_links: Any) -> Any:
    y, mean, scales, *maps = ctx.saved_tensors
    if all(g is None for g in (grad, grad_mean, grad_var, *grad_links)):
        nothing = [None] * len(maps)
        return None, nothing, nothing * 2 if ctx.linked else [], None, None, None, None, None, None
    y = grad if y is None else y
    g, grad_scales, grad_bias = _pull(
        y, mean, grad, grad_mean, grad_var, grad_links, maps, scales.shape[1], ctx.relu, ctx.backend
    )
    to_links = [t for i in range(len(maps)) for t in (g, scales[i])] if ctx.linked else []
    return g, [None] * len(maps), to_links, grad_scales, grad_bias if ctx.has_bias else None, None, None, None, None


def _enter_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0])
    ctx.backend = inputs[4]


def _enter_backward(ctx: Any, grad_mean: Any, grad_var: Any, grad_links: Any) -> Any:
    x, mean = ctx.saved_tensors
    return _pull(x, mean, None, grad_mean, grad_var, grad_links, [], 1, False, ctx.backend)[0], None, None, None, None


join.register_autograd(_join_backward, setup_context=_join_setup)
enter.register_autograd(_enter_backward, setup_context=_enter_setup)
