"""`dsnet demo`: a page on this machine."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Serve a page on this machine: top-5 and maps of two networks, shortcut weights, curves of runs, benchmarks."""

    runs: Path = Path("runs")
    """Folder of the runs and benchmarks to choose from."""
    port: int | None = None
    """Port; None takes the first free one from 7860 on."""
    open: bool = False
    """Open the page in the default browser."""

    def run(self, line: str) -> None:
        from ..experiments.demo.app import serve

        serve(self.runs, self.port, browser=self.open)
