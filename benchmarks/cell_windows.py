"""Cuts the BCCD photos into windows with one kind of cell to name, for training a classifier and scoring its maps.

    python benchmarks/cell_windows.py BCCD OUT

A window is 192 pixels wide. Around every white cell and every platelet that lies in it whole, one window; its class is
WBC where a white cell is in it, Platelets where platelets and no white cell are, and RBC where neither touches it, for
which places are drawn at random. OUT gets train/CLASS and val/CLASS, and val.json with the boxes of the windows in COCO
form: those of the window's own class, so that a map of the class can be scored.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image

SIDE = 192


def cut(photo, boxes, names, rng):
    """Windows of a photo as (class, left, top), from boxes as (category id, x0, y0, x1, y1)."""
    width, height = photo.size
    places = [(names[c], (x0 + x1) / 2, (y0 + y1) / 2) for c, x0, y0, x1, y1 in boxes if names[c] != "RBC"]
    places.append(("RBC", rng.uniform(0, width), rng.uniform(0, height)))
    for wanted, x, y in places:
        shift = [rng.uniform(-SIDE / 4, SIDE / 4) for _ in range(2)]
        left = int(min(max(x + shift[0] - SIDE / 2, 0), width - SIDE))
        top = int(min(max(y + shift[1] - SIDE / 2, 0), height - SIDE))
        touched = {names[c] for c, *b in boxes if inside(b, left, top, whole=False)}
        whole = {names[c] for c, *b in boxes if inside(b, left, top, whole=True)}
        kind = next(name for name in ("WBC", "Platelets", "RBC") if name in touched or name == "RBC")
        if kind == wanted and kind in whole:
            yield kind, left, top


def inside(box, left, top, *, whole):
    """Whether a box lies in the window, or (not whole) whether it touches it."""
    x0, y0, x1, y1 = box
    if whole:
        return x0 >= left and y0 >= top and x1 <= left + SIDE and y1 <= top + SIDE
    return x1 > left and y1 > top and x0 < left + SIDE and y0 < top + SIDE


def main(source, target):
    rng = random.Random(0)
    for part in ("train", "val"):
        coco = json.loads((source / f"instances_{part}.json").read_text())
        names = {category["id"]: category["name"] for category in coco["categories"]}
        images, annotations = [], []
        for image in coco["images"]:
            found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            boxes = [
                (a["category_id"], x, y, x + w, y + h) for a in found for x, y, w, h in [a["bbox"]] if w > 0 and h > 0
            ]
            photo = Image.open(source / part / image["file_name"]).convert("RGB")
            for number, (kind, left, top) in enumerate(cut(photo, boxes, names, rng)):
                name = f"{Path(image['file_name']).stem}-{number}.png"
                folder = target / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                photo.crop((left, top, left + SIDE, top + SIDE)).save(folder / name)
                images.append({"id": len(images), "file_name": name, "width": SIDE, "height": SIDE})
                for c, *box in boxes:
                    if names[c] == kind and inside(box, left, top, whole=False):
                        x0, y0, x1, y1 = box
                        bbox = [x0 - left, y0 - top, x1 - x0, y1 - y0]
                        annotations.append({"image_id": images[-1]["id"], "category_id": c, "bbox": bbox})
        for number, annotation in enumerate(annotations):
            annotation["id"] = number
        content = {"images": images, "annotations": annotations, "categories": coco["categories"]}
        (target / f"{part}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
