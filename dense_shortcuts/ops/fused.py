"""The operator as registered PyTorch operators, with gradients that are pulled rather than pushed.

A sum y_l = s(f_l + b_l + sum_i a_{l,i} * X_i) would push a gradient a_{l,i} * G_l to every earlier map X_i, each one
written to memory and added to what came before; G_l is the gradient of y_l before the activation. Instead, each pair
(l, i) has a *link*: two outputs of the operator that made X_i and inputs of the one that makes y_l. They hold no data
(one element, expanded); backwards they carry G_l and a_{l,i} as they stand. The operator that made X_i then has all
of its later gradients at hand and sums a_{l,i} * G_l in one pass, together with the gradient of X_i's statistics, the
mask of the activation and the sums that give the gradients of its own scales and bias. Only the maps are saved,
which the host's next convolutions save as well, and numbers per channel.

Deep stages are cut into groups of blocks (`..tiling`). `ahead` reads the maps that were finished before a group and
gives each of its blocks the sum of them, which `block` then takes as an addend. `close` stands between the maps of a
group and the later `ahead`s, as links do for pairs: backwards it has the gradients of all later blocks at hand and
reads each of them once for the whole group.

Source: the affine form in docs/paper-map.md; `reference.py` is what these operators are held to.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from . import flops, forms, reference
from .forms import BATCH, NONE, RAW, unnormalised_scales
from .reference import accumulation_dtype


@cache
def kernels(backend: str) -> Any:
    """The module of a back end's kernels, imported when first used: triton is not everywhere."""
    return import_module(f".{backend}", __package__)


def _new_links(x: Tensor, later: int, rows: int) -> list[Tensor]:
    """Two empty tensors a later block, of one element each; only their gradients matter."""
    shapes = [(x.shape, x.dtype), ((rows, x.shape[1]), accumulation_dtype(x.dtype))] * later
    return [x.new_zeros(1, dtype=dtype).expand(shape) for shape, dtype in shapes]


def _new_tile_links(x: Tensor, maps: int, counts: Sequence[int], rows: int) -> list[Tensor]:
    """For each later group of blocks, an empty tensor a block and one for the scales between it and these maps."""
    links, dtype = [], accumulation_dtype(x.dtype)
    for count in counts:
        links += [x.new_zeros(1).expand(x.shape) for _ in range(count)]
        links.append(x.new_zeros(1, dtype=dtype).expand(count, maps, rows, x.shape[1]))
    return links


def _statistics(
    mean: Tensor, var: Tensor, groups: int, eps: float, affine: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rate, shift, pooled mean and variance, see `forms.form`; with RAW the moments in place of rate and shift."""
    if groups in (NONE, RAW):
        return mean, var, mean.new_empty(0), mean.new_empty(0)
    weight, bias = affine if affine else (None, None)
    return forms.form(mean, var, groups, eps, weight, bias)


def _statistics_like(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors in the shapes that `_statistics` gives for a map."""
    n, c = x.shape[:2]
    form = {NONE: (0,), BATCH: (1, c)}.get(groups, (n, c))
    pooled = {NONE: (0,), RAW: (0,), BATCH: (1, c)}.get(groups, (n, groups))
    first = x.new_empty(form, dtype=accumulation_dtype(x.dtype))
    return first, torch.empty_like(first), first.new_empty(pooled), first.new_empty(pooled)


def _gathered(x: Tensor, groups: int, eps: float, affine: Sequence[Tensor]) -> Sequence[Tensor]:
    """The statistics of a map once more, as differentiable functions of it."""
    mean, var = reference.moments(x)
    return _statistics(mean, var, groups, eps, affine)


def _through_statistics(
    x: Tensor,
    found: Sequence[Tensor],
    groups: int,
    eps: float,
    affine: Sequence[Tensor],
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """The gradient of x through what `_statistics` found, as offset + slope * x, and those of affine parameters."""
    rate, _, pooled, variance = found
    if groups == NONE or (grad_rate is None and grad_shift is None):
        return None, None, []
    pixels = x.shape[2] * x.shape[3]
    grad_rate = torch.zeros_like(grad_shift) if grad_rate is None else grad_rate  # type: ignore[arg-type]
    grad_shift = torch.zeros_like(grad_rate) if grad_shift is None else grad_shift
    if groups == RAW:  # d mean = dx / pixels and d var = 2 (x - mean) dx / pixels; rate is the mean
        slope = grad_shift * (2 / pixels)
        return grad_rate / pixels - slope * rate, slope, []
    count = pixels * (x.shape[0] if groups == BATCH else x.shape[1] // groups)
    weight = affine[0] if affine else None
    offset, slope, *to_affine = forms.form_backward(pooled, variance, groups, eps, weight, grad_rate, grad_shift, count)
    return offset, slope, to_affine


def _block(
    addends: Sequence[Tensor],
    branch: Tensor | None,
    affine: Sequence[Tensor],
    fixed: Sequence[Tensor],
    branch_eps: float,
    maps: Sequence[Tensor],
    links: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    relu: bool,
    groups: int,
    eps: float,
    later: int,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """s(sum of addends + branch norm + sum_i w_i * N(X_i)) with the statistics of the result.

    Args:
        addends: maps that are added as they stand, each (N, C, H, W).
        branch: the residual branch before its last norm, (N, C, H, W), or None where it is an addend.
        affine: weight and bias of that norm, (C,) each, or none of both.
        fixed: rate and shift of that norm, (1, C) each, where it goes by its running statistics.
        branch_eps: its eps.
        maps: the earlier feature maps that this sum reads, each (N, C, H, W).
        links: two tensors a map, from the operator that made it; none where no gradient is asked for.
        weight: w, a row for each earlier map, the last ones for `maps`: (all maps, C); None for ones.
        rates, shifts: N(X_i) = rate * X_i + shift for all earlier maps, (1 or N, C) each; none for N(X) = X.
        relu: whether s is ReLU, else there is none.
        groups, eps: the norm of the result: a number of groups, BATCH, RAW or NONE.
        later: number of links to make for later users of the result.
        backend: whose kernels run, by name.

    Returns:
        y (N, C, H, W); rate, shift, pooled mean and variance of y's norm; the same of the branch's norm, or nothing;
        the links.
    """
    return run_block(
        addends, branch, affine, fixed, branch_eps, maps, weight, rates, shifts, relu, groups, eps, later, backend, None
    )


def run_block(
    addends: Sequence[Tensor],
    branch: Tensor | None,
    affine: Sequence[Tensor],
    fixed: Sequence[Tensor],
    branch_eps: float,
    maps: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    relu: bool,
    groups: int,
    eps: float,
    later: int,
    backend: str,
    out: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """`_block`, which may write its result to `out`: the branch, or without one the first addend."""
    k = kernels(backend)
    given = (addends, branch, affine, fixed, branch_eps, maps, weight, rates, shifts, relu, groups, eps, out)
    y, own, branch_norm = k.block(*given) if backend == "native" else _block_by_parts(k, *given)
    return y, own, branch_norm, _new_links(y, later, _rows(rates))


def _block_by_parts(
    k: Any,
    addends: Sequence[Tensor],
    branch: Tensor | None,
    affine: Sequence[Tensor],
    fixed: Sequence[Tensor],
    branch_eps: float,
    maps: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    relu: bool,
    groups: int,
    eps: float,
    out: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`run_block` without links, from the kernels that every back end has."""
    branch_norm: tuple[Tensor, ...] = ()
    if branch is not None and not fixed:
        mean, var = k.moments(branch)
        branch_norm = _statistics(mean, var, BATCH, branch_eps, affine)
    form = (fixed or branch_norm[:2]) if branch is not None else ()
    scales, bias = _scales(weight, rates, shifts, maps, form, (*addends, *maps)[0])
    summed = maps if branch is None else [branch, *maps]
    y, mean, var = k.join(addends, summed, scales, bias, relu, groups != NONE, out)
    return y, list(_statistics(mean, var, groups, eps)), list(branch_norm)


def _rows(rates: Sequence[Tensor]) -> int:
    return rates[0].shape[0] if rates else 1


def _scales(
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    maps: Sequence[Tensor],
    branch: Sequence[Tensor],
    like: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """a_i of the branch, if there is one, and of `maps`, (., 1 or N, C), and b, (1 or N, C)."""
    if not rates:
        return unnormalised_scales(weight, maps, like), None
    assert weight is not None
    form = (branch[0], branch[1]) if branch else None
    return forms.coefficients(weight, rates, shifts, weight.shape[0] - len(maps), form)


def _block_like(
    addends: Sequence[Tensor], branch: Tensor | None, affine: Any, fixed: Sequence[Tensor], eps: Any, *given: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    maps, _, _, rates, _, _, groups, _, later, _ = given
    summed = maps if branch is None else [branch, *maps]
    y = torch.empty_like((*addends, *summed)[0])
    branch_norm = _statistics_like(branch, BATCH) if branch is not None and not fixed else ()
    return y, list(_statistics_like(y, groups)), list(branch_norm), _new_links(y, later, _rows(rates))


def _block_setup(ctx: Any, inputs: Any, output: Any) -> None:
    addends, branch, affine, fixed, branch_eps, maps, links, weight, rates, shifts, relu, groups, eps, _, backend = (
        inputs
    )
    y, own, branch_norm, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*own[2:], *branch_norm)
    # The map is looked at again for ReLU's mask and for its statistics; without both, a later activation may
    # overwrite it in place.
    kept = y if relu or groups != NONE else None
    lists = [list(part) for part in (own, affine, fixed, branch_norm, maps, rates, shifts)]
    flat, ctx.saved_lengths = _flatten(lists)
    ctx.save_for_backward(kept, branch, weight, *flat)
    ctx.addends, ctx.linked, ctx.settings = len(addends), len(links) > 0, (branch_eps, relu, groups, eps, backend)


def _block_backward(ctx: Any, grad: Any, grad_own: Any, _: Any, grad_links: Any) -> Any:
    y, branch, weight, *flat = ctx.saved_tensors
    own, affine, fixed, branch_norm, maps, rates, shifts = _unflatten(flat, ctx.saved_lengths)
    nothing = [None] * len(maps)
    if all(g is None for g in (grad, *grad_own[:2], *grad_links)):
        return [None] * ctx.addends, *[None] * 14
    later_grads, later_scales = _given(grad_links)
    y = next(g for g in (grad, *later_grads) if g is not None) if y is None else y
    arguments = (
        *(y, own, grad, *grad_own[:2], later_grads, later_scales, branch, affine, fixed, branch_norm, maps),
        *(weight, rates, shifts, *ctx.settings),
    )
    g, scales, to_branch, to_affine, to_fixed, to_weight, to_rates, to_shifts = _choose(
        _run_pull_block, pull_block, y, arguments
    )
    own_scales = scales[0 if branch is None else 1 :]
    to_links = [t for a in own_scales for t in (g, a)] if ctx.linked else []
    first = len(rates) - len(to_rates)
    return (
        [g] * ctx.addends,
        to_branch[0] if to_branch else None,
        to_affine or [None] * len(affine),
        to_fixed or [None] * len(fixed),
        None,
        nothing,
        to_links,
        to_weight[0] if to_weight else None,
        [None] * first + list(to_rates) if rates else [],
        list(to_shifts),
        *[None] * 5,
    )


def _given(grad_links: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients and the scales that came back through links; links of sums that were not used bring None."""
    pairs = [(g, a) for g, a in zip(grad_links[::2], grad_links[1::2], strict=True) if g is not None and a is not None]
    return [g for g, _ in pairs], [a for _, a in pairs]


def _run_pull_block(
    y: Tensor,
    own: Sequence[Tensor],
    grad: Tensor | None,
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    branch: Tensor | None,
    affine: Sequence[Tensor],
    fixed: Sequence[Tensor],
    branch_norm: Sequence[Tensor],
    maps: Sequence[Tensor],
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    branch_eps: float,
    relu: bool,
    groups: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The backward pass of `_block`, where `own` and `branch_norm` are the statistics that it gave.

    Returns:
        G (N, C, H, W), the scales, and the gradients of branch, affine, fixed, weight, rates (of `maps` alone) and
        shifts, each a list, empty where there is none.
    """
    if backend == "native":
        found: Any = kernels(backend).pull_block(
            *(y, own, grad, grad_rate, grad_shift, later_grads, later_scales, branch, affine, fixed, branch_norm),
            *(maps, weight, rates, shifts, branch_eps, relu, groups, eps),
        )
        return found
    k = reference if backend == "plain" else kernels(backend)
    if backend == "plain":
        own = _gathered(y, groups, eps, ())
        branch_norm = _gathered(branch, BATCH, branch_eps, affine) if branch is not None and branch_norm else ()
    offset, slope, _ = _through_statistics(y, own, groups, eps, (), grad_rate, grad_shift)
    form = (fixed or branch_norm[:2]) if branch is not None else ()
    scales, _bias = _scales(weight, rates, shifts, maps, form, y)
    summed = maps if branch is None else [branch, *maps]
    g, to_scales, to_bias = k.pull(y, grad, offset, slope, later_grads, later_scales, summed, scales.shape[1], relu)
    to_weight, to_rates, to_shifts, to_form = _through_scales(weight, rates, shifts, form, to_scales, to_bias)

    to_branch: list[Tensor] = []
    to_affine: list[Tensor] = []
    if branch is not None:
        start, tilt = None, None
        if not fixed:
            start, tilt, to_affine = _through_statistics(
                branch, branch_norm, BATCH, branch_eps, affine, to_form[0], to_form[1]
            )
            to_affine = [t.to(p.dtype) for t, p in zip(to_affine, affine, strict=True)] if affine else []
        to_branch = [k.pull(branch, None, start, tilt, [g], [scales[0]], [], 0, False)[0]]
    return g, scales, to_branch, to_affine, list(to_form) if fixed else [], to_weight, to_rates, to_shifts


def _through_scales(
    weight: Tensor | None,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    branch: Sequence[Tensor],
    to_scales: Tensor,
    to_bias: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """Gradients of weight, rates, shifts and of the branch's rate and shift from those of `_scales`."""
    if weight is None:
        return [], [], [], ()
    first = weight.shape[0] - to_scales.shape[0] + bool(branch)
    if not rates:
        own = to_scales.sum(1)
        return [torch.cat([own.new_zeros(first, own.shape[1]), own]).to(weight.dtype)], [], [], ()
    to_weight, to_rates, to_shifts, *to_branch = forms.coefficients_backward(
        weight, rates, shifts, first, bool(branch), to_scales, to_bias
    )
    return [to_weight], to_rates, to_shifts, tuple(to_branch) if branch else ()


@wraps(_run_pull_block)  # whose annotations give the operator its schema
def _pull_block_apart(*arguments: Any) -> Any:
    """`_run_pull_block` with results that share no memory, as slices of one tensor do and an operator's may not."""
    g, scales, to_branch, *small = _run_pull_block(*arguments)
    return g, scales.clone(), to_branch, *([t.clone() for t in part] for part in small)


pull_block = torch.library.custom_op("dense_shortcuts::pull_block", _pull_block_apart, mutates_args=())


@pull_block.register_fake
def _(y: Tensor, *given: Any) -> Any:
    branch, affine, fixed, _, maps, weight, rates, shifts = given[6:14]
    rows = _rows(rates)
    scales = y.new_empty((len(maps) + (branch is not None), rows, y.shape[1]), dtype=accumulation_dtype(y.dtype))
    each = [scales.new_empty(rows, y.shape[1]) for _ in range(len(maps) + len(shifts))]
    return (
        torch.empty_like(y),
        scales,
        [] if branch is None else [torch.empty_like(branch)],
        [] if branch is None or fixed else [torch.empty_like(p) for p in affine],
        [scales.new_empty(1, y.shape[1]) for _ in fixed],
        [] if weight is None else [torch.empty_like(weight)],
        each[: len(maps)] if rates else [],
        each[len(maps) :],
    )


def _enter(
    x: Tensor, groups: int, eps: float, later: int, rows: int, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics and links of a map that no `block` made: X_0, a branch output, a map behind an activation of its own.

    Args:
        x: (N, C, H, W).
        groups, eps, later, backend: as in `block`.
        rows: 1 or N, the rows of the scales with which it will be summed.

    Returns:
        rate, shift, pooled mean and variance; the links.
    """
    links = _new_links(x, later, rows)
    if backend == "native":
        return kernels(backend).enter(x, groups, eps), links
    empty = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    mean, var = (empty, empty.clone()) if groups == NONE else kernels(backend).moments(x)
    return list(_statistics(mean, var, groups, eps)), links


def _enter_like(
    x: Tensor, groups: int, eps: float, later: int, rows: int, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    return list(_statistics_like(x, groups)), _new_links(x, later, rows)


def _enter_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, groups, eps, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[0][2:])
    ctx.save_for_backward(x, *output[0])
    ctx.settings = groups, eps, backend


def _enter_backward(ctx: Any, grad_own: Any, grad_links: Any) -> Any:
    x, *own = ctx.saved_tensors
    if all(g is None for g in (*grad_own[:2], *grad_links)):
        return [None] * 6
    arguments = (x, own, *grad_own[:2], *_given(grad_links), *ctx.settings)
    return _choose(_run_pull_entered, pull_entered, x, arguments), *[None] * 5


def _run_pull_entered(
    x: Tensor,
    own: Sequence[Tensor],
    grad_rate: Tensor | None,
    grad_shift: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    groups: int,
    eps: float,
    backend: str,
) -> Tensor:
    """The backward pass of `_enter`: the gradient of x."""
    given = (later_grads, later_scales)
    if backend == "native":
        entered: Tensor = kernels(backend).pull_entered(x, own, grad_rate, grad_shift, *given, groups, eps)
        return entered
    k = reference if backend == "plain" else kernels(backend)
    own = _gathered(x, groups, eps, ()) if backend == "plain" else own
    offset, slope, _ = _through_statistics(x, own, groups, eps, (), grad_rate, grad_shift)
    pulled: Tensor = k.pull(x, None, offset, slope, *given, [], 0, False)[0]
    return pulled


pull_entered = torch.library.custom_op("dense_shortcuts::pull_entered", _run_pull_entered, mutates_args=())


@pull_entered.register_fake
def _(x: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(x)


def is_eager(x: Tensor) -> bool:
    """Whether a kernel may be called as it stands: nothing compiles, transforms or watches operators."""
    return (
        type(x) is Tensor
        and x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _choose(run: Callable[..., Any], registered: Any, like: Tensor, arguments: tuple[Any, ...]) -> Any:
    """Runs a backward pass, of whose arguments the back end is the last.

    Under create_graph=True the gradient is to be differentiated in its turn, which the kernels cannot be.
    """
    if torch.is_grad_enabled():
        return run(*arguments[:-1], "plain")
    return (run if is_eager(like) else registered)(*arguments)


def _ahead(
    maps: Sequence[Tensor], links: Sequence[Tensor], scales: Tensor, sizes: Sequence[int], backend: str
) -> list[Tensor]:
    """For each block of a group, the sum of the maps that were finished before the group.

    Args:
        maps, scales: as in `reference.mix`.
        links: from the `close` of each earlier group of maps, a tensor a block and one for the scales; none where no
            gradient is asked for.
        sizes: number of maps in each of these groups.
        backend: as in `block`.

    Returns:
        one tensor (N, C, H, W) a block.
    """
    outputs: list[Tensor] = kernels(backend).mix(maps, scales)
    return outputs


def _ahead_like(
    maps: Sequence[Tensor], links: Sequence[Tensor], scales: Tensor, sizes: Sequence[int], backend: str
) -> list[Tensor]:
    return [torch.empty_like(maps[-1]) for _ in range(scales.shape[0])]


def _close(x: Tensor, links: Sequence[Tensor], counts: Sequence[int], rows: int, backend: str) -> list[Tensor]:
    """Links from a group of maps to the later groups of blocks.

    Args:
        x: the last of these maps, (N, C, H, W).
        links: two tensors for each of these maps, from the operator that made it.
        counts: number of blocks in each later group.
        rows: 1 or N, the rows of the scales.
        backend: as in `block`.

    Returns:
        for each later group a tensor a block and one for the scales.
    """
    return _new_tile_links(x, len(links) // 2, counts, rows)


def _close_like(x: Tensor, links: Sequence[Tensor], counts: Sequence[int], rows: int, backend: str) -> list[Tensor]:
    return _new_tile_links(x, len(links) // 2, counts, rows)


@torch.library.custom_op("dense_shortcuts::mix", mutates_args=())
def mix(maps: Sequence[Tensor], scales: Tensor, backend: str) -> list[Tensor]:
    """`reference.mix`; backend as in `block`."""
    outputs: list[Tensor] = kernels(backend).mix(maps, scales)
    return outputs


@mix.register_fake
def _(maps: Sequence[Tensor], scales: Tensor, backend: str) -> list[Tensor]:
    return [torch.empty_like(maps[-1]) for _ in range(scales.shape[0])]


@torch.library.custom_op("dense_shortcuts::dots", mutates_args=())
def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int, backend: str) -> Tensor:
    """`reference.dots`; backend as in `block`."""
    sums: Tensor = kernels(backend).dots(grads, maps, rows)
    return sums


@dots.register_fake
def _(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int, backend: str) -> Tensor:
    x = maps[0]
    return x.new_empty((len(grads), len(maps), rows, x.shape[1]), dtype=accumulation_dtype(x.dtype))


def _ahead_setup(ctx: Any, inputs: Any, output: Any) -> None:
    maps, links, scales, sizes, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scales, *maps)
    ctx.ends, ctx.linked, ctx.backend = [0, *accumulate(sizes)], len(links) > 0, backend


def _ahead_backward(ctx: Any, grads: Any) -> Any:
    scales, *maps = ctx.saved_tensors
    grads = [torch.zeros_like(maps[-1]) if g is None else g for g in grads]
    arguments = (grads, maps, scales.shape[2])
    grad_scales = reference.dots(*arguments) if torch.is_grad_enabled() else dots(*arguments, ctx.backend)
    tiles = [scales[:, a:b] for a, b in pairwise(ctx.ends)] if ctx.linked else []
    return [None] * len(maps), [t for tile in tiles for t in (*grads, tile)], grad_scales, None, None


def _close_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, links, counts, rows, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.maps, ctx.ends, ctx.rows, ctx.backend = len(links) // 2, [0, *accumulate(n + 1 for n in counts)], rows, backend


def _close_backward(ctx: Any, grad_links: Any) -> Any:
    tiles = [grad_links[a:b] for a, b in pairwise(ctx.ends)]
    used = [tile for tile in tiles if tile[-1] is not None]
    if not used:
        return None, [None] * (2 * ctx.maps), None, None, None
    grads = [g for tile in used for g in tile[:-1]]
    scales = torch.cat([tile[-1] for tile in used]).transpose(0, 1)
    pulled = reference.mix(grads, scales) if torch.is_grad_enabled() else mix(grads, scales, ctx.backend)
    ones = scales.new_ones(scales.shape[2:])
    return None, [t for p in pulled for t in (p, ones)], None, None, None


def _flatten(values: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """The values with their lists spread out, and the length of each list, None for a single value."""
    lengths = [len(value) if isinstance(value, list | tuple) else None for value in values]
    return [x for value, n in zip(values, lengths, strict=True) for x in ([value] if n is None else value)], lengths


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: "_Operator", lengths: list[int | None], *flat: Any) -> Any:
        inputs = _unflatten(flat, lengths)
        output = operator.runner(flat)(*inputs)
        ctx.operator, ctx.input_lengths = operator, lengths
        operator.setup(ctx, inputs, output)
        flat_output, ctx.lengths = _flatten([output] if isinstance(output, list) else output)
        return *flat_output, ctx.lengths, isinstance(output, list)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = ctx.operator.backward(ctx, *_unflatten(grads[:-2], ctx.lengths))
        spread = [
            [None] * n if g is None and n is not None else g for g, n in zip(given, ctx.input_lengths, strict=True)
        ]
        return None, None, *_flatten(spread)[0]


class _Operator:
    """A registered operator with its gradient.

    In eager mode it goes through a torch.autograd.Function, which costs a fraction of what the registered route does;
    graphs to be compiled and function transforms take that route.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        shapes: Callable[..., Any],
        setup: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        """run computes, shapes gives empty tensors like its results; the other two as for `register_autograd`."""
        self.run, self.setup, self.backward = run, setup, backward
        self.registered = torch.library.custom_op(f"dense_shortcuts::{name}", run, mutates_args=())
        self.registered.register_fake(shapes)
        self.registered.register_autograd(backward, setup_context=setup)

    def runner(self, flat: Sequence[Any]) -> Callable[..., Any]:
        """Who computes without a gradient: the kernel as it stands, where nothing watches operators."""
        like = next(x for x in flat if isinstance(x, Tensor))
        return self.run if is_eager(like) else self.registered

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.registered(*inputs)
        flat, lengths = _flatten(inputs)
        if not torch.is_grad_enabled():
            return self.runner(flat)(*inputs)
        *outputs, output_lengths, single = _Eager.apply(self, lengths, *flat)
        grouped = _unflatten(outputs, output_lengths)
        return grouped[0] if single else grouped


block = _Operator("block", _block, _block_like, _block_setup, _block_backward)
enter = _Operator("enter", _enter, _enter_like, _enter_setup, _enter_backward)
ahead = _Operator("ahead", _ahead, _ahead_like, _ahead_setup, _ahead_backward)
close = _Operator("close", _close, _close_like, _close_setup, _close_backward)
flops.register()
