"""Generated images, and images as a configuration loads or refuses them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import Data, load_data


def png(seed: int, size: int = 8) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, part: str, images: list[bytes | None], labels: list[int]) -> Path:
    """A parquet file in the layout of uoft-cs/cifar100."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}-00000-of-00001.parquet"
    img = [{"bytes": content, "path": None} for content in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"img": pa.array(img, kind), "fine_label": labels, "coarse_label": [0] * len(labels)}), path
    )
    return path


def write_shard(path: Path, entries: list[tuple[str, bytes | None, str | None]]) -> Path:
    """A WebDataset shard of (key, PNG, label); what is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, content, label in entries:
            for kind, data in (("png", content), ("cls", label.encode() if label is not None else None)):
                if data is not None:
                    about = tarfile.TarInfo(f"{key}.{kind}")
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))
    return path


def number_image(number: int, size: int = 8) -> bytes:
    """A PNG of one colour that says its number, 0 to 255, in red."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers_in(images: torch.Tensor) -> list[int]:
    """The numbers of `number_image`s after normalisation with ImageNet's mean and deviation, (B, 3, S, S)."""
    return ((images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255).round().long().tolist()


def load(**settings) -> Data:
    """The images of a configuration."""
    return load_data(TrainConfig(**settings).resolved())


def one_sentence(**settings) -> str:
    """What is said of images that cannot be loaded."""
    with pytest.raises(DenseShortcutError) as caught:
        load(**settings)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text
