"""Starts a group of blocks in a deep stage: the partial sums of all maps finished so far, one for each block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import accumulation_dtype, tiled
from .features import Feature, StageState
from .shortcut import DenseShortcut
from .tiling import Tiling


def start_group(shortcut: DenseShortcut, k: int, state: StageState, backend: str) -> StageState:
    """The state with the partial sums of the group that starts at block k; unchanged if none starts there."""
    tiling = shortcut.tiling
    if backend == "plain" or not isinstance(tiling, Tiling) or not tiling.begins(k):
        return state
    features, blocks, per_image = state.features, tiling.blocks(k), shortcut.per_image
    new = [features[i].links[-2:] for i in tiling.finished(k)]
    counts = [len(group) for group in tiling.later_groups(k)]
    links = tiled.group_links(features[-1].map, new, counts, per_image=per_image, backend=backend)
    all_links = (*state.group_links, links)
    begun = range(tiling.size, k + 1, tiling.size)
    # A group of maps has links to each later group of blocks in turn; those before the current one are full groups.
    skipped = [(k - first) // tiling.size * (tiling.size + 1) for first in begun]
    mine = [links[n : n + len(blocks) + 1] for n, links in zip(skipped, all_links, strict=True)]
    sums = tiled.partial_sums(
        [feature.map for feature in features],
        mine,
        _scales(shortcut, blocks, features),
        blocks=len(blocks),
        sizes=[len(tiling.finished(first)) for first in begun],
        backend=backend,
    )
    return state.replace(partial_sums=sums, group_links=all_links)


def _scales(shortcut: DenseShortcut, blocks: range, features: Sequence[Feature]) -> Tensor | None:
    """Coefficients a_{l,i} of some blocks for all these maps, (len(blocks), len(maps), 1 or N, C); None for ones."""
    if not shortcut.weighted:
        return None
    weight = torch.stack([shortcut.weight(k)[: len(features)] for k in blocks])[:, :, None]
    weight = weight.to(accumulation_dtype(weight.dtype))
    scales = [f.scale for f in features if f.scale is not None]
    return weight * torch.stack(torch.broadcast_tensors(*scales)) if scales else weight
