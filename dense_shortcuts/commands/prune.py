"""`dsnet prune` and `dsnet renorm`: a trained network changed for deployment, and trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Prune:
    """Drop the shortcuts with the least weights of a trained network, and say what that changes."""

    checkpoint: tyro.conf.Positional[Path]
    """A network's folder in a run, or the model.safetensors in it."""
    keep: float
    """Share of the pairs (block, earlier map) that stay, ranked by mean |w| over the whole network."""
    epochs: int = 0
    """Passes over the training images afterwards."""
    lr: float = 0.02
    """Highest learning rate of these; it falls to zero by a cosine."""
    name: str | None = None
    """Name of the new run; None is the run's own name and the share."""
    output: Path = Path("runs")
    """Folder in which the run's folder is made."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    limit_train: int | None = None
    """Use only so many training images; None is the run's own."""
    limit_test: int | None = None
    """Use only so many test images; None is the run's own."""

    def run(self, line: str) -> None:
        from ..prune import prune

        done = prune(**vars(self))
        after = f", {done.tuned.end:.2f} % after {self.epochs} epochs" if self.epochs else ""
        print(
            f"{done.tuned.folder}: {done.kept} of {done.pairs} pairs kept; accuracy {done.before:.2f} % before, "
            f"{done.tuned.start:.2f} % without them{after}, on {done.tuned.images:,} test images; inference "
            f"{done.speed_before:,.0f} images/s before, {done.speed_after:,.0f} after"
        )


@dataclass(frozen=True)
class Renorm:
    """Give a trained network's dense shortcuts another norm, train it on, and say what that costs in accuracy."""

    checkpoint: tyro.conf.Positional[Path]
    """A network's folder in a run, or the model.safetensors in it."""
    norm: Literal["batch", "group", "layer", "instance"] = "batch"
    """The new norm."""
    epochs: int = 5
    """Passes over the training images; 0 changes the norm alone."""
    lr: float = 0.02
    """Highest learning rate; it falls to zero by a cosine."""
    name: str | None = None
    """Name of the new run; None is the run's own name and the norm's."""
    output: Path = Path("runs")
    """Folder in which the run's folder is made."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    limit_train: int | None = None
    """Use only so many training images; None is the run's own."""
    limit_test: int | None = None
    """Use only so many test images; None is the run's own."""

    def run(self, line: str) -> None:
        from ..renorm import renorm

        done = renorm(**vars(self))
        print(
            f"{done.tuned.folder}: accuracy {done.tuned.end:.2f} % with {self.norm} norm after {self.epochs} epochs, "
            f"{done.tuned.start:.2f} % before them, {done.before:.2f} % with the norm it had, "
            f"on {done.tuned.images:,} test images"
        )
