"""Tiny runs on real digits, and small folders of generated images, that the training tests share."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from rich.console import Console
from train_helpers import png, write_parquet

from dense_shortcuts.experiments.train.checkpoint import write_text
from dense_shortcuts.experiments.train.config import TrainConfig, write_yaml
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.display import Display
from dense_shortcuts.experiments.train.loop import METRICS, read_metrics, train_network
from dense_shortcuts.experiments.train.network import network_label


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and device for the whole process; tests differ in them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny():
    """Makes a configuration of a second or so: 96 digits of 8x8, two epochs of three steps."""

    def make(**changes) -> TrainConfig:
        settings = {
            "model": "dsnet20",
            "img_size": 8,
            "crop_padding": 1,
            "limit_train": 96,
            "limit_test": 50,
            "batch_size": 32,
            "epochs": 2,
            "warmup_epochs": 0,
            "lr": 0.05,
        }
        return TrainConfig(**settings | changes)

    return make


@pytest.fixture(scope="session")
def fit():
    """Trains one network in a folder and gives its metrics."""

    def run(config: TrainConfig, folder: Path) -> list[dict]:
        AcceleratorState._reset_state(reset_partial_state=True)
        folder.mkdir(parents=True, exist_ok=True)
        config = config.resolved()
        display = Display([network_label(config)], config.epochs, Console(quiet=True))
        train_network(config, load_data(config), folder, display)
        return read_metrics(folder / METRICS)

    return run


@pytest.fixture
def parquet_folder(tmp_path) -> Path:
    """Twelve training and six test images."""
    folder = tmp_path / "cifar"
    write_parquet(folder, "train", [png(i) for i in range(12)], [i % 3 for i in range(12)])
    write_parquet(folder, "test", [png(100 + i) for i in range(6)], [i % 3 for i in range(6)])
    return folder


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Two classes with eight training and three validation images each."""
    folder = tmp_path / "images"
    for part, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("ants", "bees")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                (folder / part / name / f"{i}.png").write_bytes(png(1000 * label + i, size=20))
    return folder


@pytest.fixture
def trained(tiny, fit, tmp_path, monkeypatch) -> Path:
    """The folder of a trained network in a run's folder, runs/a/stage-group of the working folder."""
    monkeypatch.chdir(tmp_path)
    config, folder = tiny(norm="group"), tmp_path / "runs" / "a" / "stage-group"
    fit(config, folder)
    write_text(folder.parent / "config.yaml", write_yaml(config.resolved()))
    return folder
