"""`dsnet support`: which networks of timm and torchvision can be plugged into."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Support:
    """Plug into one network of every architecture of timm and torchvision, and write what works as a table."""

    pattern: tyro.conf.Positional[str] = "*"
    """A wildcard of network names, such as 'resnet*'."""
    output: Path = Path("support")
    """Folder for the table, support.md, and the rows as JSON lines; rows that are there already are not made anew."""

    def run(self, line: str) -> None:
        from ..support import markdown, sweep

        self.output.mkdir(parents=True, exist_ok=True)
        rows = sweep(self.pattern, self.output / "rows.jsonl", print)
        (self.output / "support.md").write_text(markdown(rows, line), encoding="utf-8")
        print(f"table: {self.output / 'support.md'}")
