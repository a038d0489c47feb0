"""What a detector finds in pictures: drawn as PNG, and written in COCO's result format."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...errors import DenseShortcutError
from ...files import atomic, write_text
from ..train.run import checkpoint_folder
from .data import read_image
from .loop import read_detector
from .run import accelerator_for

RESULTS = "detections.json"
# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def predict(
    checkpoint: Path, images: Sequence[Path], threshold: float = 0.5, output: Path = Path("detections")
) -> Path:
    """Detect, draw and write; gives the folder.

    Args:
        checkpoint: a run's folder, or the model.safetensors in it.
        images: files and folders; what is no whole image is told and passed over.
        threshold: lowest score of a box that is drawn. detections.json has all of them.
        output: folder that gets a PNG for each image, and detections.json.

    Raises:
        DenseShortcutError: no or a broken checkpoint, a path that does not exist, not one image.
    """
    if not 0 <= threshold <= 1:
        raise DenseShortcutError(f"--threshold is {threshold}: it must be from 0 to 1.")
    paths = image_files(images)
    model, card, config = read_detector(checkpoint_folder(checkpoint))
    accelerator = accelerator_for(config)
    model = model.to(accelerator.device).eval()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DenseShortcutError(f"cannot make {output} ({error.strerror}): choose another --output.") from error
    results: list[dict[str, Any]] = []
    names: set[str] = set()
    for path in paths:
        try:
            image = read_image(path)
        except DenseShortcutError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        found = look(model, image, accelerator.device)
        name = free_name(path, names)
        results += coco_results(found, path, card["categories"])
        with atomic(output / name) as temporary:
            drawn(image, found, card["categories"], threshold).save(temporary, "PNG")
        print(f"{path}: {told(found, card['categories'], threshold)} -> {output / name}")
    if not names:
        raise DenseShortcutError("not one of the files is an image: give images, or folders of them.")
    write_text(output / RESULTS, json.dumps(results, indent=1) + "\n")
    return output


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders that by their ending are images, in order."""
    known = Image.registered_extensions()
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in known)
        elif path.is_file():
            found.append(path)
        else:
            raise DenseShortcutError(f"{path} does not exist: give images, or folders of them.")
    if not found:
        raise DenseShortcutError(f"{', '.join(map(str, paths)) or 'nothing'} holds no image: give some.")
    return found


def free_name(path: Path, taken: set[str]) -> str:
    """A PNG's name for an image, another one where two images share theirs."""
    name, number = f"{path.stem}.png", 2
    while name in taken:
        name, number = f"{path.stem}-{number}.png", number + 1
    taken.add(name)
    return name


@torch.no_grad()
def look(model: Any, image: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What is found in an image (3, H, W) uint8: boxes, labels, scores and perhaps masks (n, H, W) of truth values."""
    found = {key: value.cpu() for key, value in model([(image.float() / 255).to(device)])[0].items()}
    return found | {"masks": found["masks"][:, 0] > 0.5} if "masks" in found else found


def coco_results(found: dict[str, Tensor], path: Path, categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """COCO's result format, with the file's name in place of an image's id."""
    return [
        {
            "file_name": str(path),
            "category_id": categories[int(label) - 1]["id"],
            "category": categories[int(label) - 1]["name"],
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(score), 5),
        }
        for (x1, y1, x2, y2), label, score in zip(
            found["boxes"].tolist(), found["labels"], found["scores"], strict=True
        )
    ]


def drawn(image: Tensor, found: dict[str, Tensor], categories: Sequence[dict[str, Any]], threshold: float) -> Any:
    """The image with boxes, names and scores, and masks where there are some."""
    from matplotlib import font_manager
    from torchvision.transforms.v2.functional import to_pil_image
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    shown = found["scores"] >= threshold
    if not shown.any():
        return to_pil_image(image)
    labels = found["labels"][shown].tolist()
    colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels]
    if "masks" in found:
        image = draw_segmentation_masks(image, found["masks"][shown], alpha=0.4, colors=colours)
    names = [
        f"{categories[k - 1]['name']} {s:.2f}" for k, s in zip(labels, found["scores"][shown].tolist(), strict=True)
    ]
    shorter = min(image.shape[-2:])
    image = draw_bounding_boxes(
        image,
        found["boxes"][shown],
        names,
        colours,
        width=max(1, shorter // 200),
        font=font_manager.findfont("DejaVu Sans"),
        font_size=max(9, shorter // 40),
        fill_labels=True,
    )
    return to_pil_image(image)


def told(found: dict[str, Tensor], categories: Sequence[dict[str, Any]], threshold: float) -> str:
    """How many of each class are drawn."""
    labels = found["labels"][found["scores"] >= threshold].tolist()
    counts = {categories[k - 1]["name"]: labels.count(k) for k in sorted(set(labels))}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
