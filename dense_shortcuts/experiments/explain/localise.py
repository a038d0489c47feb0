"""How much of a map lies on the object: boxes from COCO files, two scores, and a paired comparison of two networks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DenseShortcutError
from ...files import read_json


@dataclass(frozen=True)
class Box:
    """An object of a category: x0, y0, x1, y1 in the image's pixels."""

    category: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Score:
    """What a map says about an object.

    Attributes:
        energy: the map's part that lies inside the boxes, 0 to 1 (energy-based pointing game, Score-CAM, Sec. 4.2).
        hit: whether the map's highest point lies inside (pointing game, Zhang et al. 2016, without their margin).
        area: the boxes' part of the picture: what a map without any preference would score in both.
        empty: whether the map is zero everywhere, which scores 0 and a miss.
    """

    energy: float
    hit: bool
    area: float
    empty: bool


def read_boxes(path: Path) -> tuple[dict[str, list[Box]], int]:
    """Boxes by file name (without folders) from a COCO file, and how many were left out for having no area.

    Raises:
        DenseShortcutError: not COCO's layout, or a box of an image or a category that the file does not list.
    """
    content = read_json(path)
    try:
        files = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        found: dict[str, list[Box]] = {file: [] for file in files.values()}
        left_out = 0
        for annotation in content["annotations"]:
            x, y, width, height = map(float, annotation["bbox"])
            file, name = files[annotation["image_id"]], names[annotation["category_id"]]
            if width <= 0 or height <= 0:
                left_out += 1
            else:
                found[file].append(Box(name, (x, y, x + width, y + height)))
    except (KeyError, TypeError, ValueError) as error:
        raise DenseShortcutError(
            f"{path} is not a whole COCO file of boxes (at fault: {json.dumps(str(error))}): "
            "it needs images, categories and annotations that fit together."
        ) from error
    return found, left_out


def mask_of(boxes: np.ndarray, side: int) -> np.ndarray:
    """Which pixels of a square picture have their centre in any of the boxes (B, 4), (side, side) bool."""
    centres = np.arange(side) + 0.5
    inside = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= np.outer((centres >= y0) & (centres < y1), (centres >= x0) & (centres < x1))
    return inside


def score(cam: np.ndarray, mask: np.ndarray) -> Score:
    """Both scores of a map (S, S) for the pixels of a mask (S, S)."""
    total = float(cam.sum())
    if total <= 0:
        return Score(0.0, False, float(mask.mean()), True)
    # A map is enlarged from few places, so its top may be a plateau, at the border above all: its middle counts.
    rows, columns = np.nonzero(cam >= cam.max() - 1e-6)
    hit = bool(mask[round(rows.mean()), round(columns.mean())])
    return Score(float(cam[mask].sum()) / total, hit, float(mask.mean()), False)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over objects: energy, pointing (share of hits), area (what chance gives), and counts n and empty."""
    return {
        "n": len(scores),
        "energy": float(np.mean([s.energy for s in scores])),
        "pointing": float(np.mean([s.hit for s in scores])),
        "area": float(np.mean([s.area for s in scores])),
        "empty": sum(s.empty for s in scores),
    }


def paired(first: Sequence[Score], second: Sequence[Score]) -> dict[str, Any]:
    """Two networks on the same objects.

    Returns:
        n; energy_difference (second less first, mean) with its standard_error and the p of Wilcoxon's signed-rank test
        (energy_p); only_first and only_second (hits by one alone) with McNemar's exact p (pointing_p). A p is None
        where fewer than two objects, or no difference at all, leave nothing to test.
    """
    from scipy.stats import binomtest, wilcoxon

    differences = np.asarray([b.energy - a.energy for a, b in zip(first, second, strict=True)])
    n = len(differences)
    only_first = sum(a.hit and not b.hit for a, b in zip(first, second, strict=True))
    only_second = sum(b.hit and not a.hit for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    testable = n > 1 and bool(np.any(differences != 0))
    return {
        "n": n,
        "energy_difference": float(differences.mean()),
        "standard_error": float(differences.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "energy_p": float(wilcoxon(differences).pvalue) if testable else None,
        "only_first": only_first,
        "only_second": only_second,
        "pointing_p": float(binomtest(only_first, differing, 0.5).pvalue) if differing else None,
    }
