"""Fewer shortcuts for a trained network: the pairs of a block and an earlier map with the least weights are dropped."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ..files import read_json, write_text
from ..surgery.sparsify import choose, pairs, sources_of, with_sources
from .train.checkpoint import CARD, read_model
from .train.config import TuneConfig
from .train.measure import inference_speed
from .train.run import checkpoint_folder
from .train.tune import Tuned, accuracy, settings, tune


@dataclass(frozen=True)
class Pruned:
    """What pruning did: numbers of pairs, accuracy (%) and inference (images/s) before and after."""

    pairs: int
    kept: int
    before: float
    tuned: Tuned
    speed_before: float
    speed_after: float


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
