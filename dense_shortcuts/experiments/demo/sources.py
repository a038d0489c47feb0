"""What the page can choose from: networks, runs, benchmarks and sample images."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ... import shipped
from ...errors import DenseShortcutError
from ...files import read_json
from ...models import list_models
from ..bench.run import RESULTS
from ..command import dsnet
from ..train.checkpoint import CARD
from ..train.data.images import IMAGE_ERRORS
from ..train.loop import METRICS, read_metrics

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
HOST_FORM = "shipped, unplugged"
MAX_MEGABYTES = 10
MAX_PIXELS = 40_000_000
HOSTS = ("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152")  # in timm, of DSNets of these depths


@dataclass(frozen=True)
class Choice:
    """A network to choose: what the page calls it, and what `read_network` takes."""

    label: str
    name: str


def networks(runs: Path) -> list[Choice]:
    """The shipped network and its host form, those of runs (newest first, a host before its DSNet), others."""
    package = [Choice("shipped DSNet-20", shipped.NAME), Choice("shipped, its shortcuts taken out", HOST_FORM)]
    cards = sorted(runs.glob(f"*/*/{CARD}"), key=lambda card: (-_started(card.parents[1]), card.parent.name))
    trained = [Choice(f"{card.parents[1].name}: {card.parent.name}", str(card.parent)) for card in cards]
    return [*package, *trained, *(Choice(f"{name} (not trained)", name) for name in (*HOSTS, *list_models()))]


def first_pair(runs: Path) -> tuple[str, str]:
    """The networks to begin with: host and DSNet of the newest comparison, else the shipped one and its host form."""
    found = [choice.name for choice in networks(runs)]
    for host, dense in pairwise(found):
        if Path(host).name == "identity" and Path(host).parent == Path(dense).parent:
            return host, dense
    return HOST_FORM, shipped.NAME


def curves(runs: Path) -> list[str]:
    """Names of the runs that have metrics, the newest first."""
    found = {path.parents[1] for path in runs.glob(f"*/*/{METRICS}")}
    return [run.name for run in sorted(found, key=lambda run: -_started(run))]


def histories(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every epoch by network of a run."""
    return {path.parent.name: read_metrics(path) for path in sorted(run.glob(f"*/{METRICS}"))}


def benchmarks(runs: Path) -> list[str]:
    """Names of the folders that `dsnet bench` filled, the newest first."""
    found = [path.parent for path in runs.glob(f"*/{RESULTS}")]
    return [folder.name for folder in sorted(found, key=lambda folder: -_started(folder))]


def comparisons(folder: Path) -> list[dict[str, Any]]:
    """The comparisons that a benchmark wrote."""
    found = read_json(folder / RESULTS).get("comparisons")
    if not isinstance(found, list) or not found:
        raise DenseShortcutError(f"{folder.name} has no finished comparison: `{dsnet('bench')}` makes one.")
    return found


def samples() -> dict[str, Image.Image]:
    """scikit-learn's two photographs and a digit of each kind."""
    from sklearn.datasets import load_digits, load_sample_image

    found = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    digits = load_digits()
    for digit in range(10):
        grey = digits.images[int(np.argmax(digits.target == digit))]
        pixels = (grey * (255 / 16)).round().astype(np.uint8)
        found[f"digit {digit}"] = Image.fromarray(pixels).convert("RGB")
    return found


def read_upload(path: str | None) -> Image.Image:
    """The image that a user gave, upright, in RGB.

    Raises:
        DenseShortcutError: none, of another format, broken, or too large.
    """
    if path is None:
        raise DenseShortcutError("Drop an image or pick a sample first.")
    if Path(path).stat().st_size > MAX_MEGABYTES * 2**20:
        raise DenseShortcutError(f"This file is larger than {MAX_MEGABYTES} MB: take a smaller one.")
    try:
        image = Image.open(path, formats=FORMATS)
        pixels = image.width * image.height
        upright = ImageOps.exif_transpose(image).convert("RGB") if pixels <= MAX_PIXELS else None
    except IMAGE_ERRORS as error:
        raise DenseShortcutError(
            f"This file is not a whole image: it must be one of {', '.join(FORMATS)}, and complete."
        ) from error
    if upright is None:
        raise DenseShortcutError(
            f"This image has {pixels:,} pixels, and up to {MAX_PIXELS:,} are read here: take a smaller one."
        )
    return upright


def _started(folder: Path) -> float:
    """When a run's folder was made, as near as the file system tells."""
    files = [file.stat().st_mtime for file in folder.iterdir() if file.is_file()]
    return min(files, default=folder.stat().st_mtime)
