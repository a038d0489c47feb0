"""`dsnet sweep`: a grid of runs over seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Sweep:
    """Run a grid of networks and recipes over seeds, and write its table with spread, paired test and plot.

    Started again it goes on; started several times at once, the workers share the runs.
    """

    file: tyro.conf.Positional[Path]
    """YAML file with base, grid and seeds: docs/sweeps.md."""
    data_dir: str | None = None
    """Folder of the data; None is the file's own."""
    changes: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Settings of the form epochs=2 that have the last word in every row."""
    output: Path = Path("runs")
    """Folder in which the sweep's folder is made."""
    name: str | None = None
    """Name of the sweep's folder; None is the file's."""
    status: bool = False
    """Only say what is done."""

    def run(self, line: str) -> None:
        from ..experiments.sweep import run as sweeps
        from ..experiments.sweep.spec import read_sweep

        asked = read_sweep(self.file, self.changes, self.data_dir)
        folder = self.output / (self.name or self.file.stem)
        if self.status:
            sweeps.status(asked, folder)
        else:
            sweeps.sweep(asked, folder)
