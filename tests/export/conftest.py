"""A tiny network, registered with timm as the commands need it, and its checkpoint on real digits."""

from pathlib import Path

import pytest
import timm
import torch
from hosts import randomise, randomise_parameters
from timm.models.resnet import BasicBlock

import dense_shortcuts as ds
from dense_shortcuts.models.cifar import cifar_resnet
from dense_shortcuts.train.checkpoint import write_model, write_text
from dense_shortcuts.train.config import TrainConfig, write_yaml
from dense_shortcuts.train.data import load_data
from dense_shortcuts.train.network import build_network


@timm.models.register_model
def export_tiny(pretrained: bool = False, **kwargs) -> torch.nn.Module:
    """A residual network of four blocks in three stages."""
    settings = {"block": BasicBlock, "layers": (1, 2, 1), "channels": (8, 8, 16)} | kwargs
    return cifar_resnet(**{k: v for k, v in settings.items() if not k.startswith(("pretrained", "cache"))})


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a run's folder with one network whose numbers are random, and gives the network's folder."""

    def make(model: str = "export_tiny", name: str = "net", **changes) -> Path:
        config = TrainConfig(model=model, img_size=8, limit_train=32, limit_test=20, **changes).resolved()
        net = build_network(config, 10)
        randomise(net, seed=1)
        if ds.dense_stages(net):
            randomise_parameters(ds.shortcut_parameters(net), seed=2)
        folder = tmp_path / "runs" / "a" / name
        folder.mkdir(parents=True)
        write_text(folder.parent / "config.yaml", write_yaml(config))
        write_model(folder, config, load_data(config), net.float())
        return folder

    return make
