"""The README holds: its snippets run, its commands run at a tiny size, its make targets and files are there."""

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from small_run import TWINS
from train.train_helpers import png, write_parquet

import dense_shortcuts as ds
from dense_shortcuts import recipes
from dense_shortcuts.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    *("--limit-train=4", "--limit-test=4", "--batch-size=4", "--epochs=1", "--warmup-epochs=0"),
    *("--img-size=16", "--workers=0"),
]
TINY_BENCH = [
    *("--device=cpu", "--models", "timm.resnet50", "--what", "infer", "--modes", "eager", "--rounds=1"),
    *("--batch-size=1", "--image-size", "32"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[str]:
    """Every command of a program, from the shell blocks without their comments and from inline code."""
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE))
    found = [" ".join(text.split()) for text in [*lines, *inline]]
    return sorted({text for text in found if re.match(rf"{program} \w", text)})


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_snippet_runs_as_it_stands(snippet):
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    networks = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    assert networks and all(
        any(isinstance(module, ds.DenseStage) for module in network.modules()) for network in networks
    )


def test_the_one_line_adds_as_many_parameters_as_its_comment_says():
    said = float(re.search(r"ResNet-50 in, DSNet-50 out: ([\d.]+) M parameters more", README)[1])
    assert round(ds.plan(timm.create_model("resnet50")).parameters / 1e6, 2) == said


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A working folder with generated images of both kinds, and a finished comparison in runs/NAME."""
    folder = tmp_path_factory.mktemp("readme")
    furnish(folder)
    assert in_folder(folder, lambda: main(["compare", *TWINS, *TINY, "--name", "NAME"])) == 0
    yield folder
    shutil.rmtree(folder)


def furnish(folder: Path) -> None:
    """Put generated images of both kinds into a folder."""
    for part in ("train", "test"):
        write_parquet(folder / "cifar100", part, [png(i, size=32) for i in range(8)], list(range(8)))
        for label in ("ants", "bees"):
            (folder / "imagefolder" / part / label).mkdir(parents=True)
            for i in range(4):
                (folder / "imagefolder" / part / label / f"{i}.png").write_bytes(png(i, size=20))


def in_folder(folder: Path, call: Callable[[], int]) -> int:
    """Call from a folder; Accelerate, which keeps precision and device for the whole process, begins anew."""
    before = Path.cwd()
    os.chdir(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return call()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.chdir(before)


def complete(command: str) -> list[str]:
    """The command's arguments with the README's placeholders filled in and, where it trains, with tiny sizes."""
    data = "imagefolder" if "imagefolder" in command else "cifar100"
    arguments = shlex.split(re.sub(r"\bDIR\b", data, command).replace("<name>", "NAME"))[1:]
    if arguments[0] == "bench":
        return [*arguments, *TINY_BENCH]
    if arguments[0] == "support":
        return [*arguments, "test_resnet"]
    trains = arguments[0] in ("compare", "train") and "--resume" not in arguments
    arguments += TWINS if arguments[0] == "compare" and trains else []
    return [*arguments, *TINY] if trains else arguments


def test_commands_are_found():
    verbs = {command.split()[1] for command in commands("dsnet")}
    assert verbs == {"compare", "train", "eval", "models", "bench", "info", "support"}
    assert {"make compare", "make test"} <= set(commands("make"))


@pytest.mark.long
@pytest.mark.parametrize("command", commands("dsnet"))
def test_a_command_runs(command, place, capsys, monkeypatch):
    monkeypatch.delenv("DENSE_SHORTCUTS_DATA", raising=False)
    arguments = complete(command)
    before = set((place / "runs").iterdir())
    name = ["--name", f"run-{len(before)}"] if TINY[0] in arguments else []
    name = ["--output", f"figures-{len(command)}"] if arguments[0] == "bench" else name
    assert in_folder(place, lambda: main([*arguments, *name])) == 0, capsys.readouterr().err
    made = set((place / "runs").iterdir()) - before
    assert len(made) == (arguments[0] in ("compare", "train") and TINY[0] in arguments)
    for run in made:
        assert (run / "table.md").is_file() and (run / "curves.png").is_file() and (run / "config.yaml").is_file()
        assert len(list(run.glob("*/model.safetensors"))) == (2 if arguments[0] == "compare" else 1)


@pytest.mark.parametrize("command", commands("make"))
def test_a_make_target_installs_what_it_needs_and_calls_what_is_said(command, tmp_path):
    target = command.split()[1]
    calls = {
        "compare": "dsnet compare",
        "test": "python -m pytest -n logical --maxprocesses 4 --dist worksteal "
        '-m "not accuracy and not families and not long"',
        "accuracy": "python -m pytest -m accuracy",
        "docs": "mkdocs build --strict",
    }
    # `make test` runs this test: what that make tells its children must not reach the one started here
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    dry = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path / 'new'}"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    steps = [step for step in dry.stdout.splitlines() if step]
    assert steps[0] == f"python3 -m venv {tmp_path / 'new'}"
    extra = {"compare": "train"}.get(target, "dev")
    assert "pip install" in steps[1] and f"--editable '.[{extra}]'" in steps[1]
    assert steps[-1].endswith(f"{tmp_path / 'new' / 'bin'}/{calls[target]}")


def test_ci_runs_the_tests_of_the_readme_and_the_long_ones_once_each():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test-all"
    rules = (ROOT / "Makefile").read_text()
    assert "\ntest-all: test test-long\n" in rules
    selections = re.findall(r"\$\(PYTEST\) -m \"(.*)\"", rules)
    assert selections == ["not accuracy and not families and not long", "long and not accuracy and not families"]


# What else it states --------------------------------------------------------------------------------------------------


def test_linked_and_named_files_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    named = re.findall(r"\bdocs/[\w.-]+\.\w+", README)
    recipe = re.findall(r"--recipe ([\w-]+)|`(cifar[\w-]+)`", README)
    assert {recipes.find("".join(each)).stem for each in recipe} == {"cifar100-cpu", "cifar100-20ep"}
    assert [path for path in {*links, *named} if not (ROOT / path).is_file()] == []


def test_the_families_it_counts_are_those_of_the_page_on_support():
    residual, served = re.search(
        r"Of the (\d+) families .*?blocks, (\d+)\s+can\s+be\s+plugged\s+into", README, re.DOTALL
    ).groups()
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert re.search(rf"[Oo]f {residual} (families )?with residual blocks {served} are served", page)


def test_the_table_of_choices_holds_plug_ins_keywords_with_values_that_it_takes():
    page = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `(.+?)` \|$", page, re.MULTILINE)
    keywords = {n: p for n, p in inspect.signature(ds.plug_in).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert {name for name, _, _ in rows} == set(keywords)
    host = timm.create_model("resnet26", channels=(8, 8, 8, 8))
    for name, values, default in rows:
        accepted = [value for value in re.findall(r'`"(\w+)"`', values)]
        for value in accepted:
            ds.plan(host, **{name: value})
        said = default.strip('"') if default.startswith('"') else ast.literal_eval(default)
        assert said == keywords[name].default or (name, said) == ("init", "uniform")
        assert not accepted or said in accepted
