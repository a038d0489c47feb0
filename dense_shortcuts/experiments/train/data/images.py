"""What a source of images gives: pictures with labels, from memory or read when asked for."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ....errors import DenseShortcutError
from ..config import TrainConfig, class_numbers

# Whatever PIL raises for a file that is not an image, cut short, or made to overflow, and the system for a lost one.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class BrokenImage(DenseShortcutError):
    """An image that cannot be read; the sentence names it."""


class Images(Protocol):
    """Pictures with labels; an item is (RGB image, label)."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class Kept(Images, Protocol):
    """Images at hand, of which some can be taken."""

    def take(self, places: np.ndarray, labels: np.ndarray) -> "Kept":
        """Those at the places, with other labels."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Images held in memory as (N, H, W, 3) uint8, with labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def take(self, places: np.ndarray, labels: np.ndarray) -> "Arrays":
        return Arrays(self.pixels[places], labels)

    def head(self, limit: int | None) -> "Arrays":
        """The first `limit` images of an already shuffled set."""
        return self if limit is None else Arrays(self.pixels[:limit], self.labels[:limit])


@dataclass(frozen=True)
class Files:
    """Image files with labels, read when asked for."""

    samples: Sequence[tuple[str, int]]

    @property
    def labels(self) -> np.ndarray:
        return np.asarray([label for _, label in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return Image.open(path).convert("RGB"), label
        except IMAGE_ERRORS as error:
            raise BrokenImage(f"{path} is not a whole image ({first_line(error)}): replace or remove it.") from error

    def take(self, places: np.ndarray, labels: np.ndarray) -> "Files":
        return Files([(self.samples[i][0], label) for i, label in zip(places, labels.tolist(), strict=True)])


def decode(content: Any, where: str) -> Image.Image:
    """The RGB image in a file's bytes.

    Raises:
        BrokenImage: no bytes, or not those of a whole image; `where` names them.
    """
    if not isinstance(content, bytes):
        raise BrokenImage(f"{where} has no image bytes: replace or remove it.")
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except IMAGE_ERRORS as error:
        raise BrokenImage(f"{where} is not a whole image ({first_line(error)}): replace or remove it.") from error


def first_line(error: Exception) -> str:
    """An error's first line without PIL's memory addresses."""
    return str(error).split("\n")[0].split(" <_io")[0].rstrip(". ")


def sample(limit: int | None, length: int) -> np.ndarray:
    """Places of a fixed random sample, in order; all of them without a limit."""
    places = np.arange(length)
    return places if limit is None or limit >= length else np.sort(np.random.default_rng(0).permutation(length)[:limit])


def chosen_classes(config: TrainConfig, count: int) -> Sequence[int]:
    """The numbers, rising, of the classes that a configuration uses of so many.

    Raises:
        DenseShortcutError: there are no such classes.
    """
    numbers = range(count) if config.classes is None else class_numbers(config.classes)
    if numbers[-1] >= count:
        raise DenseShortcutError(
            f"--classes {config.classes!r} names class {numbers[-1]}: {config.data} has the classes 0 to {count - 1}."
        )
    return numbers


def of_classes(images: Kept, numbers: Sequence[int], limit: int | None) -> Kept:
    """A fixed random sample of the images of some classes (rising numbers), whose labels become their places in it."""
    labels = np.asarray(images.labels)
    places = np.flatnonzero(np.isin(labels, numbers))
    places = places[sample(limit, len(places))]
    return images.take(places, np.searchsorted(numbers, labels[places]))


def existing_folder(path: str | None, what: str) -> Path:
    """The folder of the data.

    Raises:
        DenseShortcutError: none is given, or it is not there.
    """
    if path is None:
        raise DenseShortcutError(f"{what} needs a folder: give --data-dir DIR.")
    if not Path(path).is_dir():
        raise DenseShortcutError(f"{path} is not a folder: give --data-dir the folder of the images.")
    return Path(path)


def class_list(path: Path) -> tuple[str, ...]:
    """The names in a file, one a line; none where there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Refuse labels outside the classes."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise label_error(wrong[0], classes, where)


def label_error(label: Any, classes: int, where: str) -> DenseShortcutError:
    return DenseShortcutError(f"{where} has the label {label}: with {classes} classes it is from 0 to {classes - 1}.")


def free_bytes() -> int:
    """Bytes of the main memory that are free."""
    import psutil

    return psutil.virtual_memory().available
