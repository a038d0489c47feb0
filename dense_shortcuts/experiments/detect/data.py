"""Images and boxes in COCO format: what a file holds, what is wrong with it, and samples for training and scoring.

Faults are handled as COCO's own tools do. For training, as in torchvision's reference: boxes are clipped to the image,
boxes thinner than a pixel and crowds are left out, and so are images without a box. For scoring, as in pycocotools:
boxes stand as they are written, crowds are ignored, annotations of unknown categories do not count, and an image whose
file is missing counts with nothing found in it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import DenseShortcutError
from ..train.data.images import IMAGE_ERRORS, first_line
from ..train.data.transformed import seeded

Sample = tuple[Tensor, dict[str, Any]]

# Where a split's annotations and images lie, in the order they are looked for.
LAYOUTS = (
    ("annotations/instances_{}2017.json", "{}2017"),
    ("annotations/instances_{}2014.json", "{}2014"),
    ("annotations/instances_{}.json", "{}"),
    ("instances_{}.json", "{}"),
)
EXAMPLES = 3  # of each fault that a report names


@dataclass(frozen=True)
class Box:
    """One annotation: class 1 .. K, (x, y, w, h) in pixels as written, area in pixels, mask as polygons or RLE."""

    label: int
    xywh: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: Any


@dataclass(frozen=True)
class Picture:
    """One image with its annotations; `path` is None where the file is missing."""

    id: int
    name: str
    path: Path | None
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Coco:
    """A split as its file has it.

    Attributes:
        pictures: every image, in the order of the ids.
        categories: (id, name) by id; category k of it is class k + 1, for 0 is the background.
        faults: examples of each kind of fault, as "what is wrong: how it is handled" -> [count, example, ...].
    """

    pictures: tuple[Picture, ...]
    categories: tuple[tuple[int, str], ...]
    faults: dict[str, list[Any]]

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.categories]


class Faults:
    """Counts faults by kind and keeps a few examples of each."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}

    def add(self, kind: str, example: object) -> None:
        entry = self.found.setdefault(kind, [0])
        entry[0] += 1
        if len(entry) <= EXAMPLES:
            entry.append(str(example))


BROKEN = "annotations whose bbox is not four finite numbers: left out"
UNKNOWN_CATEGORY = "annotations of a category that the file does not list: left out"
UNKNOWN_IMAGE = "annotations of an image that the file does not list: left out"
NO_AREA = "boxes without area: not trained on; when scoring they count as never found"
OUTSIDE = "boxes that reach out of their image: clipped for training, as written for scoring"
FAR_OUTSIDE = "boxes that lie wholly outside their image: not trained on; as written for scoring"
EMPTY = "images without a box to train on: left out of training (--empty-images keeps them), kept for scoring"
MISSING = "images whose file is missing: left out of training; when scoring, their boxes count as missed"
NO_MASK = "annotations without segmentation: left out of training and scoring of masks"


def find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split, "train" or "val".

    Raises:
        DenseShortcutError: no such folder, or none of the known layouts in it.
    """
    if not folder.is_dir():
        raise DenseShortcutError(f"{folder} is not a folder: give --data-dir the folder of the COCO data.")
    for annotations, images in LAYOUTS:
        paths = folder / annotations.format(split), folder / images.format(split)
        if paths[0].is_file() and paths[1].is_dir():
            return paths
    looked = ", ".join(f"{a.format(split)} with {i.format(split)}/" for a, i in LAYOUTS)
    raise DenseShortcutError(f"{folder} has no {split} split in COCO's layout: it must have {looked}.")


def read_split(folder: Path, split: str, limit: int | None = None) -> Coco:
    """A split of a folder in COCO's layout; a limit takes a fixed random sample of its images.

    Raises:
        DenseShortcutError: no or a broken annotation file, or none of its images is there.
    """
    annotations, images = find_split(folder, split)
    return read_coco(annotations, images, limit)


def read_coco(annotations: Path, images: Path, limit: int | None = None) -> Coco:
    """What an annotation file and its image folder hold; see `read_split`."""
    content = read_annotations(annotations)
    faults = Faults()
    try:
        categories = tuple(sorted((int(c["id"]), str(c["name"])) for c in content["categories"]))
        listed = {int(image["id"]): image for image in content["images"]}
        sizes = {i: (image.get("width"), image.get("height")) for i, image in listed.items()}
        names = {i: str(image["file_name"]) for i, image in listed.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DenseShortcutError(
            f"{annotations} has an image or a category without id, name or file_name ({error!r}): mend it."
        ) from error
    if not categories or not listed:
        raise DenseShortcutError(f"{annotations} lists no {'images' if categories else 'categories'}: mend it.")
    chosen = sorted(listed)
    if limit is not None and limit < len(chosen):
        places = np.sort(np.random.default_rng(0).permutation(len(chosen))[:limit])
        chosen = [chosen[place] for place in places]

    boxes = read_boxes(content["annotations"], {c: k + 1 for k, (c, _) in enumerate(categories)}, sizes, chosen, faults)
    pictures = []
    for i in chosen:
        path = images / names[i]
        if not path.is_file():
            faults.add(MISSING, names[i])
        pictures.append(Picture(i, names[i], path if path.is_file() else None, tuple(boxes[i])))
    if all(picture.path is None for picture in pictures):
        raise DenseShortcutError(f"{images} has none of the images that {annotations} lists: give the right folder.")
    return Coco(tuple(pictures), categories, faults.found)


def read_annotations(path: Path) -> dict[str, Any]:
    """The JSON of an annotation file with its three lists."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DenseShortcutError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DenseShortcutError(f"{path} is not whole JSON ({error}): fetch it again.") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise DenseShortcutError(f"{path} is not in COCO format: it must hold the lists {', '.join(lists)}.")
    return content


def read_boxes(
    annotations: Iterable[Any],
    labels: Mapping[int, int],
    sizes: Mapping[int, tuple[Any, Any]],
    chosen: Iterable[int],
    faults: Faults,
) -> dict[int, list[Box]]:
    """The usable annotations of the chosen images, by image; the others are counted as faults."""
    boxes: dict[int, list[Box]] = {i: [] for i in chosen}
    for annotation in annotations:
        image, category = annotation.get("image_id"), annotation.get("category_id")
        what = f"annotation {annotation.get('id')}"
        if image not in sizes:
            faults.add(UNKNOWN_IMAGE, f"{what} (image {image})")
        elif image not in boxes:
            continue  # of an image that the limit leaves out
        elif category not in labels:
            faults.add(UNKNOWN_CATEGORY, f"{what} (category {category})")
        elif (xywh := four_numbers(annotation.get("bbox"))) is None:
            faults.add(BROKEN, f"{what} ({annotation.get('bbox')})")
        else:
            look_at(xywh, sizes[image], what, faults)
            area = annotation.get("area")
            area = float(area) if isinstance(area, int | float) and math.isfinite(area) else xywh[2] * xywh[3]
            crowd = bool(annotation.get("iscrowd", 0))
            boxes[image].append(Box(labels[category], xywh, area, crowd, annotation.get("segmentation")))
    return boxes


def four_numbers(bbox: Any) -> tuple[float, float, float, float] | None:
    """(x, y, w, h), or None where that is not what it is."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in bbox):
        return None
    x, y, w, h = map(float, bbox)
    return x, y, w, h


def look_at(xywh: Sequence[float], size: tuple[Any, Any], what: str, faults: Faults) -> None:
    """Count what is wrong with a box, at most one fault."""
    x, y, w, h = xywh
    told = f"{what} ({', '.join(f'{v:g}' for v in xywh)})"
    if w <= 0 or h <= 0:
        faults.add(NO_AREA, told)
    elif all(isinstance(side, int) and side > 0 for side in size):
        if x >= size[0] or y >= size[1] or x + w <= 0 or y + h <= 0:
            faults.add(FAR_OUTSIDE, told)
        elif x < 0 or y < 0 or x + w > size[0] + 1 or y + h > size[1] + 1:  # a pixel more is counting from 1
            faults.add(OUTSIDE, told)


def trainable(coco: Coco, *, masks: bool, empty_images: bool) -> tuple[list[Picture], dict[str, list[Any]]]:
    """The images to train on, and the faults with those that only training meets.

    Raises:
        DenseShortcutError: no image is left, or masks are asked for and there are none.
    """
    faults = Faults()
    faults.found = {kind: list(entry) for kind, entry in coco.faults.items()}
    there = [p for p in coco.pictures if p.path is not None]
    if masks:
        without = [(p, b) for p in there for b in p.boxes if not has_mask(b)]
        for picture, _ in without:
            faults.add(NO_MASK, picture.name)
        if all(not has_mask(box) for p in there for box in p.boxes):
            raise DenseShortcutError("--detector maskrcnn needs segmentation and this data has none: take fasterrcnn.")
    chosen = []
    for picture in there:
        if any(usable(box, masks) for box in picture.boxes):
            chosen.append(picture)
        else:
            faults.add(EMPTY, picture.name)
            if empty_images:
                chosen.append(picture)
    if not chosen:
        raise DenseShortcutError("no training image has a box that can be trained on: mend the annotations.")
    return chosen, faults.found


def usable(box: Box, masks: bool) -> bool:
    """Whether a box is trained on, its place in the image left aside."""
    return not box.crowd and box.xywh[2] > 0 and box.xywh[3] > 0 and (not masks or has_mask(box))


def has_mask(box: Box) -> bool:
    """Whether there is a mask: polygons of three points or more, or a run-length code."""
    segmentation = box.segmentation
    if isinstance(segmentation, list):
        return any(isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation)
    return isinstance(segmentation, dict)


def report(faults: Mapping[str, Sequence[Any]], split: str) -> list[str]:
    """A line for each kind of fault: its count, how it is handled, and examples."""
    return [
        f"{split}: {entry[0]:,} {kind} - {', '.join(entry[1:])}{', ...' if entry[0] > EXAMPLES else ''}"
        for kind, entry in faults.items()
    ]


class TrainImages(Dataset):
    """Training samples: (image (3, H, W) in 0 .. 1, {"boxes": (n, 4) as x1 y1 x2 y2, "labels": (n,), "masks"}).

    An index is (epoch, place): augmentation follows from it and the seed alone (see `train.data.TransformedImages`).
    """

    def __init__(self, pictures: Sequence[Picture], transform: Any, seed: int, *, masks: bool) -> None:
        self.pictures, self.transform, self.seed, self.masks = pictures, transform, seed, masks

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        from torchvision import tv_tensors

        epoch, place = index
        picture = self.pictures[place]
        image = tv_tensors.Image(read_image(picture.path))
        size = (image.shape[-2], image.shape[-1])
        boxes = [box for box in picture.boxes if usable(box, self.masks)]
        xywh = torch.tensor([box.xywh for box in boxes], dtype=torch.float32).reshape(-1, 4)
        corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        # torchvision annotates its constructors without the keywords that they take
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": torch.tensor([box.label for box in boxes], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(mask_of(box, size)) for box in boxes]
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        with seeded(self.seed, epoch, place):
            return self.transform(image, target)


class TestImages(Dataset):
    """Images for scoring: (image (3, H, W) in 0 .. 1, place in the list of pictures), where the file is there."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.places = [place for place, picture in enumerate(pictures) if picture.path is not None]
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = self.places[index]
        return read_image(self.pictures[place].path).float() / 255, place


def train_transform(*, flip: bool, photometric: bool, iou_crop: bool) -> Any:
    """torchvision's v2 transforms, which move boxes and masks with the image; the detector itself resizes."""
    from torchvision.transforms import v2

    steps: list[Any] = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]  # thinner than a pixel is left out
    if photometric:
        steps.append(v2.RandomPhotometricDistort())
    if iou_crop:
        steps += [v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]
    if flip:
        steps.append(v2.RandomHorizontalFlip(0.5))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def read_image(path: Path | None) -> Tensor:
    """An image file as (3, H, W) uint8.

    Raises:
        DenseShortcutError: not a whole image.
    """
    assert path is not None
    try:
        pixels = np.array(Image.open(path).convert("RGB"))
    except IMAGE_ERRORS as error:
        raise DenseShortcutError(f"{path} is not a whole image ({first_line(error)}): replace or remove it.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def mask_of(box: Box, size: tuple[int, int]) -> np.ndarray:
    """The (H, W) uint8 mask of an annotation, as COCO's tools draw it."""
    from faster_coco_eval.core import mask as tools

    segmentation = box.segmentation
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        code = tools.merge(tools.frPyObjects(polygons, *size))
    elif isinstance(segmentation.get("counts"), list):
        code = tools.frPyObjects(segmentation, *size)
    else:
        code = segmentation
    mask = np.asarray(tools.decode(code), dtype=np.uint8)
    if mask.shape != size:
        raise DenseShortcutError(
            f"a mask is {mask.shape[1]}x{mask.shape[0]} in an image of {size[1]}x{size[0]}: mend it."
        )
    return mask


def truth(picture: Picture, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """What scoring compares with: boxes (n, 4) as x y w h as written, labels, iscrowd, area; masks where size is given.

    Args:
        size: (H, W) of the image, to draw masks on; annotations without a mask are then left out.
    """
    boxes = [box for box in picture.boxes if size is None or has_mask(box)]
    found = {
        "boxes": torch.tensor([box.xywh for box in boxes], dtype=torch.float64).reshape(-1, 4),
        "labels": torch.tensor([box.label for box in boxes], dtype=torch.int64),
        "iscrowd": torch.tensor([int(box.crowd) for box in boxes], dtype=torch.int64),
        "area": torch.tensor([box.area for box in boxes], dtype=torch.float64),
    }
    if size is not None:
        masks = [torch.from_numpy(mask_of(box, size)) for box in boxes]
        found["masks"] = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
    return found
