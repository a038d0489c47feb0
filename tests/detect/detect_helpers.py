"""A tiny network registered with timm, and a generated data set in COCO format with every fault that is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

WIDTH, HEIGHT = 96, 64
CATEGORIES = [{"id": 1, "name": "red"}, {"id": 3, "name": "green"}, {"id": 7, "name": "blue"}]  # with gaps, as COCO's
COLOURS = {1: (200, 40, 40), 3: (40, 200, 40), 7: (40, 40, 200)}

default_cfgs = generate_default_cfgs(
    {"tiny_backbone": {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "num_classes": 5, "classifier": "fc"}}
)
OVERLAY: dict[str, Any] = {}  # a test puts the file of pretrained weights here


@register_model
def tiny_backbone(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
    """Four stages of two blocks, 8 to 32 maps wide."""
    kwargs = kwargs | {"pretrained_cfg_overlay": dict(OVERLAY)} if OVERLAY else kwargs
    settings = {"block": BasicBlock, "layers": (2, 2, 2, 2), "channels": (8, 16, 24, 32)}
    return build_model_with_cfg(ResNet, "tiny_backbone", pretrained, **settings, **kwargs)


def annotation(number: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": 0,
    } | more


def polygon(bbox: list[float]) -> list[list[float]]:
    """A box with its corners cut, as one polygon."""
    x, y, w, h = bbox
    return [[x + w / 4, y, x + w, y + h / 4, x + 3 * w / 4, y + h, x, y + 3 * h / 4]]


def clean(count: int, first_image: int, seed: int, *, masks: bool = True) -> tuple[list[dict], list[dict]]:
    """Images and annotations without a fault: three boxes an image, each of another category."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(first_image, first_image + count):
        images.append({"id": i, "file_name": f"{i:06d}.png", "width": WIDTH, "height": HEIGHT})
        for category in CATEGORIES:
            w, h = rng.integers(12, 34, 2)
            bbox = [float(rng.integers(0, WIDTH - w)), float(rng.integers(0, HEIGHT - h)), float(w), float(h)]
            more = {"segmentation": polygon(bbox)} if masks else {}
            annotations.append(annotation(len(annotations) + 10 * first_image, i, category["id"], bbox, **more))
    return images, annotations


def draw(path: Path, annotations: list[dict], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(90, 130, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for each in annotations:
        x, y, w, h = (int(v) for v in each["bbox"])
        pixels[max(0, y) : y + h, max(0, x) : x + w] = COLOURS.get(each["category_id"], (0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_set(folder: Path, *, train: int = 8, val: int = 6, masks: bool = True, faults: bool = False) -> Path:
    """A data set in COCO 2017's layout; with faults, both splits have one or two of each kind."""
    for split, count, first in (("train", train, 100), ("val", val, 500)):
        images, annotations = clean(count, first, first, masks=masks)
        for image in images:
            own = [a for a in annotations if a["image_id"] == image["id"]]
            draw(folder / f"{split}2017" / image["file_name"], own, image["id"])
        if faults:
            add_faults(folder / f"{split}2017", images, annotations, first)
        write_json(folder / "annotations" / f"instances_{split}2017.json", images, annotations)
    return folder


def add_faults(folder: Path, images: list[dict], annotations: list[dict], first: int) -> None:
    """One image without boxes, one whose file is missing, and annotations with faults on the others."""
    empty, missing, bad = first + 50, first + 51, first + 52
    for i in (empty, missing, bad):
        images.append({"id": i, "file_name": f"{i:06d}.png", "width": WIDTH, "height": HEIGHT})
    n = 1000 + 10 * first
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 10 * HEIGHT, (WIDTH - 10) * HEIGHT]}
    seg = {"segmentation": polygon([10, 10, 20, 20])}
    annotations += [
        annotation(n + 1, missing, 1, [10, 10, 20, 20], **seg),
        annotation(n + 2, first, 1, [30, 30, 0, 12], segmentation=[]),  # no width
        annotation(n + 3, first + 1, 3, [30, 30, 12, 0], segmentation=[]),  # no height
        annotation(n + 4, first, 3, [70, 40, 40, 40], **seg),  # reaches out at the lower right
        annotation(n + 5, first + 1, 7, [-15, -10, 30, 30], **seg),  # at the upper left
        annotation(n + 6, first, 7, [200, 10, 20, 20], **seg),  # wholly outside
        annotation(n + 7, first, 99, [10, 10, 20, 20], **seg),  # of no listed category
        annotation(n + 8, 424242, 1, [10, 10, 20, 20], **seg),  # of no listed image
        annotation(n + 9, first + 2, 1, [0, 0, 10, 64], iscrowd=1, segmentation=crowd),
        annotation(n + 10, bad, 7, [5, 5, 0, 0], segmentation=[]),  # all that its image has
    ]
    draw(folder / f"{empty:06d}.png", [], empty)
    draw(folder / f"{bad:06d}.png", [], bad)


def write_json(path: Path, images: list[dict], annotations: list[dict], categories: list[dict] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories or CATEGORIES}
    path.write_text(json.dumps(content))
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
