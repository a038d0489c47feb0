"""Cuts the BCCD photos into windows with one kind of cell to name, for training a classifier and scoring its maps.

    python benchmarks/cell_windows.py BCCD OUT

A window is 160 pixels wide; its class is the rarest kind of cell in it. Two windows go around every white cell (WBC)
and every platelet, moved at random so that the cell's middle stays inside: WBC, or Platelets where no white cell
touches the window. RBC windows, up to two a photo, touch neither. OUT gets train/CLASS and val/CLASS, and train.json
and val.json with the boxes of each window's own class in COCO form, so that a map of that class can be scored.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image

SIDE = 160


def windows(boxes, width, height, rng):
    """Windows of a photo as (class, left, top); boxes are (class, x0, y0, x1, y1) in it."""
    for name, x0, y0, x1, y1 in boxes:
        for _ in range(2 if name != "RBC" else 0):
            x, y = ((a + b) / 2 + rng.uniform(-0.35, 0.35) * SIDE for a, b in ((x0, x1), (y0, y1)))
            left, top = corner(x, width), corner(y, height)
            if name == "WBC" or "WBC" not in touching(boxes, left, top):
                yield name, left, top
    tries = [(corner(rng.uniform(0, width), width), corner(rng.uniform(0, height), height)) for _ in range(12)]
    plain = [place for place in tries if touching(boxes, *place) == {"RBC"}]
    yield from (("RBC", left, top) for left, top in plain[:2])


def corner(middle, size):
    """The left or upper edge of a window around a middle, kept inside a photo of this size."""
    return int(min(max(middle - SIDE / 2, 0), size - SIDE))


def touching(boxes, left, top):
    """The classes of which a box touches a window."""
    return {name for name, *box in boxes if touches(box, left, top)}


def touches(box, left, top):
    x0, y0, x1, y1 = box
    return x1 > left and y1 > top and x0 < left + SIDE and y0 < top + SIDE


def main(source, target):
    rng = random.Random(0)
    for part in ("train", "val"):
        coco = json.loads((source / f"instances_{part}.json").read_text())
        names = {category["id"]: category["name"] for category in coco["categories"]}
        numbers = {name: number for number, name in names.items()}
        images, annotations = [], []
        for image in coco["images"]:
            found = [a for a in coco["annotations"] if a["image_id"] == image["id"] and min(a["bbox"][2:]) > 0]
            boxes = [(names[a["category_id"]], x, y, x + w, y + h) for a in found for x, y, w, h in [a["bbox"]]]
            photo = Image.open(source / part / image["file_name"]).convert("RGB")
            for number, (kind, left, top) in enumerate(windows(boxes, *photo.size, rng)):
                file = f"{Path(image['file_name']).stem}-{number}.png"
                folder = target / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                photo.crop((left, top, left + SIDE, top + SIDE)).save(folder / file)
                images.append({"id": len(images), "file_name": file, "width": SIDE, "height": SIDE})
                for name, x0, y0, x1, y1 in boxes:
                    if name == kind and touches((x0, y0, x1, y1), left, top):
                        bbox = [x0 - left, y0 - top, x1 - x0, y1 - y0]
                        about = {"id": len(annotations), "image_id": len(images) - 1, "category_id": numbers[name]}
                        annotations.append(about | {"bbox": bbox})
        content = {"images": images, "annotations": annotations, "categories": coco["categories"]}
        (target / f"{part}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
