"""Real images for verification, calibration and accuracy: those of the run if they are available."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..experiments.train.data import TransformedImages
from ..experiments.train.run import data_of

PROOF = 5


@dataclass(frozen=True)
class RunImages:
    """A run's images, with the transform of its tests.

    Attributes:
        test: the test images.
        calibration: the training images, without augmentation; the test images if training images are streamed.
    """

    test: TransformedImages
    calibration: TransformedImages


def run_images(folder: Path, card: dict[str, Any], given: dict[str, Any]) -> RunImages:
    """The images of the run that a network's folder is part of.

    Args:
        given: data, data_dir, limit_test; None means the run's own.

    Raises:
        DenseShortcutError: the images are missing, or have other classes.
    """
    config, data = data_of(folder, card, training=True, loader="workers", **given)
    test, train = data.test, data.train
    assert isinstance(test, TransformedImages)  # the type with loader="workers"
    if not isinstance(train, TransformedImages):  # a stream, without random access
        return RunImages(test, test)
    unchanged = TransformedImages(train.images, test.transform, config.seed, train.broken, training=False)
    return RunImages(test, unchanged)


def stack(images: TransformedImages, count: int) -> Tensor:
    """The first `count` images, or all if there are fewer, (N, 3, S, S)."""
    return torch.stack([images[0, place][0] for place in range(min(count, len(images)))])


def batches(images: TransformedImages, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images, labels) of `size` images, in order."""
    places = iter(range(len(images) if limit is None else min(limit, len(images))))
    while chunk := list(islice(places, size)):
        items = [images[0, place] for place in chunk]
        yield torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def photographs(card: dict[str, Any]) -> Tensor:
    """Five crops of scikit-learn's two photographs, preprocessed as in the network's card, (5, 3, S, S)."""
    from sklearn.datasets import load_sample_images

    first, second = load_sample_images().images
    crops = [np.ascontiguousarray(p[y : y + 400, x : x + 400]) for p in (first, second) for x, y in ((0, 0), (200, 20))]
    crops.append(np.ascontiguousarray(first[14:414, 100:500]))
    size = (card["img_size"],) * 2
    pixels = [np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC)) for crop in crops]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(card[name])[:, None, None] for name in ("mean", "std"))
    return ((images - mean) / std).contiguous()
