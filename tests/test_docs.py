"""The pages under docs/ hold: snippets run, commands run at a tiny size, and the few blocks that cannot run say why.

A block that cannot run (it needs a GPU, a download, an hour) has a line directly before it:

    <!-- not run: why -->
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_network  # noqa: F401 (registers it)
from small_run import TWINS
from test_readme import README, TINY, TINY_BENCH, furnish, in_folder

from dense_shortcuts.cli import main, parse

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TRAINS = ("compare", "train")
LEAVES_A_RUN = (*TRAINS, "prune", "renorm")

# Commands that another test runs, with what they leave; they take seconds, so here they are parsed alone.
RUN_BY = {
    "dsnet export runs/NAME/stage-auto --to onnx --int8": "tests/export/test_export.py",
    "dsnet export runs/NAME/stage-auto --to torch-export --int8": "tests/export/test_export.py",
    "dsnet export runs/NAME/stage-auto --to openvino": "tests/export/test_export.py",
    "dsnet export runs/NAME/stage-auto --to executorch": "tests/export/test_export.py",
}

# Pages whose commands need images of their own; the test beside them runs them.
RUN_WITH = {
    "data.md": "tests/train/test_data_guide.py",
    "demo.md": "tests/explain/test_explain_docs.py",
    "detect.md": "tests/detect/test_detect_docs.py",
    "explain.md": "tests/explain/test_explain_docs.py",
    "sweeps.md": "tests/sweep/test_sweep_docs.py",
}


@dataclass(frozen=True)
class Block:
    """A block of code in a page; `reason` is why it is not run, if it says so."""

    page: str
    language: str
    code: str
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    pattern = r"^(?:<!-- not run: ?(.*?) ?-->\n)?```(bash|python)\n(.*?)^```"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(page.name, language, code, reason or None) for reason, language, code in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands() -> list[str]:
    """Every dsnet command of the blocks that run; those of the README are run by its own test."""
    lines = [
        " ".join(line.split("#")[0].split())
        for block in BLOCKS
        if block.language == "bash" and block.reason is None and block.page not in RUN_WITH
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    known = {" ".join(line.split("#")[0].split()) for line in README.splitlines()}
    return sorted({line for line in lines if line.startswith("dsnet ") and line not in known})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A working folder with generated images and a finished comparison of tiny networks in runs/NAME."""
    folder = tmp_path_factory.mktemp("docs")
    furnish(folder)
    twins = ["compare", *TWINS, *TINY, "--model", "tiny_resnet", "--name", "NAME"]
    assert in_folder(folder, lambda: main(twins)) == 0
    yield folder
    shutil.rmtree(folder)


def complete(command: str, number: int) -> list[str]:
    """The command's arguments with placeholders filled in and, where it trains or measures, with tiny sizes."""
    data = "imagefolder" if "imagefolder" in command else "cifar100"
    arguments = shlex.split(re.sub(r"\bDIR\b", data, command))[1:]
    if arguments[0] == "bench":
        return [*arguments, *TINY_BENCH, "--output", f"figures-{number}"]
    if "--resume" in arguments:
        return arguments
    if arguments[0] == "compare":
        arguments += TWINS
    if arguments[0] in TRAINS:
        arguments += TINY
    if arguments[0] in LEAVES_A_RUN and "--name" not in arguments:
        arguments += ["--name", f"run-{number}"]
    return arguments


@pytest.mark.parametrize("command", RUN_BY)
def test_a_command_that_another_test_runs_is_there(command):
    assert command in commands()
    parse(shlex.split(command)[1:])
    _, verb, _, *flags = shlex.split(command)
    code = re.sub(r'[",]', "", (ROOT / RUN_BY[command]).read_text(encoding="utf-8"))
    assert re.search(rf"main\(\[{verb} str\(folder\) {' '.join(flags)}\]\)", code)


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in commands() if command not in RUN_BY])
def test_a_command_runs(command, place, capsys, monkeypatch):
    monkeypatch.delenv("DENSE_SHORTCUTS_DATA", raising=False)
    before = {path.name for path in (place / "runs").iterdir()}
    arguments = complete(command, commands().index(command))
    assert in_folder(place, lambda: main(arguments)) == 0, capsys.readouterr().err
    made = {path.name for path in (place / "runs").iterdir()} - before
    assert len(made) == (arguments[0] in LEAVES_A_RUN and "--resume" not in arguments)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python" and b.reason is None], ids=lambda block: block.page
)
def test_a_snippet_runs_as_it_stands(block):
    exec(compile(block.code, block.page, "exec"), {})


@pytest.mark.parametrize("page", RUN_WITH)
def test_a_page_with_a_test_of_its_own_has_one(page):
    assert page in {path.name for path in PAGES}
    assert page in (ROOT / RUN_WITH[page]).read_text(encoding="utf-8")


def test_commands_are_found():
    assert {"prune", "renorm", "export"} <= {command.split()[1] for command in commands()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_that_does_not_run_says_why(page):
    blocks = [block for block in BLOCKS if block.page == page.name]
    assert all(len(block.reason) >= 10 for block in blocks if block.reason is not None)
    assert page.read_text(encoding="utf-8").count("<!-- not run") == sum(b.reason is not None for b in blocks)
    for block in blocks:
        if block.language == "bash" and block.reason is None and page.name not in RUN_WITH:
            lines = [line for line in block.code.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]
            assert [line for line in lines if not line.startswith("dsnet ")] == []


def test_most_blocks_run():
    unrun = [block for block in BLOCKS if block.reason is not None]
    assert len(unrun) < len(BLOCKS) / 3
