"""Data in COCO format: layouts, faults, and what training and scoring get of each image."""

import json
import shutil

import numpy as np
import pytest
import torch
from detect_helpers import CATEGORIES, HEIGHT, WIDTH, annotation, read_json, write_json
from PIL import Image

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.detect import data as d
from dense_shortcuts.experiments.detect.data import read_split, trainable, truth


def told(faults: dict) -> dict[str, int]:
    return {kind: entry[0] for kind, entry in faults.items()}


def test_every_fault_is_counted_once_with_an_example(faulty_set):
    coco = read_split(faulty_set, "train")
    _, faults = trainable(coco, masks=False, empty_images=False)
    assert told(faults) == {
        d.NO_AREA: 3,
        d.OUTSIDE: 2,
        d.FAR_OUTSIDE: 1,
        d.UNKNOWN_CATEGORY: 1,
        d.UNKNOWN_IMAGE: 1,
        d.MISSING: 1,
        d.EMPTY: 2,
    }
    assert faults[d.UNKNOWN_CATEGORY][1] == "annotation 2007 (category 99)"
    assert faults[d.MISSING][1] == "000151.png"
    assert faults[d.EMPTY][1:] == ["000150.png", "000152.png"]
    assert told(coco.faults).keys() == told(faults).keys() - {d.EMPTY}  # training's own fault is not scoring's
    line = next(line for line in d.report(faults, "train") if "wholly outside" in line)
    assert line.startswith("train: 1 boxes that lie wholly outside") and line.endswith(
        "annotation 2006 (200, 10, 20, 20)"
    )


def test_a_report_names_three_examples_of_many():
    faults = d.Faults()
    for number in range(5):
        faults.add("things", number)
    assert d.report(faults.found, "val") == ["val: 5 things - 0, 1, 2, ..."]


def test_no_fault_is_told_of_a_clean_set(clean_set):
    coco = read_split(clean_set, "train")
    pictures, faults = trainable(coco, masks=True, empty_images=False)
    assert coco.faults == {} and faults == {} and len(pictures) == 8
    assert coco.categories == ((1, "red"), (3, "green"), (7, "blue"))


def samples(folder, *, masks: bool = False, empty_images: bool = False, **augment: bool) -> dict[int, dict]:
    pictures, _ = trainable(read_split(folder, "train"), masks=masks, empty_images=empty_images)
    settings = {"flip": False, "photometric": False, "iou_crop": False} | augment
    images = d.TrainImages(pictures, d.train_transform(**settings), 0, masks=masks)
    return {p.id: {"image": images[0, k][0], **images[0, k][1]} for k, p in enumerate(pictures)}


def test_training_gets_clipped_boxes_and_none_without_area_or_of_a_crowd(faulty_set):
    found = samples(faulty_set)
    assert sorted(found) == list(range(100, 108))  # not the empty, the missing and the one without a usable box
    boxes = found[100]["boxes"].tolist()
    assert len(boxes) == 4 and boxes[3] == [70, 40, WIDTH, HEIGHT]  # clipped; two others of this image are gone
    assert found[100]["labels"].tolist() == [1, 2, 3, 2]  # ids 1, 3, 7 are classes 1, 2, 3
    assert found[101]["boxes"].tolist()[-1] == [0, 0, 15, 20]
    assert len(found[102]["boxes"]) == 3  # the crowd is left out
    for sample in found.values():
        x1, y1, x2, y2 = sample["boxes"].unbind(1)
        assert (x2 - x1 >= 1).all() and (y2 - y1 >= 1).all() and (x2 <= WIDTH).all() and (y2 <= HEIGHT).all()
        assert sample["image"].dtype == torch.float32 and sample["image"].min() >= 0 and sample["image"].max() <= 1


def test_images_without_boxes_are_trained_on_where_asked(faulty_set):
    found = samples(faulty_set, empty_images=True)
    assert found.keys() >= {150, 152} and 151 not in found
    assert found[150]["boxes"].shape == (0, 4) and found[152]["labels"].shape == (0,)


def test_a_flip_moves_boxes_and_masks_with_the_image(clean_set):
    plain, flipped = samples(clean_set, masks=True), samples(clean_set, masks=True, flip=True)
    moved = [i for i in plain if not torch.equal(plain[i]["image"], flipped[i]["image"])]
    assert 0 < len(moved) < len(plain)
    for i in moved:
        assert torch.equal(flipped[i]["image"], plain[i]["image"].flip(-1))
        x1, y1, x2, y2 = plain[i]["boxes"].unbind(1)
        assert torch.equal(flipped[i]["boxes"], torch.stack([WIDTH - x2, y1, WIDTH - x1, y2], 1))
        assert torch.equal(flipped[i]["masks"], plain[i]["masks"].flip(-1))


def test_augmentation_follows_from_seed_epoch_and_place(clean_set):
    pictures = read_split(clean_set, "train").pictures
    transform = d.train_transform(flip=True, photometric=True, iou_crop=True)
    one, two = (d.TrainImages(pictures, transform, seed, masks=False) for seed in (0, 0))
    other = d.TrainImages(pictures, transform, 1, masks=False)
    again = [two[epoch, 3][0] for epoch in (0, 1)]
    torch.rand(3)
    assert torch.equal(one[0, 3][0], again[0]) and torch.equal(one[1, 3][0], again[1])
    assert not torch.equal(again[0], again[1]) or not torch.equal(other[0, 3][0], again[0])


def test_scoring_gets_boxes_as_they_are_written(faulty_set):
    coco = read_split(faulty_set, "val")
    by_id = {picture.id: picture for picture in coco.pictures}
    assert len(coco.pictures) == 9 and by_id[551].path is None
    found = truth(by_id[500])
    assert found["boxes"].tolist()[3:] == [[30, 30, 0, 12], [70, 40, 40, 40], [200, 10, 20, 20]]
    assert truth(by_id[502])["iscrowd"].tolist() == [0, 0, 0, 1]
    assert truth(by_id[550])["boxes"].shape == (0, 4)


def test_masks_are_drawn_as_cocos_tools_do(faulty_set):
    from pycocotools.coco import COCO

    theirs = COCO(str(faulty_set / "annotations" / "instances_train2017.json"))
    coco = read_split(faulty_set, "train")
    compared = 0
    for picture in coco.pictures:
        known = [a for a in theirs.imgToAnns[picture.id] if a["category_id"] in (1, 3, 7)]
        for box, own in zip(picture.boxes, known, strict=True):
            if d.has_mask(box):
                assert np.array_equal(d.mask_of(box, (HEIGHT, WIDTH)), theirs.annToMask(own))
                compared += 1
    assert compared == 29  # 24 clean ones, 4 with odd boxes, a crowd as a run-length code
    pictures, faults = trainable(coco, masks=True, empty_images=False)
    assert faults[d.NO_MASK][0] == 3 and len(pictures) == 8


def test_data_without_masks_is_refused_for_mask_rcnn(bccd):
    with pytest.raises(DenseShortcutError, match="has none: take fasterrcnn"):
        trainable(read_split(bccd, "train"), masks=True, empty_images=False)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2014.json", "{}2014"),
        ("annotations/instances_{}.json", "{}"),
        ("instances_{}.json", "{}"),
    ],
)
def test_cocos_layouts_are_found(annotations, images, clean_set, tmp_path):
    for split in ("train", "val"):
        target = tmp_path / annotations.format(split)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(clean_set / "annotations" / f"instances_{split}2017.json", target)
        shutil.copytree(clean_set / f"{split}2017", tmp_path / images.format(split))
    assert [len(read_split(tmp_path, split).pictures) for split in ("train", "val")] == [8, 6]


def test_a_limit_takes_a_fixed_sample_and_its_annotations_alone(clean_set):
    few, same = (read_split(clean_set, "train", 3) for _ in range(2))
    assert few == same and len(few.pictures) == 3 and few.faults == {}
    assert all(len(picture.boxes) == 3 for picture in few.pictures)


def test_bccd_is_read_with_its_boxes_without_area(bccd):
    for split, images, boxes in (("train", 205, 2805), ("val", 87, 1138)):
        coco = read_split(bccd, split)
        assert len(coco.pictures) == images and sum(len(p.boxes) for p in coco.pictures) == boxes
        assert coco.names == ["RBC", "WBC", "Platelets"] and told(coco.faults) == {d.NO_AREA: 1}


def one_image(folder, annotations, **image):
    images = [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT} | image]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "train" / "1.png")
    return write_json(folder / "instances_train.json", images, annotations)


@pytest.mark.parametrize(
    "bbox", [None, [1, 2, 3], [1, 2, "3", 4], [1, 2, float("nan"), 4], [1, 2, float("inf"), 4], {"x": 1}]
)
def test_a_bbox_that_is_no_box_is_left_out_and_told(bbox, tmp_path):
    good = annotation(1, 1, 1, [1, 1, 5, 5])
    one_image(tmp_path, [good, good | {"id": 2, "bbox": bbox}])
    coco = read_split(tmp_path, "train")
    assert told(coco.faults) == {d.BROKEN: 1} and len(coco.pictures[0].boxes) == 1


def test_area_and_iscrowd_may_be_left_out(tmp_path):
    bare = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 6]}
    one_image(tmp_path, [bare])
    (box,) = read_split(tmp_path, "train").pictures[0].boxes
    assert (box.area, box.crowd, box.label) == (30.0, False, 2)


def test_boxes_are_not_judged_where_the_images_size_is_not_told(tmp_path):
    one_image(tmp_path, [annotation(1, 1, 1, [300, 1, 5, 5])], width=None)
    assert read_split(tmp_path, "train").faults == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not whole JSON"),
        ("[]", "is not in COCO format"),
        (json.dumps({"images": [], "annotations": []}), "must hold the lists images, annotations, categories"),
        (json.dumps({"images": [], "annotations": [], "categories": CATEGORIES}), "lists no images"),
        (json.dumps({"images": [{"id": 1}], "annotations": [], "categories": CATEGORIES}), "without id, name or file"),
    ],
)
def test_a_broken_annotation_file_is_one_sentence(text, message, tmp_path):
    path = one_image(tmp_path, [])
    path.write_text(text)
    with pytest.raises(DenseShortcutError, match=message):
        read_split(tmp_path, "train")


def test_a_folder_without_the_data_is_one_sentence(tmp_path):
    with pytest.raises(DenseShortcutError, match="has no val split in COCO's layout: it must have annotations/inst"):
        read_split(tmp_path, "val")
    with pytest.raises(DenseShortcutError, match="is not a folder"):
        read_split(tmp_path / "nowhere", "val")
    one_image(tmp_path, [annotation(1, 1, 1, [1, 1, 5, 5])], file_name="other.png")
    with pytest.raises(DenseShortcutError, match="has none of the images"):
        read_split(tmp_path, "train")


def test_a_set_without_a_usable_box_is_refused(tmp_path):
    one_image(tmp_path, [annotation(1, 1, 1, [1, 1, 0, 5])])
    with pytest.raises(DenseShortcutError, match="no training image has a box"):
        trainable(read_split(tmp_path, "train"), masks=False, empty_images=False)


def test_a_broken_image_is_named(clean_set, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((clean_set / "train2017" / "000100.png").read_bytes()[:200])
    with pytest.raises(DenseShortcutError, match=r"broken\.png is not a whole image"):
        d.read_image(broken)


def test_the_written_set_has_the_faults_it_should(faulty_set):
    content = read_json(faulty_set / "annotations" / "instances_val2017.json")
    assert len(content["images"]) == 9 and len(content["annotations"]) == 18 + 10
