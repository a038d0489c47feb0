"""Tiny networks and images that the tests of explanations share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import small_run
from timm.models.resnet import BasicBlock

import dense_shortcuts as ds
from dense_shortcuts.models.cifar import cifar_resnet


@pytest.fixture
def tiny_host():
    """Makes a small residual network of two and three blocks, in evaluation mode, its norms no longer new."""

    def make(num_classes: int = 5, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(3)
        model = cifar_resnet(
            block=BasicBlock, layers=(2, 3, 3), channels=(8, 8, 16), num_classes=num_classes, zero_init_last=False
        )
        model(torch.randn(8, 3, 16, 16))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def tiny_dsnet(tiny_host):
    """Makes the same network plugged in, with shortcut weights that all matter."""

    def make(dtype: torch.dtype = torch.float32, num_classes: int = 5, **options) -> torch.nn.Module:
        model = ds.plug_in(tiny_host(num_classes, dtype), **options)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for _, parameter in ds.shortcut_parameters(model):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.5)
        return model

    return make


@pytest.fixture
def photo(tmp_path):
    """Makes an image file of noise and gives its path."""

    def make(name: str = "photo.png", width: int = 48, height: int = 32, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a DSNet-20 after two epochs on a few digits."""
    return small_run(tmp_path_factory.mktemp("explain")) / "stage-auto"
