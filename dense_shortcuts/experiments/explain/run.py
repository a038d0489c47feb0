"""`dsnet cam`: maps of several networks side by side, and how well each finds what the boxes say is there."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...errors import DenseShortcutError
from ...extras import need
from ...files import write_text
from ..train.data.images import IMAGE_ERRORS, first_line
from . import picture
from .cam import cam_maps, find_layer, methods
from .localise import Box, Score, mask_of, paired, read_boxes, score, summary
from .networks import Network, class_place, probabilities, read_network, top, view

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Object:
    """What one map is about: an image, and in it all boxes of a category, or of all categories.

    category is None where the map is of each network's own likeliest class.
    """

    path: Path
    category: str | None
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Seen:
    """A network's maps of an object, by method.

    Attributes:
        target: name of the class.
        likeliest: the likeliest classes with their probabilities.
        pixels, boxes: as in `View`.
        scores: by method; empty without boxes.
    """

    target: str
    likeliest: list[tuple[str, float]]
    pixels: np.ndarray
    boxes: np.ndarray
    maps: dict[str, np.ndarray]
    scores: dict[str, Score]


def cam(
    images: Sequence[Path],
    models: str,
    *,
    method: str,
    layer: str | None,
    target: str | None,
    boxes: Path | None,
    pretrained: bool,
    output: Path,
    draw: int,
    line: str,
) -> Path:
    """Draw the maps as a PNG at `output`, print the scores where boxes are known, and write all numbers as JSON beside.

    Returns:
        the JSON's path.

    Raises:
        DenseShortcutError: bad input of any kind; nothing is written then.
    """
    need("`dsnet cam`", "train")
    from rich.console import Console

    console = Console()
    if output.suffix.lower() != ".png":
        raise DenseShortcutError(f"--output {output} must end in .png.")
    files, asked = image_files(images), methods(method)
    networks = [read_network(name.strip(), pretrained=pretrained) for name in models.split(",")]
    layers = [find_layer(network.model, layer)[0] for network in networks]
    for network in networks:
        if not network.trained:
            console.print(f"{network.label} is not trained: its maps are those of a random start.", highlight=False)
    known, without_area = read_boxes(boxes) if boxes is not None else ({}, 0)
    objects = objects_of(files, known, networks, target)

    drawn: list[tuple[Object, list[Seen]]] = []
    rows: list[dict[str, Any]] = []
    scores: dict[tuple[str, int], list[Score]] = {}
    cropped_away = 0
    for thing in objects:
        seen = [look(network, thing, asked, name) for network, name in zip(networks, layers, strict=True)]
        if len(drawn) < draw:
            drawn.append((thing, seen))
        rows.append(row(thing, seen))
        if thing.boxes and not all(each.scores for each in seen):
            cropped_away += 1
        elif thing.boxes:
            for place, each in enumerate(seen):
                for name, value in each.scores.items():
                    scores.setdefault((name, place), []).append(value)

    labels = [network.label for network in networks]
    report = {
        "command": line,
        "networks": [
            {"label": network.label, "layer": name, "trained": network.trained}
            for network, name in zip(networks, layers, strict=True)
        ],
        "methods": list(asked),
        "target": "category of the boxes" if any(o.category for o in objects) and target is None else target or "top-1",
        "images": len(files),
        "boxes_without_area": without_area,
        "objects_cropped_away": cropped_away,
        "localisation": localisation(asked, labels, scores),
        "objects": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.draw(output, labels, asked, drawn)
    written = output.with_suffix(".json")
    write_text(written, json.dumps(report, indent=2) + "\n")
    if report["localisation"]:
        tell(report, labels, console)
    console.print(f"maps: {output}, numbers: {written}", highlight=False, soft_wrap=True)
    return written


def image_files(images: Sequence[Path]) -> list[Path]:
    """The files, and of a folder its images in the order of their names.

    Raises:
        DenseShortcutError: a path that is not there, or nothing found.
    """
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise DenseShortcutError(f"{path} does not exist: give images, or folders of images.")
    if not files:
        raise DenseShortcutError("there is no image to look at: give images, or folders of images.")
    return files


def open_image(path: Path) -> Image.Image:
    """The image, read as a whole.

    Raises:
        DenseShortcutError: not an image, or cut short.
    """
    try:
        return Image.open(path).convert("RGB")
    except IMAGE_ERRORS as error:
        raise DenseShortcutError(f"{path} is not a whole image ({first_line(error)}): replace or remove it.") from error


def objects_of(
    files: Sequence[Path], known: dict[str, list[Box]], networks: Sequence[Network], target: str | None
) -> list[Object]:
    """What to draw a map of.

    Where all networks know some category of the boxes by name, one object for each image and such category, and the map
    is of that class. Else one for each image with all its boxes, and the map is of `target` or of the likeliest class.
    """
    categories = {box.category for found in known.values() for box in found}
    shared = categories.intersection(*(network.classes for network in networks)) if target is None else set()
    objects = []
    for path in files:
        found = known.get(path.name, [])
        groups: dict[str | None, list[Box]] = {}
        for box in found:
            if not shared or box.category in shared:
                groups.setdefault(box.category if shared else target, []).append(box)
        if not groups and not shared:
            groups[target] = []
        objects += [Object(path, name, tuple(box.corners for box in group)) for name, group in groups.items()]
    if known and not any(thing.boxes for thing in objects):
        raise DenseShortcutError("none of the images has a box in the file of boxes: they are matched by file name.")
    return objects


def look(network: Network, thing: Object, asked: Sequence[str], layer: str) -> Seen:
    """One network's maps and scores of an object; without scores where the crop leaves nothing of its boxes."""
    seen = view(network, open_image(thing.path), thing.boxes)
    chances = probabilities(network, seen)
    place = int(chances.argmax()) if thing.category is None else class_place(network, thing.category)
    maps = {name: cam_maps(network.model, seen.tensor, [place], name, layer)[0] for name in asked}
    mask = mask_of(seen.boxes, network.size)
    scores = {name: score(found, mask) for name, found in maps.items()} if mask.any() else {}
    return Seen(network.classes[place], top(network, chances), seen.picture, seen.boxes, maps, scores)


def row(thing: Object, seen: Sequence[Seen]) -> dict[str, Any]:
    """An object's line in the JSON."""
    return {
        "file": str(thing.path),
        "category": thing.category,
        "boxes": len(thing.boxes),
        "networks": [
            {
                "target": each.target,
                "top": [[name, round(chance, 6)] for name, chance in each.likeliest],
                "scores": {name: dataclasses.asdict(value) for name, value in each.scores.items()},
            }
            for each in seen
        ],
    }


def localisation(
    asked: Sequence[str], labels: Sequence[str], scores: dict[tuple[str, int], list[Score]]
) -> list[dict[str, Any]]:
    """For each method the networks' summaries, and each later network beside the first."""
    found = []
    for name in asked:
        mine = [scores[name, place] for place in range(len(labels)) if (name, place) in scores]
        if mine:
            found.append(
                {
                    "method": name,
                    "networks": [{"label": b, **summary(s)} for b, s in zip(labels, mine, strict=True)],
                    "paired": [
                        {"first": labels[0], "second": b, **paired(mine[0], s)}
                        for b, s in zip(labels[1:], mine[1:], strict=True)
                    ],
                }
            )
    return found


def tell(report: dict[str, Any], labels: Sequence[str], console: "Console") -> None:
    """Print the scores with their n, then the comparisons."""
    n = report["localisation"][0]["networks"][0]["n"]
    console.print(
        f"{n:,} objects in {report['images']:,} images ({report['objects_cropped_away']} lost by the crop, "
        f"{report['boxes_without_area']} boxes without area); maps of: {report['target']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table(report["localisation"]))
    for each in report["localisation"]:
        for pair in each["paired"]:
            console.print(sentence(each["method"], pair), highlight=False, soft_wrap=True)


def table(found: Sequence[dict[str, Any]]) -> "Table":
    """The scores for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("method", "network", "energy inside", "pointing game", "chance (area)", "empty maps"):
        made.add_column(heading, justify="left" if heading in ("method", "network") else "right", overflow="fold")
    for each in found:
        for line in each["networks"]:
            figures = [f"{line[key]:.3f}" for key in ("energy", "pointing", "area")]
            made.add_row(each["method"], line["label"], *figures, str(line["empty"]))
    return made


def sentence(method: str, pair: dict[str, Any]) -> str:
    """A paired comparison in a line."""
    error = "" if pair["standard_error"] is None else f" (standard error {pair['standard_error']:.3f})"
    energy = _chance("Wilcoxon's signed-rank test", pair["energy_p"])
    pointing = _chance("McNemar's exact test", pair["pointing_p"])
    return (
        f"{method}, {pair['second']} less {pair['first']} on the same {pair['n']} objects: energy "
        f"{pair['energy_difference']:+.3f}{error}, {energy}; {pair['only_second']} hit by {pair['second']} alone, "
        f"{pair['only_first']} by {pair['first']} alone, {pointing}."
    )


def _chance(test: str, p: float | None) -> str:
    return "nothing to test" if p is None else f"p = {p:.2g} by {test}"
