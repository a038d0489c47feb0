"""Scores of maps by hand, boxes as COCO has them, and images as a network sees them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.explain.localise import Score, mask_of, paired, read_boxes, score, summary
from dense_shortcuts.experiments.explain.networks import read_network, view


def coco(path, **changes):
    content = {
        "images": [{"id": 7, "file_name": "some/a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]},
            {"image_id": 7, "category_id": 5, "bbox": [0, 0, 0, 4]},
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_boxes_are_read_by_file_name_as_corners_and_those_without_area_are_counted(tmp_path):
    found, without_area = read_boxes(coco(tmp_path / "boxes.json"))
    assert {name: [(box.category, box.corners) for box in boxes] for name, boxes in found.items()} == {
        "a.jpg": [("cat", (1, 2, 4, 6))],
        "b.jpg": [],
    }
    assert without_area == 1


@pytest.mark.parametrize(
    "annotation",
    [
        {"image_id": 9, "category_id": 3, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3]},
        {"image_id": 7, "category_id": 3},
        7,
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path, annotation):
    with pytest.raises(DenseShortcutError, match="not a whole COCO file of boxes"):
        read_boxes(coco(tmp_path / "boxes.json", annotations=[annotation]))


def test_a_mask_has_the_pixels_whose_centre_lies_in_a_box():
    mask = mask_of(np.array([[1.4, 0, 3.6, 1.6], [0, 3, 1, 4]]), 4)
    assert mask.astype(int).tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_energy_is_the_part_of_the_map_inside_and_a_hit_its_highest_point():
    cam = np.zeros((4, 4), np.float32)
    cam[0, 1], cam[3, 3] = 1.0, 0.6
    inside = mask_of(np.array([[0, 0, 2, 2]]), 4)
    assert score(cam, inside) == Score(pytest.approx(1 / 1.6), True, 0.25, False)
    assert score(cam, ~inside) == Score(pytest.approx(0.6 / 1.6), False, 0.75, False)
    assert score(np.ones((4, 4)), inside).energy == inside.mean()  # a flat map scores what chance gives


def test_the_middle_of_a_plateau_is_its_highest_point():
    cam = np.zeros((6, 6))
    cam[0:3, 0:3] = 1.0
    assert score(cam, mask_of(np.array([[1, 1, 2, 2]]), 6)).hit
    assert not score(cam, mask_of(np.array([[0, 0, 1, 1]]), 6)).hit


def test_an_empty_map_finds_nothing():
    assert score(np.zeros((4, 4)), np.ones((4, 4), bool)) == Score(0.0, False, 1.0, True)


def test_networks_are_compared_on_the_same_objects():
    first = [Score(e, hit, 0.2, False) for e, hit in [(0.1, False), (0.2, False), (0.3, True), (0.4, False)]]
    second = [Score(e, hit, 0.2, False) for e, hit in [(0.2, True), (0.4, True), (0.2, True), (0.7, False)]]
    assert summary(second) == {"n": 4, "energy": pytest.approx(0.375), "pointing": 0.75, "area": 0.2, "empty": 0}
    found = paired(first, second)
    differences = [0.1, 0.2, -0.1, 0.3]
    assert found["energy_difference"] == pytest.approx(0.125)
    assert found["standard_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(4))
    assert (found["n"], found["only_first"], found["only_second"], found["pointing_p"]) == (4, 0, 2, 0.5)
    assert 0.1 < found["energy_p"] < 0.5
    same = paired(first, first)
    assert (same["energy_difference"], same["energy_p"], same["pointing_p"]) == (0.0, None, None)
    assert paired(first[:1], second[:1])["standard_error"] is None


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "dsnet20"])
def test_a_network_sees_an_image_as_timms_transform_gives_it(photo, name):
    from timm.data import create_transform, resolve_model_data_config

    network = read_network(name)
    image = Image.open(photo(width=300, height=260))
    expected = create_transform(**resolve_model_data_config(network.model), is_training=False)(image)
    seen = view(network, image)
    torch.testing.assert_close(seen.tensor[0], expected, rtol=0, atol=1e-6)
    assert seen.picture.shape == (network.size, network.size, 3) and seen.boxes.shape == (0, 4)


def test_boxes_move_with_the_picture(tmp_path):
    network = read_network("resnet18")  # 224 of 235 (95 %), bicubic
    short = int(224 / network.crop_pct)
    pixels = np.zeros((4 * short, 8 * short, 3), np.uint8)
    pixels[500:700, 850:1050] = 255
    seen = view(network, Image.fromarray(pixels), [(850, 500, 1050, 700), (0, 0, 100, 100)])
    edge = (short - 224) / 2
    corners = np.array([850 / 4 - short / 2, 500 / 4, 1050 / 4 - short / 2, 700 / 4]) - edge
    np.testing.assert_allclose(seen.boxes[0], corners, atol=0.75)
    x0, y0, x1, y1 = seen.boxes[0].round().astype(int)
    assert (seen.picture[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] > 250).all()
    assert seen.picture[: y0 - 2].max() < 5 and seen.picture[:, : x0 - 2].max() < 5
    assert not mask_of(seen.boxes[1:], 224).any()  # the crop left it out


def test_networks_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(DenseShortcutError, match=r"neither a folder of a trained network nor a model of timm.*dsnet50"):
        read_network("dsnet5O")
    with pytest.raises(DenseShortcutError, match="no trained weights for dsnet18"):
        read_network("dsnet18", pretrained=True)
    with pytest.raises(DenseShortcutError, match=r"cannot read .*model\.json"):
        read_network(str(tmp_path))
