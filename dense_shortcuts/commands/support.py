"""`dsnet support`: which networks of timm and torchvision can be plugged into."""

from dataclasses import dataclass
from pathlib import Path

from .arguments import Positional


@dataclass(frozen=True)
class Support:
    """Plan every network of timm and torchvision, plug into one of each architecture, and write down what works."""

    pattern: Positional[str] = "*"
    """A wildcard of network names, such as 'resnet*'."""
    output: Path = Path("support")
    """Folder for the page, support.md, and what was seen as JSON lines; what is there already is not made anew."""

    def run(self, line: str) -> None:
        from ..experiments.support.report import markdown
        from ..experiments.support.sweep import sweep

        self.output.mkdir(parents=True, exist_ok=True)
        plans, rows = sweep(self.pattern, self.output, print)
        (self.output / "support.md").write_text(markdown(plans, rows, line), encoding="utf-8")
        print(f"page: {self.output / 'support.md'}")
