"""The commands of docs/explain.md and docs/demo.md run as they stand, at a tiny size."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from dense_shortcuts.cli import main, parse
from dense_shortcuts.commands.demo import Demo

DOCS = Path(__file__).parents[2] / "docs"


def commands(name: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("dsnet ")]


@pytest.mark.parametrize("command", [c for c in commands("explain.md") if "cells" not in c])
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


def blood(folder: Path, seed: int) -> None:
    """Two generated photos a part, laid out as BCCD is: a white cell in one, a platelet in the other."""
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(("RBC", "WBC", "Platelets"))],
            "annotations": [{"image_id": i, "category_id": i + 1, "bbox": [40, 40, 60, 60]} for i in range(2)]
            + [{"image_id": i, "category_id": 0, "bbox": [300, 20, 330, 430]} for i in range(2)],
        }
        (folder / f"instances_{part}.json").write_text(json.dumps(content))
        for i in range(2):
            pixels = np.random.default_rng(seed + i).integers(0, 256, (480, 640, 3), np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.jpg")


def test_the_commands_of_the_measurement_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blood(tmp_path / "BCCD", seed=0)
    script = DOCS.parent / "benchmarks" / "cell_windows.py"
    subprocess.run([sys.executable, script, "BCCD", "cells"], check=True)
    assert {path.name for path in Path("cells/val").iterdir()} == {"RBC", "WBC", "Platelets"}
    compare, cam = (shlex.split(c)[1:] for c in commands("explain.md") if "cells" in c)
    tiny = ["--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0", "--img-size", "16", "--crop-padding", "2"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*compare, *tiny]) == 0, capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(cam) == 0, capsys.readouterr().err
    report = json.loads(Path("cam.json").read_text())
    assert report["target"] == "category of the boxes" and report["localisation"][0]["networks"][0]["n"] > 0


@pytest.mark.parametrize("command", commands("demo.md"))
def test_a_command_of_the_page_is_understood(command):
    assert isinstance(parse(shlex.split(command)[1:]), Demo)


def test_all_commands_are_found_and_all_pictures_are_there():
    assert len(commands("explain.md")) >= 5 and len(commands("demo.md")) == 2
    pictures = re.findall(r"\]\((screenshots/[^)]+)\)", (DOCS / "demo.md").read_text(encoding="utf-8"))
    assert pictures and [p for p in pictures if not (DOCS / p).is_file() or (DOCS / p).stat().st_size > 200_000] == []
