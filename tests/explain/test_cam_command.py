"""`dsnet cam` from images and boxes to the picture, the numbers and what is printed."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dense_shortcuts.cli import main
from dense_shortcuts.experiments.explain.cam import cam_maps
from dense_shortcuts.experiments.explain.localise import mask_of
from dense_shortcuts.experiments.explain.networks import read_network, view


def boxes_file(path, files, categories=("left", "right")):
    content = {
        "images": [{"id": i, "file_name": file.name} for i, file in enumerate(files)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
        "annotations": [{"image_id": i, "category_id": i % 2, "bbox": [4 + i, 6, 20, 18]} for i in range(len(files))],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def images(photo):
    return [photo(f"{i}.png", seed=i) for i in range(3)]


def run(*arguments) -> int:
    return main(["cam", *map(str, arguments)])


def test_two_networks_are_drawn_scored_and_compared(images, tmp_path, capsys):
    boxes, output = boxes_file(tmp_path / "boxes.json", images), tmp_path / "maps" / "cam.png"
    methods = "gradcam,layercam"
    assert run(tmp_path, "--models", "dsnet20,dsnet32", "--boxes", boxes, "--output", output, "--method", methods) == 0
    told = capsys.readouterr().out
    report = json.loads(output.with_suffix(".json").read_text())

    assert [(n["label"], n["layer"], n["trained"]) for n in report["networks"]] == [
        ("dsnet20", "layer3", False),
        ("dsnet32", "layer3", False),
    ]
    assert "dsnet20 is not trained" in told and report["target"] == "top-1" and report["images"] == 3
    assert report["command"].startswith("dsnet cam ")
    network = read_network("dsnet20")
    seen = view(network, Image.open(images[1]), [(5, 6, 25, 24)])
    scores = network.model(seen.tensor)[0]
    cam = cam_maps(network.model, seen.tensor, [int(scores.argmax())])[0]
    mask = mask_of(seen.boxes, 32)
    line = next(o for o in report["objects"] if o["file"] == str(images[1]))["networks"][0]
    assert line["scores"]["gradcam"]["energy"] == pytest.approx(cam[mask].sum() / cam.sum(), rel=1e-5)
    assert line["scores"]["gradcam"]["area"] == mask.mean()
    assert line["target"] == str(int(scores.argmax())) == line["top"][0][0] and len(line["top"]) == 5

    assert [found["method"] for found in report["localisation"]] == ["gradcam", "layercam"]
    found = report["localisation"][0]
    energies = [[o["networks"][k]["scores"]["gradcam"]["energy"] for o in report["objects"]] for k in (0, 1)]
    assert [n["energy"] for n in found["networks"]] == pytest.approx([np.mean(e) for e in energies])
    (pair,) = found["paired"]
    assert (pair["first"], pair["second"], pair["n"]) == ("dsnet20", "dsnet32", 3)
    assert pair["energy_difference"] == pytest.approx(np.mean(energies[1]) - np.mean(energies[0]))
    assert "3 objects in 3 images" in told and "dsnet32 less dsnet20 on the same 3 objects" in told
    with Image.open(output) as picture:
        assert picture.size == (5 * 230, 3 * 275)


def test_boxes_of_a_class_that_the_networks_know_are_scored_with_the_map_of_that_class(images, tmp_path):
    boxes = boxes_file(tmp_path / "boxes.json", images, categories=("17", "unknown"))
    assert run(*images, "--models", "dsnet20", "--boxes", boxes, "--output", tmp_path / "cam.png") == 0
    report = json.loads((tmp_path / "cam.json").read_text())
    assert report["target"] == "category of the boxes"
    assert [(o["category"], o["networks"][0]["target"]) for o in report["objects"]] == [("17", "17"), ("17", "17")]
    assert report["localisation"][0]["networks"][0]["n"] == 2 and report["localisation"][0]["paired"] == []


def test_a_target_and_a_layer_can_be_chosen_and_maps_need_no_boxes(images, tmp_path):
    arguments = ("--models", "dsnet20", "--target", "3", "--layer", "layer2.1", "--draw", "1")
    assert run(*images, *arguments, "--output", tmp_path / "cam.png") == 0
    report = json.loads((tmp_path / "cam.json").read_text())
    assert report["networks"][0]["layer"] == "layer2.1" and report["localisation"] == []
    assert {o["networks"][0]["target"] for o in report["objects"]} == {"3"} and len(report["objects"]) == 3
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.size == (3 * 230, 275)


def test_a_trained_folder_is_a_network_with_its_own_classes(trained, images, tmp_path):
    assert run(images[0], "--models", trained, "--output", tmp_path / "cam.png") == 0
    report = json.loads((tmp_path / "cam.json").read_text())
    assert report["networks"][0]["trained"] and report["objects"][0]["networks"][0]["target"] in map(str, range(10))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        (["broken.png"], "broken.png is not a whole image"),
        (["empty"], "there is no image to look at"),
        (["0.png", "--method", "gradcamp"], "unknown method 'gradcamp'"),
        (["0.png", "--layer", "layer7"], "no layer 'layer7'"),
        (["0.png", "--target", "cat"], "dsnet20 has no class 'cat'"),
        (["0.png", "--output", "cam.gif"], "must end in .png"),
        (["0.png", "--boxes", "other.json"], "none of the images has a box"),
        (["0.png", "--models", "dsnet2O"], "did you mean"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(images, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    boxes_file(tmp_path / "other.json", [tmp_path / "else.png", tmp_path / "more.png"])
    before = sorted(tmp_path.iterdir())
    assert run("--models", "dsnet20", *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_without_grad_cam_the_extra_is_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert run(images[0], "--models", "dsnet20", "--output", tmp_path / "cam.png") == 2
    assert "pip install 'dense-shortcuts[explain]'" in capsys.readouterr().err


def test_the_network_computes_on_the_picture_that_is_drawn(images):
    network = read_network("dsnet20")
    seen = view(network, Image.open(images[0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in (network.mean, network.std))
    pixels = (seen.tensor[0] * std + mean) * 255
    np.testing.assert_allclose(pixels.permute(1, 2, 0), seen.picture, atol=1e-3)
