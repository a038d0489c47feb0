"""The network in the package: small, whole, described as it was trained, and scored on real images."""

import tomllib
from pathlib import Path

import torch
import yaml

from dense_shortcuts import recipes, shipped
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.checkpoint import CARD, WEIGHTS, read_model
from dense_shortcuts.experiments.train.config import read_yaml
from dense_shortcuts.experiments.train.loop import METRICS, read_metrics
from dense_shortcuts.experiments.train.run import checkpoint_folder
from dense_shortcuts.files import read_json

ROOT = Path(__file__).parents[1]


def test_the_network_is_small_and_is_built_from_its_card():
    assert (shipped.folder() / WEIGHTS).stat().st_size < 2_000_000
    model, card = read_model(shipped.folder())
    assert (card["model"], card["num_classes"], card["img_size"]) == ("dsnet20", 100, 32)
    output = model.eval()(torch.zeros(2, 3, 32, 32))
    assert output.shape == (2, 100) and output.isfinite().all()


def test_its_run_has_the_settings_of_its_recipe_but_its_length_and_no_path_of_a_machine():
    run = shipped.folder().parent
    recipe, config = read_yaml(recipes.find("shipped")), read_yaml(run / "config.yaml")
    given = yaml.safe_load(recipes.find("shipped").read_text())
    assert {key for key in given if getattr(recipe, key) != getattr(config, key)} <= {"epochs"}
    assert config.data_dir is None
    assert read_metrics(shipped.folder() / METRICS)[-1]["epoch"] == read_json(shipped.folder() / CARD)["epochs"]


def test_package_data_holds_its_files():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    held = {path for pattern in patterns["dense_shortcuts"] for path in (ROOT / "dense_shortcuts").glob(pattern)}
    files = {path for path in shipped.folder().parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files <= held


def test_eval_scores_it_by_its_name(cifar100, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--data-dir", str(cifar100), "--limit-test", "500"]
    assert main(["eval", "shipped", *settings]) == 0
    accuracy = float(capsys.readouterr().out.split("accuracy ")[1].split(" %")[0])
    said = read_metrics(shipped.folder() / METRICS)[-1]["test_top1"]
    assert abs(accuracy - said) < 8  # a sample of 500 images: three standard deviations are under 7 points


def test_a_file_of_that_name_goes_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.checkpoint(Path("shipped")) == checkpoint_folder(Path("shipped")) == shipped.folder()
    Path("shipped").mkdir()
    assert shipped.checkpoint(Path("shipped")) == Path("shipped")
