"""Every recipe parses, asks for what its comment says, and trains at a tiny size on generated images."""

import re
from pathlib import Path

import pytest
import yaml
from test_data_sources import write_images
from timm.loss import BinaryCrossEntropy
from train_helpers import png

from dense_shortcuts import recipes
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.config import read_yaml
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.loop import read_metrics
from dense_shortcuts.experiments.train.network import build_network, make_loss, make_optimizer, network_label
from dense_shortcuts.models import list_models

RECIPES = [
    path
    for path in sorted(recipes.FOLDER.glob("*.yaml"))
    if "model" in (settings := yaml.safe_load(path.read_text())) and "detector" not in settings
]
TINY = [
    *("--limit-train=4", "--limit-test=4", "--batch-size=4", "--epochs=1", "--warmup-epochs=0"),
    *("--img-size=32", "--test-size=40", "--workers=0", "--model=dsnet20"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Generated images in the layout of each set, a folder for each."""
    folder = tmp_path_factory.mktemp("sets")
    for part in ("train", "test"):
        images, labels = [png(i, 32) for i in range(4)], [0, 1, 1, 0]
        for name, label in (("cifar10", "label"), ("cifar100", "fine_label")):
            write_images(folder / name, part, images, labels, image="img", label=label)
        for name in ("imagefolder", "tiny-imagenet"):
            for label in ("ants", "bees"):
                (folder / name / part / label).mkdir(parents=True)
                for i in range(2):
                    (folder / name / part / label / f"{i}.png").write_bytes(png(i, 64))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_at_a_tiny_size(path, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = read_yaml(path)
    command = ["train", "--recipe", str(path), "--data-dir", str(folders / config.data), *TINY]
    assert main([*command, "--name", "a"]) == 0, capsys.readouterr().err
    kept = read_yaml(Path("runs/a/config.yaml"))
    unchanged = (
        set(yaml.safe_load(path.read_text())) - {"name"} - {flag[2:].split("=")[0].replace("-", "_") for flag in TINY}
    )
    assert {key: getattr(kept, key) for key in unchanged} == {key: getattr(config, key) for key in unchanged}
    assert len(read_metrics(Path("runs/a") / network_label(config) / "metrics.jsonl")) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run_and_names_a_registered_network(path):
    assert re.search(
        rf"^#   dsnet (compare|train) --recipe {path.stem} --data-dir DIR$", path.read_text(), re.MULTILINE
    )
    assert read_yaml(path).model in list_models()


def test_the_a3_recipe_is_what_the_paper_has(folders):
    import dataclasses

    config = read_yaml(recipes.find("imagenet-a3"))
    model = build_network(dataclasses.replace(config, model="dsnet26"), 10)
    optimizer = make_optimizer(config, model)
    assert type(optimizer).__name__ == "Lamb" and {g["weight_decay"] for g in optimizer.param_groups} == {0.02, 0.0}
    loss, mix = make_loss(config, 10)
    assert isinstance(loss, BinaryCrossEntropy) and (loss.smoothing, loss.target_threshold) == (0.0, 0.2)
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.label_smoothing) == (0.1, 1.0, 0.0)
    data = load_data(dataclasses.replace(config, data_dir=str(folders / "imagefolder")).resolved())
    assert data.train[(0, 0)][0].shape == (3, 160, 160) and data.test[(0, 0)][0].shape == (3, 224, 224)
    assert read_yaml(recipes.find("imagenet-a2")).aug_repeats == 3
