"""WebDataset shards: tar files with an image (jpg, png, webp) and its label (cls) for each key."""

import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....errors import DenseShortcutError
from ....extras import need
from ..config import TrainConfig
from .broken import BrokenImages
from .images import BrokenImage, check_labels, class_list, decode, existing_folder, sample
from .parquet import PARTS, numbered, part_files
from .stream import Place, Sample

PICTURES = ("jpg", "jpeg", "png", "webp")
INDEX = "_info.json"
END = 1024  # bytes of zeros that end a tar file


@dataclass(frozen=True)
class ShardStream:
    """Training images, read by `webdataset` from each reader's own shards."""

    paths: Sequence[Path]
    buffer: int

    def readers(self, processes: int) -> int:
        return len(self.paths) // processes

    def samples(self, place: Place, broken: BrokenImages) -> Iterator[Sample]:
        import webdataset as wds

        paths = np.random.default_rng(place.seed).permutation([str(path) for path in self.paths]).tolist()
        own = paths[place.process :: place.processes][place.worker :: place.workers]
        order = random.Random(f"{place.seed} {place.process} {place.worker}")
        shuffled = wds.shuffle(self.buffer, initial=self.buffer, rng=order)
        for each in shuffled(entries(own, broken)):
            where = f"{each['__key__']} in {each['__url__']}"
            picture = next((each[kind] for kind in PICTURES if kind in each), None)
            try:
                yield picture, label_in(each.get("cls"), where), where
            except BrokenImage as error:
                broken.add(error)


def entries(paths: Sequence[str], broken: BrokenImages) -> Iterator[dict[str, Any]]:
    """The entries of some shards, one after the other; what follows a broken place in a shard is left out."""
    from webdataset.tariterators import tarfile_samples

    for path in paths:
        try:
            yield from tarfile_samples(iter([{"url": path}]))
        except (tarfile.TarError, OSError, EOFError, ValueError):
            broken.add(BrokenImage(f"{path} is not a whole tar file: what follows in it is left out."))


@dataclass(frozen=True)
class ShardImages:
    """Test images, read from their place in a shard when asked for."""

    entries: Sequence[tuple[str, int, int, str]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, start, size, where = self.entries[index]
        try:
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise BrokenImage(f"{where} cannot be read ({error.strerror}): restore it.") from error
        return decode(content, where), int(self.labels[index])


def load_shards(config: TrainConfig) -> tuple[ShardStream, int, ShardImages, tuple[str, ...]]:
    """The training stream, the images of its epoch, the test images and the classes.

    Raises:
        DenseShortcutError: no `webdataset` library, no shards, an epoch without a length, no classes.
    """
    need("--data webdataset", "data", "webdataset")
    folder = existing_folder(config.data_dir, "--data webdataset")
    files = {part: part_files(folder, config, part, ".tar") for part in PARTS}
    for path in files["train"]:
        check_end(path)
    length = config.train_images or indexed_length(folder / INDEX)
    if not length:
        raise DenseShortcutError(f"{folder} has no {INDEX} with the number of images: give --train-images.")
    test = read_index(files["test"], config.limit_test)
    classes = class_list(folder / "classes.txt") or numbered(config.num_classes or 0)
    if not classes:
        raise DenseShortcutError(f"{folder} has no classes.txt with a name a line: put it there or give --num-classes.")
    check_labels(test.labels, len(classes), str(files["test"][0].parent))
    return ShardStream(files["train"], config.shuffle_buffer), min(length, config.limit_train or length), test, classes


def check_end(path: Path) -> None:
    """Refuse a shard that lacks the two empty blocks at its end: a reader takes one cut short for a smaller one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END))
        if file.read() != bytes(END):
            raise DenseShortcutError(f"{path} is not a whole tar file: fetch it again.")


def indexed_length(path: Path) -> int | None:
    """Training images by the index of a folder, {"splits": {"train": {"num_samples": 1281167}}} as timm's sets have it.

    Raises:
        DenseShortcutError: an index of another form.
    """
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["splits"]["train"]["num_samples"])
    except (ValueError, KeyError, TypeError) as error:
        raise DenseShortcutError(
            f"{path} does not hold splits, train, num_samples: mend it or give --train-images."
        ) from error


def read_index(paths: Sequence[Path], limit: int | None) -> ShardImages:
    """Where each image of some shards is, without reading it.

    Raises:
        DenseShortcutError: a broken shard, or a key without label or image.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    key, _, kind = member.name.rpartition("/")[2].partition(".")
                    key = f"{member.name.rpartition('/')[0]}/{key}".lstrip("/")
                    entry = found.setdefault((str(path), key), {})
                    if kind.lower() in PICTURES:
                        entry["image"] = (str(path), member.offset_data, member.size, f"{key} in {path}")
                    elif kind.lower() == "cls":
                        file = archive.extractfile(member)
                        entry["label"] = label_in(file.read() if file is not None else None, f"{key} in {path}")
        except (tarfile.TarError, OSError) as error:
            raise DenseShortcutError(f"{path} is not a whole tar file ({error}): fetch it again.") from error
    whole = [entry for entry in found.values() if "image" in entry and "label" in entry]
    if not whole:
        raise DenseShortcutError(f"{paths[0]} has no image with a label: a shard holds KEY.jpg and KEY.cls for each.")
    whole = [whole[i] for i in sample(limit, len(whole))]
    return ShardImages([entry["image"] for entry in whole], np.asarray([entry["label"] for entry in whole]))


def label_in(content: bytes | None, where: str) -> int:
    """The label in a cls entry.

    Raises:
        BrokenImage: none, or not a number.
    """
    try:
        return int(content or b"")
    except ValueError as error:
        raise BrokenImage(f"{where} has no whole number in its cls entry: mend or remove it.") from error
