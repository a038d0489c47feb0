"""A short text that two data sets share only if their images do, for the run's folder."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .data import BrokenImage, Data, Stream

SAMPLE = 32  # files or images read whole, evenly spread over the set


def fingerprints(data: Data) -> dict[str, str]:
    """Of the training and the test images before augmentation, and of the names of the classes."""
    train = stream_fingerprint(data.train) if isinstance(data.train, Stream) else fingerprint(data.train.images)
    names = digest([repr(data.classes).encode()])
    return {"train": train, "test": fingerprint(data.test.images), "classes": names}


def fingerprint(images: Any) -> str:
    """Of one set: all its bytes where they are in memory as arrays; else its labels, for files their names and sizes,
    and a sample of the images themselves."""
    labels = np.asarray(images.labels, dtype=np.int64).tobytes()
    if isinstance(pixels := getattr(images, "pixels", None), np.ndarray):
        return digest([repr(pixels.shape).encode(), labels, np.ascontiguousarray(pixels).tobytes()])
    samples = getattr(images, "samples", None)
    names = [] if samples is None else [described(Path(path)) for path, *_ in samples]
    return digest([labels, *names, *(pixels_at(images, place) for place in spread(len(images)))])


def stream_fingerprint(stream: Stream) -> str:
    """Of a stream, which cannot be read beforehand: its length, and names and sizes of its files where it has them."""
    paths = getattr(stream.source, "paths", ())
    return digest([repr((len(stream), stream.classes)).encode(), *(described(Path(path)) for path in paths)])


def file_fingerprint(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def described(path: Path) -> bytes:
    """A file's name, its folder's and its size."""
    return "/".join((*path.parts[-2:], str(path.stat().st_size))).encode()


def pixels_at(images: Any, place: int) -> bytes:
    try:
        return np.asarray(images[place][0]).tobytes()
    except BrokenImage:
        return b"broken"


def spread(length: int) -> list[int]:
    """Up to SAMPLE places from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, length - 1, SAMPLE)})


def digest(parts: Iterable[bytes]) -> str:
    """Of the parts in their order, each with its length."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
