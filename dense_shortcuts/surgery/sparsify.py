"""Fewer shortcuts for a network: the pairs of a block and an earlier map ranked by their weights, and some left out."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import DenseShortcutError
from ..nn.connectivity import Sources
from ..nn.shortcut import DenseShortcut
from .plug import dense_stages


@dataclass(frozen=True)
class Pair:
    """A block and an earlier map that it sums.

    Attributes:
        shortcut: module name of the stage's shortcut.
        block, map: k and i, so that block l = k + 1 sums X_i.
        weight: mean |w| over the channels.
    """

    shortcut: str
    block: int
    map: int
    weight: float


def shortcuts(model: nn.Module) -> dict[str, DenseShortcut]:
    """Every dense shortcut of a network by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DenseShortcut)}


@torch.no_grad()
def pairs(model: nn.Module) -> list[Pair]:
    """Every pair of a network with its mean |w|, in the network's order.

    Raises:
        DenseShortcutError: a network without dense shortcuts, or with ones that are not weighted by the channel.
    """
    if not dense_stages(model):
        raise DenseShortcutError("the network is not plugged in: there are no pairs to prune.")
    found = []
    for name, shortcut in shortcuts(model).items():
        if not shortcut.weighted or shortcut.weighting != "channel":
            raise DenseShortcutError(f"{name} has no weight for each channel and pair: there is nothing to rank by.")
        for k, maps in enumerate(shortcut.sources):
            sizes = shortcut.weight(k).abs().mean(1).tolist() if maps else []
            found += [Pair(name, k, i, size) for i, size in zip(maps, sizes, strict=True)]
    return found


def choose(ranked: Sequence[Pair], keep: float) -> list[Pair]:
    """The share `keep` of the pairs with the greatest mean |w| over the whole network, in the network's order.

    The greatest of each block is kept before any other, for a block without pairs would have no shortcut.

    Raises:
        DenseShortcutError: a share outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise DenseShortcutError(f"--keep {keep} is no share of the pairs: it must be above 0 and at most 1.")
    best: dict[tuple[str, int], Pair] = {}
    for pair in ranked:
        place = (pair.shortcut, pair.block)
        if place not in best or pair.weight > best[place].weight:
            best[place] = pair
    firsts = set(best.values())
    by_weight = sorted(ranked, key=lambda pair: (pair not in firsts, -pair.weight))
    kept = set(by_weight[: max(round(keep * len(ranked)), len(firsts))])
    return [pair for pair in ranked if pair in kept]


def sources_of(kept: Sequence[Pair], model: nn.Module) -> dict[str, Sources]:
    """For each shortcut of a network the maps that each block sums, from the pairs that are kept."""
    return {
        name: tuple(
            tuple(pair.map for pair in kept if (pair.shortcut, pair.block) == (name, k)) for k in range(shortcut.depth)
        )
        for name, shortcut in shortcuts(model).items()
    }


def with_sources(model: nn.Module, sources: Mapping[str, Sequence[Sequence[int]]]) -> nn.Module:
    """A copy of a network whose blocks sum fewer maps; the weights and norms of what is left are as they were.

    Args:
        model: a plugged network, weighted by the channel.
        sources: for each shortcut by module name the maps that each block sums, which are among those it sums now.

    Raises:
        DenseShortcutError: a shortcut or pair that the network does not have.
    """
    pruned = copy.deepcopy(model)
    found = shortcuts(pruned)
    for name, maps in sources.items():
        old = found.get(name)
        if old is None or len(maps) != old.depth:
            raise DenseShortcutError(f"the network has no shortcut {name} of {len(maps)} blocks: build it as it was.")
        if any(not set(new) <= set(all_maps) for new, all_maps in zip(maps, old.sources, strict=True)):
            raise DenseShortcutError(f"{name} does not have all the pairs that are to stay: build it as it was.")
        pruned.set_submodule(name, _with_fewer(old, tuple(tuple(sorted(new)) for new in maps)))
    return pruned


@torch.no_grad()
def _with_fewer(old: DenseShortcut, sources: Sources) -> DenseShortcut:
    left = iter([old.norm(i) for i in sorted({i for maps in sources for i in maps})])
    new = DenseShortcut(
        old.depth,
        old.channels,
        norm=(lambda channels: next(left)) if old.normalised else None,  # type: ignore[arg-type, return-value]
        init=old.init,
        center=old.center,
        backend=old.backend,
        sources=sources,
    )
    for weight, k in zip(new.weights, [k for k, maps in enumerate(sources) if maps], strict=True):
        rows = [old.sources[k].index(i) for i in sources[k]]
        weight.data = old.weight(k)[rows].clone()
    return new.train(old.training)
