"""The twelve figures against pycocotools on the same detections."""

import contextlib
import io

import numpy as np
import pytest
import torch
from detect_helpers import CATEGORIES, HEIGHT, WIDTH

from dense_shortcuts.experiments.detect.data import Coco, mask_of, read_split, truth
from dense_shortcuts.experiments.detect.figures import TWELVE, Meter, twelve_lines

LABELS = {c["id"]: k for k, c in enumerate(CATEGORIES, 1)}


def detections(coco: Coco, seed: int, *, masks: bool) -> dict[int, dict[str, torch.Tensor]]:
    """Shifted true boxes with random scores and some wrong labels, and random ones, for each image that is there."""
    rng = np.random.default_rng(seed)
    found = {}
    for picture in coco.pictures:
        if picture.path is None:
            continue
        known = truth(picture)
        boxes = [[*b[:2], b[0] + b[2], b[1] + b[3]] for b in known["boxes"].tolist() if b[2] > 0 and b[3] > 0]
        boxes = [list(np.array(b) + rng.normal(0, 2, 4)) for b in boxes for _ in range(2)]
        boxes += [[x, y, x + 15, y + 12] for x, y in rng.integers(0, 60, (3, 2)).tolist()]
        # float32, as a detector gives them, so that both sides see the same numbers
        corners = torch.tensor(boxes, dtype=torch.float32)
        labels = torch.from_numpy(rng.integers(1, 4, len(boxes)))
        with_area = (known["boxes"][:, 2:] > 0).all(1)
        for k, label in enumerate(known["labels"][with_area]):  # the other one of the pair keeps its random label
            labels[2 * k] = label
        found[picture.id] = {
            "boxes": corners,
            "labels": labels,
            "scores": torch.from_numpy(rng.random(len(boxes))).float(),
        }
        if masks:
            found[picture.id]["masks"] = drawn(corners)
    return found


def drawn(corners: torch.Tensor) -> torch.Tensor:
    masks = torch.zeros(len(corners), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.clamp(min=0).int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return masks


def ours(coco: Coco, found: dict, kind: str, **options) -> dict:
    meter = Meter(kind, **options)
    for picture in coco.pictures:
        meter.add(picture, found.get(picture.id))
    return meter.figures(coco)


def theirs(path, found: dict, kind: str) -> list[float]:
    """What pycocotools says of the file itself."""
    from pycocotools import mask as tools
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ids = {k: category for category, k in LABELS.items()}
    results = []
    for image, each in found.items():
        for k, (x1, y1, x2, y2) in enumerate(each["boxes"].double().tolist()):
            result = {"image_id": image, "category_id": ids[int(each["labels"][k])], "score": float(each["scores"][k])}
            if kind == "segm":
                result["segmentation"] = tools.encode(np.asfortranarray(each["masks"][k].numpy()))
            else:
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        if kind == "segm":  # which has no mask for an empty list of polygons
            bare = [a for a in truth.dataset["annotations"] if not a["segmentation"]]
            truth.dataset["annotations"] = [a for a in truth.dataset["annotations"] if a not in bare]
            truth.createIndex()
        scored = COCOeval(truth, truth.loadRes(results), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored.stats.tolist()


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_twelve_figures_are_pycocotools_own_on_a_faulty_set(seed, kind, faulty_set):
    coco = read_split(faulty_set, "val")
    found = detections(coco, seed, masks=kind == "segm")
    expected = theirs(faulty_set / "annotations" / "instances_val2017.json", found, kind)
    figures = ours(coco, found, kind)
    assert 0.05 < figures["AP"] < 0.95 and len(expected) == 12
    assert [figures[name] for name, *_ in TWELVE] == pytest.approx(expected, abs=1e-6)


def test_a_missing_image_counts_as_missed(faulty_set):
    coco = read_split(faulty_set, "val")
    perfect = {}
    for picture in coco.pictures:
        if picture.path is not None:
            known = truth(picture)
            corners = torch.cat([known["boxes"][:, :2], known["boxes"][:, :2] + known["boxes"][:, 2:]], 1)
            perfect[picture.id] = {"boxes": corners, "labels": known["labels"], "scores": torch.ones(len(corners))}
    figures = ours(coco, perfect, "bbox", by_class=True)
    reds = sum(box.label == 1 and not box.crowd for picture in coco.pictures for box in picture.boxes)
    assert reds == 8  # six are found; the one without area and the one of the missing image never are
    assert figures["AR100"] < 1 and figures["classes"]["red"] < 0.8
    assert figures["classes"].keys() == {"red", "green", "blue"}


def test_figures_of_nothing_found_are_zero_and_of_no_such_object_minus_one(clean_set):
    coco = read_split(clean_set, "val")
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    figures = ours(coco, {picture.id: none for picture in coco.pictures}, "bbox")
    assert figures["AP"] == 0 and figures["AR100"] == 0 and figures["APl"] == -1


def test_a_processs_share_can_be_added_to_anothers(clean_set):
    coco = read_split(clean_set, "val")
    found = detections(coco, 0, masks=False)
    meters = [Meter("bbox"), Meter("bbox")]
    for k, picture in enumerate(coco.pictures):
        meters[k % 2].add(picture, found[picture.id])
    meters[0].extend(meters[1].states())
    assert meters[0].figures(coco) == pytest.approx(ours(coco, found, "bbox"))


def test_the_lines_are_those_that_pycocotools_prints(faulty_set):
    from pycocotools.cocoeval import COCOeval

    figures = {name: k / 100 for k, (name, *_) in enumerate(TWELVE)}
    printed = io.StringIO()
    evaluation = COCOeval(iouType="bbox")
    evaluation.eval = {"precision": -np.ones((10, 101, 1, 4, 3)), "recall": -np.ones((10, 1, 4, 3))}
    with contextlib.redirect_stdout(printed):
        evaluation.summarize()
    expected = [line.rsplit("=", 1)[0] for line in printed.getvalue().splitlines()]
    assert [line.rsplit("=", 1)[0] for line in twelve_lines(figures)] == expected
    assert twelve_lines(figures)[7].endswith("= 0.070")


def test_the_mask_of_a_box_has_the_size_of_its_image(clean_set):
    box = read_split(clean_set, "val").pictures[0].boxes[0]
    assert mask_of(box, (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH)
