"""docs/detect.md holds: its commands run on a tiny set, and its snippet runs."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import detect_helpers
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from dense_shortcuts import recipes
from dense_shortcuts.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "detect.md").read_text(encoding="utf-8")
TINY = [
    *(
        "--model=tiny_backbone",
        "--detector=fcos",
        "--img-size=64",
        "--fpn-channels=64",
        "--limit-train=2",
        "--limit-val=1",
    ),
    *("--batch-size=2", "--epochs=1", "--workers=0", "--precision=no"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


COMMANDS = [
    " ".join(line.split("#")[0].split())
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("dsnet ")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, clean_set) -> Iterator[Path]:
    """A folder with an image, and weights for --pretrained."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(clean_set / "val2017" / "000500.png", folder / "IMAGES")
    save_file(timm.create_model("tiny_backbone").state_dict(), folder / "host.safetensors")
    yield folder
    shutil.rmtree(folder)


def complete(command: str, data: Path, number: int) -> list[str]:
    """A command's arguments with DIR filled in and, where it trains, with tiny sizes."""
    arguments = [str(data) if word == "DIR" else word for word in shlex.split(command)[1:]]
    if arguments[1] not in ("train", "compare") or "--resume" in arguments:
        return arguments
    tiny = [word for word in TINY if "maskrcnn" not in arguments or not word.startswith("--detector")]
    tiny += ["--seeds", "0"] if arguments[1] == "compare" else []
    return [*arguments, *tiny, *([] if "--name" in arguments else ["--name", f"run-{number}"])]


def test_every_verb_has_a_command():
    assert {command.split()[2] for command in COMMANDS} == {"train", "eval", "predict", "compare"}
    assert len(COMMANDS) == 7


def test_the_commands_run_in_their_order(place, clean_set, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delenv("DENSE_SHORTCUTS_DATA", raising=False)
    monkeypatch.setitem(detect_helpers.OVERLAY, "file", str(place / "host.safetensors"))
    for number, command in enumerate(COMMANDS):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(complete(command, clean_set, number)) == 0, (command, capsys.readouterr().err)
    assert {p.name for p in Path("runs").iterdir()} == {"NAME", "run-4", "run-5", "run-6"}
    assert Path("runs/NAME/eval-val.json").is_file() and Path("detections/IMAGES.png").is_file()
    assert Path("runs/run-6/table.md").is_file()


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_snippet_runs_as_it_stands(snippet, capsys):
    names: dict = {}
    exec(compile(snippet, "detect.md", "exec"), names)
    assert isinstance(names["body"], torch.nn.Module) and "(4, 8, 16, 32)" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(recipes.FOLDER.glob("detect-*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_whole_configuration(recipe):
    from dense_shortcuts.experiments.detect.config import DetectConfig, read_recipe

    assert isinstance(read_recipe(recipe), DetectConfig)
    assert f"--recipe {recipe.stem} " in recipe.read_text()


def test_linked_and_named_files_are_there():
    named = re.findall(r"\b(?:docs|tests)/[\w./-]+\.\w+", TEXT)
    assert named and [path for path in named if not (ROOT / path).is_file()] == []
