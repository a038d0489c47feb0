"""Sums made ahead for a group of blocks (`..tiling`), as registered PyTorch operators.

`ahead` reads the maps that were finished before a group and gives each of its blocks the sum of them, which `block`
then takes as an addend. `close` stands between the maps of a group and the later `ahead`s, as links do for pairs
(`fused.py`): backwards it has the gradients of all later blocks at hand and reads each once for the whole group.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import kernels
from .operators import Operator
from .reference import accumulation_dtype, new_map


def _new_links(x: Tensor, maps: int, counts: Sequence[int], rows: int) -> list[Tensor]:
    """For each later group of blocks, an empty tensor a block and one for the scales between it and these maps."""
    links = []
    grad, scale = x.new_zeros(1), x.new_zeros(1, dtype=accumulation_dtype(x.dtype))
    for count in counts:
        links += [grad.expand(x.shape) for _ in range(count)]
        links.append(scale.expand(count, maps, rows, x.shape[1]))
    return links


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


def _ahead_like(maps: Sequence[Tensor], links: Sequence[Tensor], scales: Tensor, *_: Any) -> list[Tensor]:
    return _sums_like(maps, scales)


def _sums_like(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    return [new_map(maps[-1]) for _ in range(scales.shape[0])]


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
    return _new_links(x, len(links) // 2, counts, rows)


@torch.library.custom_op("dense_shortcuts::mix", mutates_args=())
def mix(maps: Sequence[Tensor], scales: Tensor, backend: str) -> list[Tensor]:
    """`reference.mix`; backend as in `block`."""
    outputs: list[Tensor] = kernels(backend).mix(maps, scales)
    return outputs


@mix.register_fake
def _(maps: Sequence[Tensor], scales: Tensor, backend: str) -> list[Tensor]:
    return _sums_like(maps, scales)


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
    _, links, counts, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.maps, ctx.ends, ctx.backend = len(links) // 2, [0, *accumulate(n + 1 for n in counts)], backend


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


ahead = Operator("ahead", _ahead, _ahead_like, _ahead_setup, _ahead_backward)
close = Operator("close", _close, _close, _close_setup, _close_backward)
