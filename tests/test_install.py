"""The package beside torch, timm and safetensors alone: what works there, and what is said of the rest."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.extras import EXTRAS, is_installed, need

ROOT = Path(__file__).parents[1]


CORE = ("torch", "timm", "safetensors")


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> Path:
    """A folder to import from with the package and what `pip install dense-shortcuts` brings, and nothing else."""
    return installation(tmp_path_factory.mktemp("core"), *CORE)


def installation(folder: Path, *packages: str) -> Path:
    """The folder, filled with links to the package and to these others and what they require."""
    (folder / "dense_shortcuts").symlink_to(ROOT / "dense_shortcuts")
    for name in brought(*packages):
        installed = distribution(name)
        tops = {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(installed.locate_file(top))
    return folder


def brought(*names: str) -> set[str]:
    """These packages, and those that they require on this machine."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for requirement in distribution(name).requires or ():
            wanted, _, condition = requirement.partition(";")
            if holds(condition):
                left.append(re.match(r"[\w.-]+", wanted)[0])
    return found


def holds(condition: str) -> bool:
    from packaging.markers import Marker

    return not condition or Marker(condition).evaluate({"extra": ""})


def python(core: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process without site-packages, started in a folder."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=os.environ | {"PYTHONPATH": str(core)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_imports_and_a_network_is_plugged_in_and_fused_with_the_core_alone(core, tmp_path):
    code = f"""
import importlib, pkgutil, sys
import timm, torch
import dense_shortcuts as ds
assert not [m for extra in {EXTRAS!r}.values() for m in extra if importlib.util.find_spec(m)]
net = ds.plug_in(timm.create_model("resnet18", num_classes=3)).eval()
images = torch.zeros(2, 3, 64, 64)
assert torch.allclose(ds.fuse(net)(images), net(images), atol=1e-4)
assert ds.load(timm.create_model("dsnet18", num_classes=3), net.state_dict()) is not None
assert ds.check(net, (3, 64, 64)) == []
import dense_shortcuts.backbone, dense_shortcuts.summation, dense_shortcuts.export
# Triton's kernels are imported where Triton is, and the libraries for the CPU are loaded, not imported.
for module in pkgutil.walk_packages(ds.__path__, "dense_shortcuts."):
    if not module.name.endswith((".triton", ".native_base", ".native_avx2", ".native_avx512")):
        importlib.import_module(module.name)
print("done")
"""
    done = python(core, "-c", code, folder=tmp_path)
    assert done.stdout == "done\n", done.stderr


RUNS = [
    (["--help"], "usage: dsnet [-h] COMMAND ..."),
    (["train", "--help"], "Learning rate after the warm-up"),
    (["models", "ds2net50"], "ds2net50\n"),
    (["info"], "cpu back end: "),
    (["scaling", "--images-per-second", "1000", "--model", "dsnet18"], "| 64 | "),
    (["support", "resnet18"], "page: support/support.md"),
]
REFUSALS = [
    (["compare"], "training needs accelerate: pip install 'dense-shortcuts[train]'."),
    (["eval", "shipped"], "reading images needs accelerate: pip install 'dense-shortcuts[train]'."),
    (["renorm", "shipped"], "reading images needs accelerate: pip install 'dense-shortcuts[train]'."),
    (["sweep", "sweep-cpu"], "a sweep needs optuna: pip install 'dense-shortcuts[sweep]'."),
    (["export", "shipped", "--to", "onnx"], "a .onnx file needs onnx: pip install 'dense-shortcuts[export]'."),
    (["bench"], "`dsnet bench` needs accelerate: pip install 'dense-shortcuts[train]'."),
    (["shortcuts", "shipped"], "`dsnet shortcuts` needs accelerate: pip install 'dense-shortcuts[train]'."),
    (["cam", "x.png"], "`dsnet cam` needs accelerate: pip install 'dense-shortcuts[train]'."),
    (["demo"], "the page needs gradio: pip install 'dense-shortcuts[demo]'."),
    (["detect", "train", "--data-dir", "."], "training needs accelerate: pip install 'dense-shortcuts[train]'."),
]


def outcomes(commands: list[list[str]], core: Path, folder: Path) -> list[list]:
    """Exit code, stdout and stderr of each command, all in one process."""
    code = f"""
import contextlib, io, json, sys
from dense_shortcuts.cli import main
found = []
for command in {commands!r}:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(command)
        except SystemExit as help:
            code = help.code
    found.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(found))
"""
    done = python(core, "-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_the_commands_of_the_core_run(core, tmp_path):
    found = outcomes([command for command, _ in RUNS], core, tmp_path)
    for (command, told), (code, out, error) in zip(RUNS, found, strict=True):
        assert not code and told in out, (command, error)


def test_a_command_whose_extra_is_missing_is_one_sentence_with_code_2_and_leaves_nothing(core, tmp_path):
    found = outcomes([command for command, _ in REFUSALS], core, tmp_path)
    assert found == [[2, "", f"dsnet: error: {sentence}\n"] for _, sentence in REFUSALS]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_extra_for_training_is_enough_to_compare(tmp_path):
    (tmp_path / "site").mkdir()
    site = installation(tmp_path / "site", *CORE, *EXTRAS["train"].values())
    tiny = ["--img-size=8", "--crop-padding=1", "--limit-train=64", "--limit-test=32", "--epochs=1"]
    tiny += ["--warmup-epochs=0", "--name=a"]
    done = python(site, "-m", "dense_shortcuts.cli", "compare", *tiny, "--seeds=0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "table.md").is_file() and (tmp_path / "runs" / "a" / "curves.png").is_file()


class Blocked:
    """An import hook that refuses a module."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.module:
            raise ImportError(f"{name} is blocked")


@pytest.mark.parametrize(("extra", "module"), [(extra, module) for extra in EXTRAS for module in EXTRAS[extra]])
def test_a_module_that_an_import_hook_blocks_is_missing(extra, module, monkeypatch):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocked(module), *sys.meta_path])
    assert not is_installed(module)
    with pytest.raises(DenseShortcutError, match=r"^this needs [\w-]+: pip install 'dense-shortcuts\[\w+\]'\.$"):
        need("this", extra, module)


def test_what_is_installed_is_not_missing():
    assert importlib.util.find_spec("accelerate") and is_installed("accelerate")
    need("this", "train")
