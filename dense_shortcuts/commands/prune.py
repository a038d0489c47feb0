"""`dsnet prune` and `dsnet renorm`: a trained network changed for deployment, and trained on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..experiments.train.config import TuneConfig
from .arguments import Positional


@dataclass(frozen=True)
class Prune:
    """Drop the shortcuts with the least weights of a trained network, and say what that changes."""

    checkpoint: Positional[Path]
    """A network's folder in a run, or the model.safetensors in it; `shipped` is the network in the package."""
    keep: float
    """Share of the pairs (block, earlier map) that stay, ranked by mean |w| over the whole network."""
    training: TuneConfig = field(default_factory=TuneConfig)

    def run(self, line: str) -> None:
        from ..experiments.prune import prune

        done = prune(self.checkpoint, self.keep, self.training)
        after = f", {done.tuned.end:.2f} % after {self.training.epochs} epochs" if self.training.epochs else ""
        print(
            f"{done.tuned.folder}: {done.kept} of {done.pairs} pairs kept; accuracy {done.before:.2f} % before, "
            f"{done.tuned.start:.2f} % without them{after}, on {done.tuned.images:,} test images; inference "
            f"{done.speed_before:,.0f} images/s before, {done.speed_after:,.0f} after"
        )


@dataclass(frozen=True)
class Renorm:
    """Give a trained network's dense shortcuts another norm, train it on, and say what that costs in accuracy."""

    checkpoint: Positional[Path]
    """A network's folder in a run, or the model.safetensors in it; `shipped` is the network in the package."""
    norm: Literal["batch", "group", "layer", "instance"] = "batch"
    """The new norm."""
    training: TuneConfig = field(default_factory=lambda: TuneConfig(epochs=5))

    def run(self, line: str) -> None:
        from ..experiments.renorm import renorm

        done = renorm(self.checkpoint, self.norm, self.training)
        print(
            f"{done.tuned.folder}: accuracy {done.tuned.end:.2f} % with {self.norm} norm after {self.training.epochs} "
            f"epochs, {done.tuned.start:.2f} % before them, {done.before:.2f} % with the norm it had, "
            f"on {done.tuned.images:,} test images"
        )
