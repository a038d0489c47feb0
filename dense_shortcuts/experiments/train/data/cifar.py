"""CIFAR-10 and CIFAR-100: parquet files as on the Hugging Face hub, else torchvision's download."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import DenseShortcutError
from ..config import TrainConfig
from .images import Arrays, chosen_classes, decode, existing_folder
from .parquet import read_columns


@dataclass(frozen=True)
class Layout:
    """What tells the two sets apart."""

    title: str
    hub: str
    label: str
    classes: int
    names: tuple[str, ...]


LAYOUTS = {
    "cifar10": Layout(
        "CIFAR-10",
        "uoft-cs/cifar10",
        "label",
        10,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Layout("CIFAR-100", "uoft-cs/cifar100", "fine_label", 100, tuple(str(i) for i in range(100))),
}


def load_cifar(config: TrainConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """A folder of parquet files, else torchvision's copy, which it downloads there and checks.

    Raises:
        DenseShortcutError: no folder, a missing or broken file, a failed download.
    """
    layout = LAYOUTS[config.data]
    if config.data_dir is None:
        raise DenseShortcutError(
            f"{layout.title} needs a folder: give --data-dir DIR, with the parquet files or for the download."
        )
    folder = existing_folder(config.data_dir, layout.title)
    files = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test")}
    if not any(files.values()):
        return download(folder, config, layout)
    for part, found in files.items():
        if not found:
            raise DenseShortcutError(f"{folder} has no {part}-*.parquet: put the {part} images beside the others.")
    wanted = frozenset(chosen_classes(config, layout.classes))
    train = read_cifar(files["train"], config.limit_train, layout, wanted)
    test = read_cifar(files["test"], config.limit_test, layout, wanted)
    return train, test, class_names(folder / "classes.txt", layout)


def class_names(path: Path, layout: Layout) -> tuple[str, ...]:
    """The names in a file, one a line, else the usual ones of CIFAR-10 and the numbers for CIFAR-100."""
    names = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return tuple(names) if len(names) == layout.classes else layout.names


def download(folder: Path, config: TrainConfig, layout: Layout) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """torchvision's copy in `folder`; it unpickles nothing whose checksum is not that of the original files."""
    from torchvision.datasets import CIFAR10, CIFAR100

    source = CIFAR10 if config.data == "cifar10" else CIFAR100
    try:
        train, test = source(str(folder), train=True, download=True), source(str(folder), train=False)
    except (OSError, RuntimeError) as error:  # no network, no space, or a file with another checksum
        raise DenseShortcutError(
            f"{folder} has no train-*.parquet and test-*.parquet and the download of {layout.title} failed ({error}): "
            "give --data-dir a folder with these files, or connect to a network."
        ) from error
    # The order is the files' own, which is already mixed.
    parts = [Arrays(part.data, np.asarray(part.targets)) for part in (train, test)]
    return parts[0].head(config.limit_train), parts[1].head(config.limit_test), tuple(train.classes)


def read_cifar(paths: Sequence[Path], limit: int | None, layout: Layout, wanted: Container[int]) -> Arrays:
    """The first `limit` images of the wanted classes in parquet files with the columns of the Hugging Face hub's copy.

    A broken image is refused here and not replaced, for every copy of the set has the same ones.

    Raises:
        DenseShortcutError: a broken file, a missing column, an image that is cut short or of another size, a label
            outside the classes; the file and row are named.
    """
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        known = f"the layout of {layout.hub}, img{{bytes, path}} and {layout.label}"
        table = read_columns(path, ("img", layout.label), known)
        for row, (img, label) in enumerate(zip(table["img"], table[layout.label], strict=True)):
            if len(labels) == limit:
                break
            where = f"row {row} of {path}"
            number = checked_label(label.as_py(), where, layout)
            if number in wanted:
                pixels.append(one_size(img.as_py(), where, pixels[0].shape if pixels else None))
                labels.append(number)
    if not labels:
        raise DenseShortcutError(
            f"{paths[0].parent} has parquet files without a row of the wanted classes: there is nothing to train on."
        )
    return Arrays(np.stack(pixels), np.asarray(labels))


def one_size(img: Any, where: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """The (H, W, 3) pixels of an encoded image, refused unless they have `shape`."""
    if not isinstance(img, dict):
        raise DenseShortcutError(f"{where} has no image bytes: column img must hold {{bytes, path}}.")
    pixels = np.asarray(decode(img.get("bytes"), where))
    if shape is not None and pixels.shape != shape:
        raise DenseShortcutError(f"{where} is {pixels.shape[1]}x{pixels.shape[0]}: all images must be of one size.")
    return pixels


def checked_label(label: Any, where: str, layout: Layout) -> int:
    if not isinstance(label, int) or not 0 <= label < layout.classes:
        raise DenseShortcutError(
            f"{where} has the label {label}: {layout.title}'s {layout.label} is from 0 to {layout.classes - 1}."
        )
    return label
