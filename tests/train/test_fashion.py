"""The images of Fashion-MNIST that come with the package."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from train_helpers import load

from dense_shortcuts.experiments.train.data.fashion import read_sheet
from dense_shortcuts.shipped import FASHION

SCRIPT = Path(__file__).parents[2] / "scripts" / "embed_fashion.py"
SOURCE = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


def test_they_are_small_whole_and_balanced():
    data = load(data="fashion")
    for part in (data.train.images, data.test.images):
        assert part.pixels.shape == (4000, 28, 28, 3)
        assert np.bincount(part.labels).tolist() == [400] * 10
        assert len(np.unique(part.pixels.reshape(4000, -1), axis=0)) > 3990
    assert sum(path.stat().st_size for path in FASHION.iterdir()) < 4 * 10**6


def test_any_ten_in_a_row_have_all_classes():
    labels = load(data="fashion", limit_train=30).train.images.labels
    assert labels.reshape(3, 10).tolist() == [list(range(10))] * 3


@pytest.mark.parametrize(("part", "name"), [("train", "train"), ("t10k", "test")])
def test_they_are_those_of_the_original_files(part, name):
    if not SOURCE.is_dir():
        pytest.skip("needs the real data set Fashion-MNIST")
    script = runpy.run_path(str(SCRIPT))
    images = script["read_idx"](SOURCE / f"{part}-images-idx3-ubyte.gz")
    labels = script["read_idx"](SOURCE / f"{part}-labels-idx1-ubyte.gz")
    found = read_sheet(name)
    for label in range(10):
        first = images[labels == label][:400]
        assert np.array_equal(found.pixels[found.labels == label][..., 0], first)
