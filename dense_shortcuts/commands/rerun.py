"""`dsnet rerun`: repeat a run and compare."""

from dataclasses import dataclass
from pathlib import Path

from .arguments import Positional


@dataclass(frozen=True)
class Rerun:
    """Repeat a finished run from its folder and compare metrics and weights; bit-equal is what a CPU should give."""

    folder: Positional[Path]
    """Folder of the run."""
    name: str | None = None
    """Name of the new folder beside it; None is the run's with -rerun."""

    def run(self, line: str) -> None:
        from ..experiments.train.rerun import rerun, sentences

        print("\n".join(sentences(*rerun(self.folder, self.name, line))))
