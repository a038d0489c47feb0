"""`dsnet detect train`, `eval`, `predict` and `compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..experiments.detect.config import DetectConfig, read_recipe
from .arguments import Positional


@dataclass(frozen=True)
class DetectRun:
    """What `detect train` and `detect compare` take."""

    recipe: str | None = None
    """YAML file with settings, or the name of a recipe of the package; flags given beside it have the last word."""
    resume: Path | None = None
    """Folder of a run to go on with; nothing else is given beside it."""
    config: DetectConfig = field(default_factory=DetectConfig)

    read_recipe = staticmethod(read_recipe)


@dataclass(frozen=True)
class DetectTrain(DetectRun):
    """Train a detector on images in COCO format."""

    def run(self, line: str) -> None:
        from ..experiments.detect import run as runs

        if self.resume is not None:
            runs.resume(self.resume, runs.TRAIN)
        else:
            runs.train(self.config)


@dataclass(frozen=True)
class DetectCompare(DetectRun):
    """Train the detector of a host network and that of its DSNet twin with every seed, and tabulate both."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to train both with."""

    def run(self, line: str) -> None:
        from ..experiments.detect import run as runs

        if self.resume is not None:
            runs.resume(self.resume, runs.COMPARE)
        else:
            runs.compare(self.config, self.seeds)


@dataclass(frozen=True)
class DetectEval:
    """Score a detector: the twelve figures of COCO, printed and written as JSON."""

    checkpoint: Positional[Path]
    """A run's folder, or the model.safetensors in it."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    split: Literal["val", "train"] = "val"
    """Images to score."""
    limit: int | None = None
    """Use only so many images (a fixed sample); None is the run's own."""
    batch_size: int | None = None
    """Images at a time; None is the run's own."""
    workers: int | None = None
    """Worker processes that prepare images; None is the run's own."""
    output: Path | None = None
    """JSON file to write; None is eval-SPLIT.json in the run's folder."""

    def run(self, line: str) -> None:
        from ..experiments.detect import run as runs

        runs.evaluate(**vars(self))


@dataclass(frozen=True)
class DetectPredict:
    """Draw what a detector finds in images, and write it in COCO's result format."""

    checkpoint: Positional[Path]
    """A run's folder, or the model.safetensors in it."""
    images: Positional[tuple[Path, ...]]
    """Images, or folders of images."""
    threshold: float = 0.5
    """Lowest score of a box that is drawn."""
    output: Path = Path("detections")
    """Folder for the drawings and detections.json."""

    def run(self, line: str) -> None:
        from ..experiments.detect import draw

        draw.predict(**vars(self))
