"""The part of Fashion-MNIST (Xiao et al., 2017) that comes with the package, which needs no download."""

import numpy as np
from PIL import Image

from ....shipped import FASHION
from ..config import TrainConfig
from .images import Arrays

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28


def load_fashion(config: TrainConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """4,000 training and 4,000 test images of 28x28 pixels in ten classes, as many of each in every ten images."""
    return read_sheet("train").head(config.limit_train), read_sheet("test").head(config.limit_test), CLASSES


def read_sheet(part: str) -> Arrays:
    """The images of a sheet row by row; their classes go round (scripts/embed_fashion.py)."""
    with Image.open(FASHION / f"{part}.png") as opened:
        sheet = np.asarray(opened)
    rows, columns = (length // SIDE for length in sheet.shape)
    images = sheet.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 1)
    return Arrays(images.repeat(3, axis=3), np.arange(len(images)) % len(CLASSES))
