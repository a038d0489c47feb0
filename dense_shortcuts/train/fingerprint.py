"""A short text that two data sets share only if their images do, for the run's folder."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .data import Data

SAMPLE = 32  # files or images read whole, evenly spread over the set


def fingerprints(data: Data) -> dict[str, str]:
    """Of the training and the test images, before augmentation, and of the names of the classes."""
    names = digest([repr(data.classes).encode()])
    return {"train": fingerprint(data.train.images), "test": fingerprint(data.test.images), "classes": names}


def fingerprint(images: Any) -> str:
    """Of one set: all its bytes where they are in memory; else its length, its labels and, for files, their names and
    sizes, with a sample of the images themselves."""
    if isinstance(pixels := getattr(images, "pixels", None), np.ndarray):
        return digest([repr(pixels.shape).encode(), np.ascontiguousarray(pixels).data, labels_of(images)])
    parts: list[Any] = [str(len(images)).encode(), labels_of(images)]
    if (samples := getattr(images, "samples", None)) is not None:
        paths = [Path(path) for path, _ in samples]
        parts += ["/".join((*path.parts[-2:], str(path.stat().st_size))).encode() for path in paths]
        parts += [paths[place].read_bytes() for place in spread(len(paths))]
    else:
        parts += [np.asarray(images[place][0]).tobytes() for place in spread(len(images))]
    return digest(parts)


def labels_of(images: Any) -> bytes:
    return np.asarray(images.labels, dtype=np.int64).tobytes()


def spread(length: int) -> list[int]:
    """Up to SAMPLE places from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, length - 1, SAMPLE)})


def digest(parts: Iterable[Any]) -> str:
    """Of the parts in their order, each with its length."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()
