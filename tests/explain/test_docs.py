"""The commands of docs/explain.md and docs/demo.md run as they stand, at a tiny size."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dense_shortcuts.cli import main, parse
from dense_shortcuts.commands.demo import Demo

DOCS = Path(__file__).parents[2] / "docs"


def commands(name: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("dsnet ")]


@pytest.mark.parametrize("command", [c for c in commands("explain.md") if "benchmarks" not in c and "cells" not in c])
def test_a_command_of_the_guide_runs(command, trained, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = photo("images-0.png")
    (tmp_path / "FOLDER").mkdir()
    image.rename(tmp_path / "FOLDER" / image.name)
    boxes = {"images": [{"id": 0, "file_name": image.name}], "categories": [{"id": 0, "name": "thing"}]}
    boxes["annotations"] = [{"image_id": 0, "category_id": 0, "bbox": [8, 4, 20, 20]}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    filled = command.replace("IMAGE", f"FOLDER/{image.name}").replace("BOXES", "boxes.json")
    arguments = shlex.split(filled.replace("runs/NAME", str(trained.parent)))[1:]
    assert main(arguments) == 0, capsys.readouterr().err
    assert len(list(tmp_path.rglob("*.png"))) == 2 and len(list(tmp_path.rglob("*.json"))) == 2


@pytest.mark.parametrize("command", commands("demo.md"))
def test_a_command_of_the_page_is_understood(command):
    assert isinstance(parse(shlex.split(command)[1:]), Demo)


def test_all_commands_are_found_and_all_pictures_are_there():
    assert len(commands("explain.md")) >= 5 and len(commands("demo.md")) == 2
    pictures = re.findall(r"\]\((screenshots/[^)]+)\)", (DOCS / "demo.md").read_text(encoding="utf-8"))
    assert pictures and [p for p in pictures if not (DOCS / p).is_file() or (DOCS / p).stat().st_size > 200_000] == []
