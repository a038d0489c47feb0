"""Parquet files with encoded images, as the Hugging Face hub keeps image sets."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ....errors import DenseShortcutError
from ....extras import need
from ..config import TrainConfig
from .images import check_labels, decode, existing_folder, first_line, free_bytes, sample

if TYPE_CHECKING:
    import pyarrow as pa

PARTS = {"train": ("train",), "test": ("validation", "valid", "val", "test")}


@dataclass(frozen=True)
class Encoded:
    """Images as the bytes of their files, in memory; decoded when asked for."""

    content: "pa.ChunkedArray"
    labels: np.ndarray
    origins: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode(self.content[index].as_py(), self.origins[index]), int(self.labels[index])

    def sample(self, limit: int | None) -> "Encoded":
        """A fixed random sample of so many images."""
        places = sample(limit, len(self))
        return self if len(places) == len(self) else self.take(places, self.labels[places])

    def take(self, places: np.ndarray, labels: np.ndarray) -> "Encoded":
        return Encoded(self.content.take(places), labels, [self.origins[i] for i in places])


@dataclass(frozen=True)
class Columns:
    """Names of the columns with images and labels; `classes` is empty where the file does not name them."""

    image: str
    label: str
    classes: tuple[str, ...]


def load_parquet(config: TrainConfig) -> tuple[Encoded, Encoded, tuple[str, ...]]:
    """All images of a folder's parquet files, still encoded, in memory.

    Raises:
        DenseShortcutError: missing, broken or too large files, no such columns, labels outside the classes.
    """
    folder = existing_folder(config.data_dir, "--data parquet")
    files = {part: part_files(folder, config, part, ".parquet") for part in PARTS}
    size, free = sum(path.stat().st_size for paths in files.values() for path in paths), free_bytes()
    if size > free / 2:
        raise DenseShortcutError(
            f"the parquet files in {folder} have {size / 2**30:.1f} GiB, over half of the free memory: "
            "take --data streaming."
        )
    columns = find_columns(schema(files["train"][0]), str(files["train"][0]), config)
    train, test = (read_encoded(paths, columns) for paths in files.values())
    classes = columns.classes or numbered(int(max(train.labels.max(), test.labels.max())) + 1)
    for images, paths in ((train, files["train"]), (test, files["test"])):
        check_labels(images.labels, len(classes), str(paths[0].parent))
    return train.sample(config.limit_train), test.sample(config.limit_test), classes


def numbered(count: int) -> tuple[str, ...]:
    """Classes named by their numbers."""
    return tuple(str(i) for i in range(count))


def part_files(folder: Path, config: TrainConfig, part: str, suffix: str) -> list[Path]:
    """The files of the training or test part.

    Raises:
        DenseShortcutError: there are none.
    """
    pattern = config.train_files if part == "train" else config.test_files
    found = parts_of(folder, pattern, part, suffix)
    if not found:
        wanted = pattern or f"{' or '.join(f'{name}*{suffix}' for name in PARTS[part])}"
        raise DenseShortcutError(f"{folder} has no {wanted}: give --{part}-files a pattern of the {part} files.")
    return found


def parts_of(folder: Path, pattern: str | None, part: str, suffix: str) -> list[Path]:
    """The files that a pattern with braces or wildcards names, else those with the part's name in theirs."""
    if pattern is not None:
        return [path for name in braces(pattern) for path in sorted(folder.glob(name))]
    files = sorted(path for place in (folder, folder / "data") for path in place.glob(f"*{suffix}"))
    for name in PARTS[part]:
        inside = sorted((folder / name).glob(f"*{suffix}"))
        if found := [path for path in files if re.search(rf"(^|[-_.]){name}([-_.]|\d)", path.name)] or inside:
            return found
    return []


def braces(pattern: str) -> list[str]:
    """The names that a pattern such as train-{000..146}.tar stands for.

    Raises:
        DenseShortcutError: a brace without the library that expands it, or one that is never closed.
    """
    if "{" not in pattern:
        return [pattern]
    need("a pattern with braces", "data", "braceexpand")
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DenseShortcutError(f"the pattern {pattern!r} has a brace without its partner: close it.") from error


def schema(path: Path) -> "pa.Schema":
    """The columns of a file.

    Raises:
        DenseShortcutError: not a whole parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DenseShortcutError(
            f"{path} is not a whole parquet file ({first_line(error)}): fetch it again."
        ) from error


def find_columns(columns: "pa.Schema", where: str, config: TrainConfig) -> Columns:
    """The columns with images and labels: those of the flags, else the only ones of their kind.

    Raises:
        DenseShortcutError: no such column, or several labels to choose from.
    """
    import pyarrow.types as kinds

    about = json.loads((columns.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    pictures = [field.name for field in columns if is_image(field.type)]
    numbers = [field.name for field in columns if kinds.is_integer(field.type)]
    labelled = [name for name in numbers if about.get(name, {}).get("_type") == "ClassLabel"] or numbers
    labelled = ["label"] if "label" in labelled else labelled
    image = one_of(config.image_column, pictures, "image", where, columns.names)
    label = one_of(config.label_column, labelled, "label", where, columns.names)
    return Columns(image, label, tuple(about.get(label, {}).get("names") or ()))


def is_image(kind: "pa.DataType") -> bool:
    import pyarrow.types as kinds

    return kinds.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]


def one_of(given: str | None, found: Sequence[str], what: str, where: str, names: Sequence[str]) -> str:
    """The column that is given, else the only one that was found."""
    if given is not None and given in names:
        return given
    if given is None and len(found) == 1:
        return found[0]
    problem = f"no column {given}" if given else (f"several {what} columns" if found else f"no {what} column")
    raise DenseShortcutError(f"{where} has {problem}: give --{what}-column one of {', '.join(found or names)}.")


def read_encoded(paths: Sequence[Path], columns: Columns) -> Encoded:
    """The images of some files, not decoded yet."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = [read_columns(path, (columns.image, columns.label), "files with the same columns") for path in paths]
    origins = [f"row {row} of {path}" for path, table in zip(paths, tables, strict=True) for row in range(len(table))]
    table = pa.concat_tables(tables)
    if not len(table):
        raise DenseShortcutError(f"{paths[0].parent} has parquet files without a row: there is nothing to train on.")
    if table[columns.label].null_count:
        raise DenseShortcutError(f"{paths[0].parent} has images without a label in {columns.label}: leave them out.")
    content = pc.struct_field(table[columns.image], "bytes")
    return Encoded(content, table[columns.label].to_numpy().astype(np.int64), origins)


def read_columns(path: Path, wanted: Sequence[str], layout: str) -> Any:
    """A file's table with these columns.

    Raises:
        DenseShortcutError: a broken file or a missing column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = schema(path).names
    missing = [column for column in wanted if column not in names]
    if missing:
        raise DenseShortcutError(
            f"{path} has no column {' and no column '.join(missing)} (it has {', '.join(names)}): use {layout}."
        )
    try:
        return pq.read_table(path, columns=list(wanted))
    except (pa.ArrowException, OSError) as error:
        raise DenseShortcutError(
            f"{path} is not a whole parquet file ({first_line(error)}): fetch it again."
        ) from error
