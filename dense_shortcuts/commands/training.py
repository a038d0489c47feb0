"""`dsnet compare`, `dsnet train` and `dsnet eval`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..experiments.train.config import DataName, NetworkName, TrainConfig, read_yaml
from .arguments import Positional


@dataclass(frozen=True)
class Run:
    """What `compare` and `train` take."""

    recipe: str | None = None
    """YAML file with settings, or the name of a recipe of the package; flags given beside it have the last word."""
    resume: Path | None = None
    """Folder of a run to go on with; nothing else is given beside it."""
    config: TrainConfig = field(default_factory=TrainConfig)

    read_recipe = staticmethod(read_yaml)


@dataclass(frozen=True)
class Compare(Run):
    """Train a residual network, its DSNet and a DenseNet of as many parameters on the same images with the same seeds,
    and say what each is worth in accuracy, time and memory."""

    networks: tuple[NetworkName, ...] = ()
    """Which of the three; () is all, or host and dsnet where no DenseNet can stand beside them."""
    seeds: tuple[int, ...] = ()
    """Seeds to train each with; () is --seed and the next one."""

    def run(self, line: str) -> None:
        from ..experiments.train import run as runs

        if self.resume is not None:
            runs.resume(self.resume, "compare")
        else:
            runs.compare(self.config, line, self.networks, self.seeds)


@dataclass(frozen=True)
class Train(Run):
    """Train one network."""

    def run(self, line: str) -> None:
        from ..experiments.train import run as runs

        if self.resume is not None:
            runs.resume(self.resume, "train")
        else:
            runs.train(self.config, line)


@dataclass(frozen=True)
class Eval:
    """Score a checkpoint on the test images of its run, or on others with the same classes."""

    checkpoint: Positional[Path]
    """A network's folder in a run, or the model.safetensors in it; `shipped` is the network in the package."""
    data: DataName | None = None
    """Source of the images; None is what it was trained on."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    limit_test: int | None = None
    """Use only so many test images; None is the run's own."""
    batch_size: int | None = None
    """Images at a time; None is the run's own."""
    workers: int | None = None
    """Worker processes that prepare images; None is the run's own."""

    def run(self, line: str) -> None:
        from ..experiments.train import run as runs

        print_figures(runs.evaluate(**vars(self)))


def print_figures(figures: dict[str, Any]) -> None:
    """One line with the scores."""
    top5 = f", top-5 {figures['top5']:.2f} %" if "top5" in figures else ""
    print(
        f"{figures['checkpoint']} ({figures['model']}): accuracy {figures['top1']:.2f} %{top5}, "
        f"loss {figures['loss']:.4f} on {figures['images']:,} test images"
    )
