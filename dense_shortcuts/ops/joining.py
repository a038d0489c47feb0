"""The operator as modules call it: one function whatever the back end."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling

from ..errors import DenseShortcutError
from . import forms, fused, native, tiles
from .dispatch import arithmetic
from .forms import BATCH, NONE, RAW, form
from .operators import is_eager
from .reference import accumulation_dtype, dense_sum, moments
from .sums import Sum


class Branch(NamedTuple):
    """A residual branch before its last norm, a batch norm.

    map is (N, C, H, W), or None for no branch; affine holds the weight and bias of the norm, (C,), or nothing; fixed
    holds its rate and shift, (1, C), where it goes by its running statistics, else nothing.
    """

    map: Tensor | None
    affine: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    eps: float


class Joined(NamedTuple):
    """A finished feature map, (N, C, H, W), what was gathered of it, and the links of later sums to it.

    gathered has rate and shift of N, (1 or N, C), and the pooled mean and variance, (1, C) or (N, groups); with RAW the
    mean and variance of each channel, (N, C), in place of rate and shift; tensors of no elements with NONE.
    branch_gathered is the same of the branch's norm, where it goes by this batch.
    """

    map: Tensor
    gathered: Sequence[Tensor]
    branch_gathered: Sequence[Tensor]
    links: tuple[Tensor, ...]


def join(
    addends: Sequence[Tensor],
    branch: Branch | None,
    maps: Sequence[Tensor],
    links: Sequence[tuple[Tensor, ...]],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    relu: bool,
    groups: int,
    eps: float,
    later: int,
    backend: str,
    overwrite: bool = False,
) -> Joined:
    """s(sum of addends + N(branch) + sum_i w_i * N(X_i)) with what later sums need of it.

    Args:
        addends: maps added as they stand, such as the residual branch, each (N, C, H, W).
        branch: the residual branch before its last norm, or None; not for the plain back end.
        maps: earlier feature maps that this sum reads, each (N, C, H, W).
        links: the link of each map to this sum; empty tuples on the plain path and where no gradient is asked for.
        weight: w, a row for each earlier map, the last ones for `maps`: (all maps, C); None for ones.
        rates, shifts: N(X_i) = rate * X_i + shift for all earlier maps, (1 or N, C) each; none for N(X) = X.
        relu: whether s is ReLU, else there is none.
        groups, eps: the norm of the result: a number of groups, BATCH, RAW or NONE.
        later: number of later users of the result, each of which takes a link.
        backend: from `choose`.
        overwrite: whether the branch, or without one the first addend, may be overwritten by the result; that is made
            use of where no graph is recorded.

    Returns:
        the sum in the dtype of the first addend, or without addends of the branch.

    Raises:
        DenseShortcutError: gradients are on, but a map was made while they were off.
    """
    if backend == "plain":
        y = _plain_sum(addends, maps, weight, rates, shifts)
        y = torch.relu(y) if relu else y
        return Joined(y, _plain_gather(y, groups, eps), (), ())
    if is_grad_enabled() and not all(links):
        raise DenseShortcutError(
            "a stage ran in part without gradients, so its shortcuts would get none: run it whole under one mode "
            "(for activation checkpointing, with use_reentrant=False)."
        )
    branch = branch or Branch(None, (), (), 0.0)
    if branch.map is not None and weight is not None and not rates:  # maps as they are, beside a branch with a form
        one = branch.map.new_ones((1, branch.map.shape[1]), dtype=accumulation_dtype(branch.map.dtype))
        rates, shifts = [one] * weight.shape[0], [torch.zeros_like(one)] * weight.shape[0]
    given = Sum(addends, *branch, maps, weight, rates, shifts, relu, groups, eps)
    if overwrite and not is_grad_enabled() and is_eager(given.first):
        y, own, theirs = fused.run_block(given, backend, addends[0] if branch.map is None else branch.map)
        return Joined(y, own, theirs, ())
    flat = [t for link in links for t in link] if is_grad_enabled() else []
    y, own, theirs, new = fused.block(*given, flat, later if is_grad_enabled() else 0, backend)
    return Joined(y, own, theirs, tuple(new))


def running_form(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """rate and shift, (1, C), of a batch norm by its running statistics, (C,), with its affine parameters, if any.

    They are worked out at each use, for the buffers may change in between.
    """
    asked = is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    if backend == "native" and not asked and is_eager(mean):
        return native.running_form(mean, var, eps, weight, bias)
    dtype = accumulation_dtype(mean.dtype)
    if backend == "triton" and not asked and is_eager(mean):  # the form by the moments of one image
        found: tuple[Tensor, ...] = arithmetic(backend).form(
            mean.to(dtype)[None], var.to(dtype)[None], BATCH, eps, weight, bias
        )
        return found[0], found[1]
    rate = torch.rsqrt(var.to(dtype) + eps)
    rate = rate if weight is None else rate * weight.to(dtype)
    shift = -mean.to(dtype) * rate if bias is None else torch.addcmul(bias.to(dtype), mean.to(dtype), rate, value=-1)
    return rate[None], shift[None]


def nested_form(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int,
    outer_eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """See `forms.nested_form`; the last four results have no gradient."""
    if is_compiling() or _are_functorch_transforms_active():  # these do better with the steps
        return forms.nested_form(mean, var, weight, bias, eps, groups, outer_eps)
    found: tuple[Tensor, ...] = _NestedForm.apply(mean, var, weight, bias, backend, eps, groups, outer_eps)
    return found


class _NestedForm(torch.autograd.Function):
    """`nested_form` as one node: autograd takes longer over its many small steps than they do."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, weight: Any, bias: Any, backend: str, *settings: Any) -> Any:
        backend = backend if is_eager(mean) else "plain"
        ctx.kernels = native if backend == "native" else arithmetic(backend)
        found: tuple[Tensor, ...] = ctx.kernels.nested_form(mean, var, weight, bias, *settings)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, var, weight, bias, *found[2:])
        ctx.mark_non_differentiable(*found[2:])
        ctx.settings = settings
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None and grads[1] is None:
            return (None,) * 8
        grads = tuple(torch.zeros_like(grads[1 - i]) if grads[i] is None else grads[i] for i in range(2))
        mean, var, weight, bias, *found = ctx.saved_tensors
        given, wanted, rest = (mean, var, weight, bias), ctx.needs_input_grad[:4], [None] * 4
        if is_grad_enabled():  # these gradients will be differentiated too
            results = forms.nested_form(*given, *ctx.settings)[:2]
            inputs = [t for t, needed in zip(given, wanted, strict=True) if needed]
            to = iter(torch.autograd.grad(results, inputs, grads, create_graph=True))
            return *(next(to) if needed else None for needed in wanted), *rest
        to_mean, to_var, *to_affine = ctx.kernels.nested_form_backward(*given, found, grads, *ctx.settings)
        affine = (None if p is None else g.to(p.dtype) for p, g in zip((weight, bias), to_affine, strict=True))
        return to_mean, to_var, *affine, *rest


def move(
    running: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    unbiased: float | Tensor,
    step: float | Tensor,
    backend: str,
) -> None:
    """One step of a batch norm's running mean and variance, (C,), towards a batch's, (1, C).

    unbiased is the factor that makes the batch's variance so.
    """
    (mean, var), (running_mean, running_var) = found, running
    dtype, constant = running_mean.dtype, isinstance(unbiased, float) and isinstance(step, float)
    if constant and _may_move((running_mean, running_var, mean, var), dtype, backend):
        mover = native if backend == "native" else arithmetic(backend)
        mover.move(running, found, unbiased, step)
        return
    running_mean.lerp_(mean[0].detach().to(dtype), step)
    running_var.lerp_((var[0].detach() * unbiased).to(dtype), step)


def _may_move(tensors: Sequence[Tensor], dtype: torch.dtype, backend: str) -> bool:
    """Whether a compiled kernel may take and change numbers of a dtype as they lie in memory."""
    if backend == "native":
        taken = dtype in (torch.float32, torch.float64) and tensors[0].is_cpu
    else:  # a launch of Triton takes scalars in float32
        taken = backend == "triton" and dtype == torch.float32
    return taken and is_eager(tensors[0]) and all(t.dtype == dtype and t.is_contiguous() for t in tensors)


def _plain_sum(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
) -> Tensor:
    if weight is None:
        return dense_sum(addends, maps, None, None)
    scales = weight[:, None].to(accumulation_dtype(weight.dtype))
    if not rates:
        return dense_sum(addends, maps, scales, None)
    bias = (scales * torch.stack(list(shifts))).sum(0)
    return dense_sum(addends, maps, scales * torch.stack(list(rates)), bias)


def _has_no_images(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape[0] == 0  # what torch.fx records knows no shape


def _plain_gather(x: Tensor, groups: int, eps: float) -> Sequence[Tensor]:
    if groups == NONE:
        return ()
    mean, var = moments(x)
    if groups == BATCH and _has_no_images(x):  # zeros, for numbers that are not would spread to gradients
        zero = mean.sum(0, keepdim=True)
        return zero, zero, zero, zero
    return (mean, var, mean, var) if groups == RAW else form(mean, var, groups, eps, None, None)


def enter(x: Tensor, *, groups: int, eps: float, later: int, rows: int, backend: str) -> Joined:
    """A map that no `join` made, (N, C, H, W), with what later sums need of it; `rows` are those of their scales."""
    if backend == "plain":
        return Joined(x, _plain_gather(x, groups, eps), (), ())
    if groups == NONE and not is_grad_enabled():  # nothing to gather, nothing to link
        return Joined(x, (), (), ())
    own, new = fused.enter(x, groups, eps, later if is_grad_enabled() else 0, rows, backend)
    return Joined(x, own, (), tuple(new))


def close(
    x: Tensor, links: Sequence[tuple[Tensor, ...]], counts: Sequence[int], rows: int, backend: str
) -> list[Tensor]:
    """Links from a group of maps, of which x (N, C, H, W) is the last, to later groups of `counts` blocks each.

    The list holds for each later group a tensor a block and one for the scales; it is empty where no gradient is asked
    for. `ahead` takes those of one group from every earlier `close`.
    """
    if not is_grad_enabled():
        return []
    return tiles.close(x, [t for link in links for t in link], counts, rows, backend)


def ahead(
    maps: Sequence[Tensor],
    links: Sequence[Sequence[Tensor]],
    scales: Tensor | None,
    blocks: int,
    sizes: Sequence[int],
    backend: str,
) -> list[Tensor]:
    """sum_i scales[j, i] * maps[i] for each block j of a group, every map read once.

    Args:
        maps: those finished before the group, each (N, C, H, W).
        links: this group's part of what each earlier `close` gave.
        scales: (blocks, len(maps), 1 or N, C); None for ones.
        blocks: number of blocks of the group.
        sizes: number of maps of each earlier `close`.
        backend: from `choose`, any but "plain".
    """
    if scales is None:
        x = maps[0]
        scales = x.new_ones((blocks, len(maps), 1, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    return tiles.ahead(maps, [t for group in links for t in group], scales, sizes, backend)
