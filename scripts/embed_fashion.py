"""Makes the images of Fashion-MNIST that come with the package (`--data fashion`) from its four original files.

    python scripts/embed_fashion.py FOLDER

FOLDER holds train-images-idx3-ubyte.gz and so on, as Debian's package dataset-fashion-mnist does in
/usr/share/datasets/fashion-mnist. Of each class the first 400 training and the first 400 test images are taken, in the
order of the files, which is random. They are laid out as sheets that can be looked at: image i of a class is in row
i // 8 of the sheet, and its class is the column modulo 10.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dense_shortcuts.experiments.train.data.fashion import CLASSES, SIDE
from dense_shortcuts.shipped import FASHION

PER_CLASS, COLUMNS = 400, 80


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes: two zeros, the type, the number of axes, their lengths, the data."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def sheet(folder: Path, part: str) -> np.ndarray:
    """The chosen images of a part ("train" or "t10k") as one grey picture, (1400, 2240)."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    chosen = np.stack([np.flatnonzero(labels == label)[:PER_CLASS] for label in range(len(CLASSES))], axis=1).ravel()
    rows = len(chosen) // COLUMNS
    return images[chosen].reshape(rows, COLUMNS, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, COLUMNS * SIDE)


if __name__ == "__main__":
    for part, name in (("train", "train.png"), ("t10k", "test.png")):
        Image.fromarray(sheet(Path(sys.argv[1]), part)).save(FASHION / name, optimize=True)
