"""Partial sums of deep stages (`nn/tiling.py`), as registered operators.

`partial_sums` reads the maps that are finished before a group of blocks and computes a sum of them for each block,
which `dense_add` then takes as an addend. `group_links` stands between a group of maps and the later `partial_sums`, as
links do for pairs (`autograd.py`): in the backward pass it receives the gradients of all later blocks and reads each of
them once for the whole group of maps.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.fx
from torch import Tensor, is_grad_enabled

from .autograd import custom_op
from .backend import choose, kernels
from .backends import reference
from .backends.reference import accumulation_dtype, new_map
from .functional import Links


@torch.fx.wrap
def group_links(x: Tensor, links: Sequence[Links], counts: Sequence[int], *, per_image: bool, backend: str) -> Links:
    """Links from a group of maps, of which x (N, C, H, W) is the last, to later groups of `counts` blocks each.

    For each later group there is a tensor a block and one for the scales; `partial_sums` takes those of one group from
    every earlier call. There are none where no gradient is asked for.
    """
    flat = [t for link in links for t in link]
    if not flat or not is_grad_enabled():
        return []
    found: Links = _group_links(x, flat, counts, x.shape[0] if per_image else 1, choose(x, backend))
    return found


@torch.fx.wrap
def partial_sums(
    maps: Sequence[Tensor],
    links: Sequence[Links],
    scales: Tensor | None,
    *,
    blocks: int,
    sizes: Sequence[int],
    backend: str,
) -> Sequence[Tensor]:
    """sum_i scales[j, i] * maps[i] for each block j of a group, every map read once.

    Args:
        maps: those finished before the group, each (N, C, H, W).
        links: this group's part of what each earlier `group_links` gave.
        scales: (blocks, len(maps), 1 or N, C); None for ones.
        blocks: number of blocks of the group.
        sizes: number of maps of each earlier `group_links`.
        backend: "auto", or what `choose` gave.
    """
    x, backend = maps[0], choose(maps[0], backend)
    if scales is None:
        scales = x.new_ones((blocks, len(maps), 1, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    if backend == "plain":
        return reference.mix(maps, scales)
    sums: Sequence[Tensor] = _partial_sums(maps, [t for each in links for t in each], scales, sizes, backend)
    return sums


@custom_op("dense_shortcuts::partial_sums", mutates_args=())
def _partial_sums(
    maps: Sequence[Tensor], links: Sequence[Tensor], scales: Tensor, sizes: Sequence[int], backend: str
) -> list[Tensor]:
    """For each block of a group, the sum of the maps finished before the group.

    Args:
        maps, scales: as in `reference.mix`.
        links: from the `group_links` of each earlier group of maps, a tensor per block and one for the coefficients;
            empty if no gradient is needed.
        sizes: number of maps in each of these groups.
        backend: as in `dense_add`.

    Returns:
        one tensor (N, C, H, W) per block.
    """
    sums: list[Tensor] = kernels(backend).mix(maps, scales)
    return sums


@_partial_sums.register_fake
def _(maps: Any, links: Any, scales: Tensor, sizes: Any, backend: str) -> list[Tensor]:
    return [new_map(maps[-1]) for _ in range(scales.shape[0])]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    maps, links, scales, sizes, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scales, *maps)
    ctx.ends, ctx.linked, ctx.backend = [0, *accumulate(sizes)], len(links) > 0, backend


def _backward(ctx: Any, grads: Any) -> Any:
    scales, *maps = ctx.saved_tensors
    grads = [torch.zeros_like(maps[-1]) if g is None else g for g in grads]
    arguments = (grads, maps, scales.shape[2])
    grad_scales = reference.dots(*arguments) if is_grad_enabled() else _dots(*arguments, ctx.backend)
    tiles = [scales[:, a:b] for a, b in pairwise(ctx.ends)] if ctx.linked else []
    return [None] * len(maps), [t for tile in tiles for t in (*grads, tile)], grad_scales, None, None


_partial_sums.register_autograd(_backward, setup_context=_setup)


@custom_op("dense_shortcuts::group_links", mutates_args=())
def _group_links(x: Tensor, links: Sequence[Tensor], counts: Sequence[int], rows: int, backend: str) -> list[Tensor]:
    """Links from a group of maps to the later groups of blocks.

    Args:
        x: the last of these maps, (N, C, H, W).
        links: two tensors for each of these maps, from the operator that made it.
        counts: number of blocks in each later group.
        rows: rows of the coefficients, 1 or N.
        backend: as in `dense_add`.

    Returns:
        for each later group, a tensor per block and one for the coefficients; only their gradients matter.
    """
    dtype, maps = accumulation_dtype(x.dtype), len(links) // 2
    new: list[Tensor] = []
    for count in counts:
        new += [x.new_zeros(1).expand(x.shape) for _ in range(count)]
        new.append(x.new_zeros(1, dtype=dtype).expand(count, maps, rows, x.shape[1]))
    return new


_group_links.register_fake(_group_links._init_fn)


def _group_links_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, links, counts, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.maps, ctx.ends, ctx.backend = len(links) // 2, [0, *accumulate(n + 1 for n in counts)], backend


def _group_links_backward(ctx: Any, grad_links: Any) -> Any:
    tiles = [grad_links[a:b] for a, b in pairwise(ctx.ends)]
    used = [tile for tile in tiles if tile[-1] is not None]
    if not used:
        return None, [None] * (2 * ctx.maps), None, None, None
    grads = [g for tile in used for g in tile[:-1]]
    scales = torch.cat([tile[-1] for tile in used]).transpose(0, 1)
    pulled = reference.mix(grads, scales) if is_grad_enabled() else _partial_sums(grads, [], scales, [], ctx.backend)
    ones = scales.new_ones(scales.shape[2:])
    return None, [t for p in pulled for t in (p, ones)], None, None, None


_group_links.register_autograd(_group_links_backward, setup_context=_group_links_setup)


@custom_op("dense_shortcuts::dots", mutates_args=())
def _dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int, backend: str) -> Tensor:
    products: Tensor = kernels(backend).dots(grads, maps, rows)
    return products


@_dots.register_fake
def _(grads: Any, maps: Any, rows: int, backend: str) -> Tensor:
    x = maps[0]
    return x.new_empty((len(grads), len(maps), rows, x.shape[1]), dtype=accumulation_dtype(x.dtype))
