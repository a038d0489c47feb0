"""`dsnet sweep`: a grid of runs over seeds."""

from dataclasses import dataclass
from pathlib import Path

from .arguments import Positional


@dataclass(frozen=True)
class Sweep:
    """Run a grid of networks and recipes over seeds, and write its table with spread, paired test and plot.

    Started again it goes on; started several times at once, the workers share the runs.
    """

    file: Positional[Path]
    """YAML file with base, grid and seeds (docs/sweeps.md), or the name of a sweep of the package."""
    data_dir: str | None = None
    """Folder of the data; None is the file's own."""
    set: tuple[str, ...] = ()
    """Settings of the form epochs=2 that have the last word in every row."""
    output: Path = Path("runs")
    """Folder in which the sweep's folder is made."""
    name: str | None = None
    """Name of the sweep's folder; None is the file's."""
    status: bool = False
    """Only say what is done."""

    def run(self, line: str) -> None:
        from .. import recipes
        from ..experiments.sweep import run as sweeps
        from ..experiments.sweep.spec import read_sweep

        file = recipes.find(self.file)
        asked = read_sweep(file, self.set, self.data_dir)
        folder = self.output / (self.name or file.stem)
        if self.status:
            sweeps.status(asked, folder)
        else:
            sweeps.sweep(asked, folder)
