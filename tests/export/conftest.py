"""Checkpoints on real digits."""

from pathlib import Path

import pytest
import tiny_network  # noqa: F401 (registers it)
from hosts import randomise, randomise_parameters

import dense_shortcuts as ds
from dense_shortcuts.experiments.train.checkpoint import write_model
from dense_shortcuts.experiments.train.config import TrainConfig, write_yaml
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.network import build_network
from dense_shortcuts.files import write_text


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a run's folder with one network whose numbers are random, and gives the network's folder."""

    def make(model: str = "tiny_resnet", name: str = "net", **changes) -> Path:
        config = TrainConfig(
            data="digits", model=model, img_size=8, limit_train=32, limit_test=20, **changes
        ).resolved()
        net = build_network(config, 10)
        randomise(net, seed=1)
        if ds.dense_stages(net):
            randomise_parameters(ds.shortcut_parameters(net), seed=2)
        folder = tmp_path / "runs" / "a" / name
        folder.mkdir(parents=True)
        write_text(folder.parent / "config.yaml", write_yaml(config))
        write_model(folder, config, load_data(config), net.float().state_dict())
        return folder

    return make
