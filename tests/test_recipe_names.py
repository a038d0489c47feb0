"""Recipes by name, and commands that the program prints: both work in any folder."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from dense_shortcuts import recipes
from dense_shortcuts.cli import main, parse
from dense_shortcuts.experiments.command import dsnet
from dense_shortcuts.experiments.sweep.spec import read_sweep


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["cifar100-20ep", "cifar100-20ep.yaml"])
def test_a_recipe_is_found_by_its_name(name):
    assert recipes.find(name) == recipes.FOLDER / "cifar100-20ep.yaml"
    config = parse(["compare", "--recipe", name, "--lr", "0.1"]).config
    assert (config.model, config.epochs, config.lr) == ("dsnet50_cifar", 20, 0.1)


def test_a_detection_recipe_is_found_by_its_name():
    assert parse(["detect", "train", "--recipe", "detect-bccd-cpu"]).config.detector == "fcos"


def test_a_file_goes_before_a_recipe_of_its_name_and_a_folder_does_not():
    Path("cifar100-cpu").mkdir()
    assert recipes.find("cifar100-cpu").parent == recipes.FOLDER
    Path("cifar100-20ep.yaml").write_text("epochs: 3\n")
    assert parse(["train", "--recipe", "cifar100-20ep.yaml"]).config.epochs == 3


@pytest.mark.parametrize("given", ["cifar100-20epochs", "recipes/cifar100-20ep.yaml", "elsewhere/cifar100-20ep"])
def test_an_unknown_name_is_one_sentence_with_those_that_exist(given, capsys):
    assert main(["train", "--recipe", given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dsnet: error: {given} is no file and no recipe (did you mean cifar100-20ep?): ")
    assert "ablation-cifar100, ablation-cpu, cifar10-200ep," in error and error.count("\n") == 1


def test_a_sweep_is_found_by_its_name_and_named_after_it(capsys):
    assert main(["sweep", "sweep-cpu", "--status"]) == 2
    assert "runs/sweep-cpu holds no sweep" in capsys.readouterr().err


def test_a_copied_sweep_finds_its_base_in_the_package_and_beside_itself_first():
    copied = Path(shutil.copy(recipes.FOLDER / "ablation-cifar100.yaml", "mine.yaml"))
    assert "\nbase: cifar100-20ep.yaml\n" in copied.read_text()
    assert {row.config.epochs for row in read_sweep(copied).rows} == {20}
    text = (recipes.FOLDER / "cifar100-20ep.yaml").read_text()
    Path("cifar100-20ep.yaml").write_text(text.replace("epochs: 20", "epochs: 5"))
    assert {row.config.epochs for row in read_sweep(copied).rows} == {5}


def test_package_data_holds_every_recipe():
    import tomllib

    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    held = {path for pattern in patterns["dense_shortcuts"] for path in (root / "dense_shortcuts").glob(pattern)}
    files = {path for path in recipes.FOLDER.iterdir() if path.suffix not in (".py", "") and path.is_file()}
    assert len(files) > 20 and files <= held


def make_script(folder: Path) -> Path:
    folder.mkdir(parents=True)
    script = folder / "dsnet"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


def test_a_command_has_the_path_of_dsnet_where_the_shell_would_not_find_it(tmp_path, monkeypatch):
    own = make_script(tmp_path / "my venv" / "bin")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(own.parent))
    for path in ("/nowhere", str(make_script(tmp_path / "other").parent)):
        monkeypatch.setenv("PATH", path)
        assert dsnet("compare", "--resume", Path("runs/a b")) == "'./my venv/bin/dsnet' compare --resume 'runs/a b'"
    monkeypatch.chdir(own.parent)
    assert dsnet("models") == "./dsnet models"
    monkeypatch.chdir(tmp_path / "other")
    assert dsnet("models") == f"'{own}' models"
    monkeypatch.setenv("PATH", str(own.parent))
    assert dsnet("models") == "dsnet models"
    own.unlink()
    assert dsnet("models").split()[1:] == ["-m", "dense_shortcuts.cli", "models"]
    assert dsnet("models").split()[0] == sys.executable
