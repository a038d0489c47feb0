"""Image sets of the Hugging Face hub, or of its parquet layout in a folder, streamed by the `datasets` library."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ....errors import DenseShortcutError
from ....extras import need
from ..config import TrainConfig
from .broken import BrokenImages
from .images import check_labels, decode, existing_folder, first_line, sample
from .parquet import PARTS, Columns, find_columns, numbered, part_files, read_columns, schema
from .stream import Place, Sample

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class HubStream:
    """Training images, read by `datasets`, which shares its files among processes and workers."""

    data: "IterableDataset"
    columns: Columns
    buffer: int

    def readers(self, processes: int) -> int:
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self.data, 0, processes).num_shards

    def samples(self, place: Place, broken: BrokenImages) -> Iterator[Sample]:
        from datasets.distributed import split_dataset_by_node

        # The same order of files in every process. One file at a time, for the library's threads sleep where they end.
        own = self.data.shuffle(seed=place.seed, buffer_size=self.buffer, max_buffer_input_shards=1)
        for row, found in enumerate(split_dataset_by_node(own, place.process, place.processes)):
            image = found[self.columns.image]
            yield image["bytes"], found[self.columns.label], image["path"] or f"image {row} of a stream"


@dataclass(frozen=True)
class HubImages:
    """Test images in the library's own cache on the disk, read when asked for."""

    data: "Dataset"
    columns: Columns
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.data[index][self.columns.image]
        return decode(image["bytes"], image["path"] or f"test image {index}"), int(self.labels[index])


def load_stream(config: TrainConfig) -> tuple[HubStream, int, HubImages, tuple[str, ...]]:
    """The training stream, the images of its epoch, the test images and the classes.

    Raises:
        DenseShortcutError: no `datasets` library, no such files or data set, no such columns, a length that nobody
            knows.
    """
    need("--data streaming", "data", "datasets")
    import datasets

    datasets.disable_progress_bars()
    if config.hub is not None:
        train = opened(config.hub, split=split_of(config.hub, "train"), streaming=True)
        test = opened(config.hub, split=split_of(config.hub, "test"))
        columns = find_columns(train.features.arrow_schema, config.hub, config)
        known = (train.info.splits or {}).get("train")
        length = config.train_images or (known.num_examples if known is not None else 0)
    else:
        folder = existing_folder(config.data_dir, "--data streaming")
        files = {part: part_files(folder, config, part, ".parquet") for part in PARTS}
        columns = find_columns(schema(files["train"][0]), str(files["train"][0]), config)
        texts = {part: [str(path) for path in paths] for part, paths in files.items()}
        train = opened("parquet", data_files=texts["train"], split="train", streaming=True)
        test = opened("parquet", data_files=texts["test"], split="train")
        length = config.train_images or sum(rows(path) for path in files["train"])
        if not columns.classes and config.num_classes is None:
            columns = dataclasses.replace(columns, classes=numbered(highest_label(files["train"], columns) + 1))
    classes = columns.classes or numbered(config.num_classes or 0)
    if not classes or not length:
        raise DenseShortcutError(f"{config.hub} does not say how large it is: give --num-classes and --train-images.")
    wanted = [columns.image, columns.label]
    if train.features is not None and isinstance(train.features[columns.image], datasets.Image):
        train, test = (part.cast_column(columns.image, datasets.Image(decode=False)) for part in (train, test))
    train, test = train.select_columns(wanted), test.select_columns(wanted)
    places = sample(config.limit_test, len(test))
    test = test.select(places)
    labels = np.asarray(test[columns.label], np.int64)
    check_labels(labels, len(classes), config.hub or str(config.data_dir))
    stream = HubStream(train, columns, config.shuffle_buffer)
    return stream, min(length, config.limit_train or length), HubImages(test, columns, labels), classes


def opened(name: str, **how: Any) -> Any:
    """A data set, or one sentence that says why there is none."""
    import datasets

    try:
        return datasets.load_dataset(name, **how)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DenseShortcutError(
            f"the data set {name} cannot be opened ({first_line(error)}): check its name or files and the network."
        ) from error


def split_of(name: str, part: str) -> str:
    """The name of the training or test split of a data set on the hub."""
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DenseShortcutError(
            f"the data set {name} cannot be opened ({first_line(error)}): check its name and the network."
        ) from error
    found = [split for split in PARTS[part] if split in splits]
    if not found:
        raise DenseShortcutError(f"{name} has no split {' or '.join(PARTS[part])}: it has {', '.join(splits)}.")
    return found[0]


def rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def highest_label(paths: list[Path], columns: Columns) -> int:
    """The highest label of the training files."""
    import pyarrow.compute as pc

    tables = (read_columns(path, (columns.label,), "files with the same columns") for path in paths)
    return max(pc.max(table[columns.label]).as_py() for table in tables)
