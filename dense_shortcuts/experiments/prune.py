"""Fewer shortcuts for a trained network: the pairs of a block and an earlier map with the least weights are dropped."""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import DenseShortcutError
from ..nn.connectivity import Sources
from ..nn.shortcut import DenseShortcut
from ..surgery.plug import dense_stages
from .train.checkpoint import CARD, read_json, read_model, write_text
from .train.config import TuneConfig
from .train.measure import inference_speed
from .train.run import checkpoint_folder
from .train.tune import Tuned, accuracy, settings, tune


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


@dataclass(frozen=True)
class Pruned:
    """What pruning did: numbers of pairs, accuracy (%) and inference (images/s) before and after."""

    pairs: int
    kept: int
    before: float
    tuned: Tuned
    speed_before: float
    speed_after: float


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
        backend=old.backend,
        sources=sources,
    )
    for weight, k in zip(new.weights, [k for k, maps in enumerate(sources) if maps], strict=True):
        rows = [old.sources[k].index(i) for i in sources[k]]
        weight.data = old.weight(k)[rows].clone()
    return new.train(old.training)


def prune(checkpoint: Path | str, keep: float, how: TuneConfig) -> Pruned:
    """Drop the pairs with the least mean |w| of a trained network; leaves a run in a folder of its own.

    Args:
        checkpoint: a network's folder in a run, the model.safetensors in it, or `shipped`.
        keep: share of the pairs that stay, ranked over the whole network; each block keeps one at least.
        how: the further training, without which the weights stay as they are, and the images.

    Raises:
        DenseShortcutError: a network without weights to rank, a share outside (0, 1], images that are not there, a
            folder that exists.
    """
    folder = checkpoint_folder(Path(checkpoint))
    model, card = read_model(folder)
    ranked = pairs(model)
    kept = choose(ranked, keep)
    sources = sources_of(kept, model)
    config, data = settings(folder, card, how)
    before = accuracy(model, config, data)
    smaller = with_sources(model, sources)
    speeds = inference_speed([model, smaller], config)

    tuned = tune(smaller, config, data, how, name=f"{folder.parent.name}-keep-{keep:g}", command="prune")
    write_text(tuned.folder / CARD, json.dumps(read_json(tuned.folder / CARD) | {"sources": sources}, indent=2) + "\n")
    done = Pruned(len(ranked), len(kept), before, tuned, *speeds)
    figures = dataclasses.asdict(done) | {"tuned": dataclasses.asdict(tuned) | {"folder": tuned.folder.name}}
    write_text(tuned.folder.parent / "prune.json", json.dumps(figures | {"epochs": how.epochs}, indent=2) + "\n")
    return done
