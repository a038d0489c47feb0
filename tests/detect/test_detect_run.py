"""`dsnet detect`: a run's folder, scoring, resuming, drawing, comparing, and what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from detect_helpers import CATEGORIES, HEIGHT, WIDTH, read_json, tiny_backbone, write_json, write_set  # noqa: F401
from PIL import Image
from safetensors.torch import save_file

import dense_shortcuts as ds
from dense_shortcuts.cli import main, parse
from dense_shortcuts.experiments.detect import loop
from dense_shortcuts.experiments.detect.config import DetectConfig
from dense_shortcuts.experiments.detect.data import read_split
from dense_shortcuts.experiments.detect.figures import TWELVE
from dense_shortcuts.experiments.detect.loop import make_schedule
from dense_shortcuts.experiments.detect.network import build_detector
from dense_shortcuts.experiments.train.config import read_fields
from dense_shortcuts.experiments.train.loop import read_metrics
from dense_shortcuts.experiments.train.rerun import unclocked
from dense_shortcuts.files import read_tensors

DETECTORS = ("fasterrcnn", "retinanet", "fcos", "maskrcnn")
TINY = [
    *("--model=tiny_backbone", "--img-size=64", "--fpn-channels=32", "--batch-size=4", "--epochs=2", "--workers=0"),
    *("--warmup-steps=2", "--lr=0.02", "--sched=cosine"),
]
LEARNS = [
    *TINY,
    "--detector=fcos",
    "--fpn-channels=64",
    "--epochs=25",
    "--eval-every=25",
    "--warmup-steps=5",
    "--lr=0.03",
    "--clip-grad=10",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENSE_SHORTCUTS_DATA", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory, faulty_set) -> Path:
    """A finished run on the faulty set, long enough to find some of its boxes."""
    folder = tmp_path_factory.mktemp("made")
    where = ["--output", str(folder), "--name", "run", "--data-dir", str(faulty_set)]
    assert main(["detect", "train", *LEARNS, *where]) == 0
    return folder / "run"


def refused(arguments: list[str], capsys) -> str:
    """The sentence of a command that must end with code 2 and leave everything as it was."""
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before
    assert error.startswith("dsnet: error: ") and error.count("\n") == 1 and error.endswith(".\n")
    return error


@pytest.mark.parametrize("detector", DETECTORS)
def test_each_detector_takes_a_step_on_images_of_different_sizes(detector):
    config = DetectConfig(detector=detector, model="tiny_backbone", img_size=(64,), fpn_channels=64)
    model = build_detector(config, 3).train()
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5.0, 40.0, 45.0]]),
            "labels": torch.tensor([3]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    targets[1] = {key: value[:0] for key, value in targets[1].items()}  # an image without boxes
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    assert any("shortcut" in name for name, _ in model.named_parameters())
    found = model.eval()(images)
    assert [each["boxes"].shape[1] for each in found] == [4, 4] and ("masks" in found[0]) == (detector == "maskrcnn")
    levels = model.backbone(torch.rand(1, 3, 128, 128))
    assert [128 / m.shape[-1] for m in levels.values()] == list(model.backbone.strides)


def test_the_twins_share_every_weight_but_the_shortcuts():
    settings = {"model": "tiny_backbone", "img_size": (64,), "fpn_channels": 64, "detector": "fcos"}
    dense, host = (build_detector(DetectConfig(**settings, aggregate=a), 3).state_dict() for a in ("stage", "identity"))
    assert {name for name in dense if "shortcut" not in name} == host.keys()
    assert all(torch.equal(dense[name], host[name]) for name in host)


def test_images_are_normalised_with_the_backbones_own_mean(made):
    card = read_json(made / "model.json")
    assert card["mean"] == [0.4, 0.5, 0.6] and card["std"] == [0.2, 0.3, 0.4]
    assert card["categories"] == CATEGORIES


def test_a_run_leaves_figures_curves_configuration_metrics_and_checkpoint(made):
    assert {p.name for p in made.iterdir()} == {
        *("config.yaml", "environment.json", "data.json", "metrics.jsonl", "figures.json", "curves.png"),
        *("model.safetensors", "model.json", "state.safetensors"),
    }
    rows = read_metrics(made / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == list(range(1, 26))
    parts = ("classification", "bbox_regression", "bbox_ctrness")
    for row in rows:
        assert row["train_loss"] == pytest.approx(sum(row[f"train_{name}"] for name in parts), rel=1e-4)
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
    figures = read_json(made / "figures.json")
    assert [name for name in figures if name != "classes"] == [name for name, *_ in TWELVE]
    assert {name: rows[-1][f"val_{name}"] for name in figures} == figures and "val_AP" not in rows[0]
    assert figures["AP50"] > 0.1
    assert read_fields(made / "config.yaml", DetectConfig).name == "run"
    environment = read_json(made / "environment.json")
    assert environment["command"] == "detect train" and environment["packages"]["torch"]
    faults = read_json(made / "data.json")
    assert any("file is missing" in kind for kind in faults["train"]) and faults["val"]
    with Image.open(made / "curves.png") as image:
        assert image.width > 500


def test_faults_are_told_once(faulty_set, capsys):
    few = [*TINY, "--epochs=1", "--detector=retinanet", "--data-dir", str(faulty_set)]
    assert main(["detect", "train", *few, "--name", "a"]) == 0
    out = capsys.readouterr().out
    assert out.count("train: 1 images whose file is missing") == 1 and out.count("val: 1 images whose file") == 1
    assert "train: 3 boxes without area" in out and "annotation 2007 (category 99)" in out
    assert " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = " in out
    assert "AP by class: red " in out


def test_eval_gives_the_figures_of_the_end_of_training(made, capsys):
    wanted = read_json(made / "figures.json")
    for checkpoint in (made, made / "model.safetensors"):
        assert main(["detect", "eval", str(checkpoint), "--output", "e.json"]) == 0
        found = read_json(Path("e.json"))
        assert {name: found[name] for name in wanted} == wanted and found["images"] == 9
    out = capsys.readouterr().out
    assert f"maxDets=100 ] = {wanted['AP']:0.3f}" in out
    assert main(["detect", "eval", str(made), "--split", "train", "--limit", "3", "--output", "t.json"]) == 0
    assert read_json(Path("t.json"))["images"] == 3


def test_an_interrupted_run_resumes_to_the_same_result(faulty_set, monkeypatch, capsys):
    few = [*TINY, "--detector=fcos", "--fpn-channels=64", "--eval-every=2", "--data-dir", str(faulty_set)]
    assert main(["detect", "train", *few, "--name", "whole"]) == 0
    epochs = []

    def cut(*arguments, **options):
        epochs.append(arguments[2])
        if arguments[2] == 1 and len(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments, **options)

    train_epoch = loop.train_epoch
    monkeypatch.setattr(loop, "train_epoch", cut)
    with pytest.raises(KeyboardInterrupt) as caught:
        parse(["detect", "train", *few, "--name", "cut"]).run("")
    assert caught.value.folder == Path("runs/cut") and not Path("runs/cut/model.json").exists()
    assert main(["detect", "train", "--resume", "runs/cut"]) == 0
    assert epochs == [0, 1, 1]
    runs = (Path("runs/cut"), Path("runs/whole"))
    ours, theirs = (unclocked(read_metrics(run / "metrics.jsonl")) for run in runs)
    assert ours == theirs
    ours, theirs = (read_tensors(run / "model.safetensors")[0] for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    assert main(["detect", "train", "--resume", "runs/cut"]) == 0  # finished: prints and trains nothing again
    assert epochs == [0, 1, 1]
    error = refused(["detect", "compare", "--resume", "runs/cut"], capsys)
    assert "go on with `dsnet detect train --resume " in error


def test_predict_draws_boxes_and_writes_results(made, clean_set, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    shutil.copy(clean_set / "val2017" / "000500.png", tmp_path / "own" / "000500.png")
    (tmp_path / "own" / "broken.png").write_bytes(b"no image")
    (tmp_path / "own" / "notes.txt").write_text("not asked for")
    sources = [str(tmp_path / "own"), str(clean_set / "val2017" / "000500.png")]
    assert main(["detect", "predict", str(made), *sources, "--threshold", "0.0", "--output", "drawn"]) == 0
    error = capsys.readouterr().err
    assert error.count("passed over") == 1 and "broken.png is not a whole image" in error
    assert sorted(p.name for p in Path("drawn").iterdir()) == ["000500-2.png", "000500.png", "detections.json"]
    results = read_json(Path("drawn/detections.json"))
    assert results and {r["category_id"] for r in results} <= {1, 3, 7}
    assert all(0 <= r["score"] <= 1 and r["bbox"][2] >= 0 for r in results)
    with Image.open("drawn/000500.png") as drawn, Image.open(clean_set / "val2017" / "000500.png") as image:
        assert drawn.size == image.size == (WIDTH, HEIGHT) and drawn.convert("RGB").tobytes() != image.tobytes()
    assert main(["detect", "predict", str(made), sources[1], "--threshold", "1.0", "--output", "none"]) == 0
    assert "nothing -> none/000500.png" in capsys.readouterr().out
    with Image.open("none/000500.png") as drawn, Image.open(sources[1]) as image:
        assert drawn.tobytes() == image.tobytes()


def test_mask_rcnn_trains_scores_and_draws_masks(clean_set, capsys):
    where = ["--data-dir", str(clean_set), "--name", "masks", "--epochs=1", "--limit-train=4", "--limit-val=2"]
    assert main(["detect", "train", *TINY, *where, "--detector", "maskrcnn"]) == 0
    figures = read_json(Path("runs/masks/figures.json"))
    assert {f"segm_{name}" for name, *_ in TWELVE} < figures.keys()
    assert "masks:" in capsys.readouterr().out
    assert main(["detect", "eval", "runs/masks"]) == 0
    assert {k: v for k, v in read_json(Path("runs/masks/eval-val.json")).items() if k != "images"} == figures
    image = str(clean_set / "val2017" / "000500.png")
    assert main(["detect", "predict", "runs/masks", image, "--threshold", "0.0"]) == 0
    assert Path("detections/000500.png").is_file()


def test_compare_trains_both_twins_with_every_seed_and_tabulates(clean_set, capsys):
    tiny = [
        *TINY,
        "--epochs=1",
        "--limit-train=4",
        "--limit-val=2",
        "--data-dir",
        str(clean_set),
        "--detector=fcos",
        "--fpn-channels=64",
    ]
    assert main(["detect", "compare", *tiny, "--seeds", "3", "5", "--name", "twins"]) == 0
    table = Path("runs/twins/table.md").read_text()
    lines = table.splitlines()
    assert (
        len(lines) == 8 and lines[2].startswith("| identity | AP | ") and lines[5].startswith("| stage-group | AP | ")
    )
    assert "seeds 3, 5" in lines[0] and table in capsys.readouterr().out
    for seed in (3, 5):
        for name in ("identity", "stage-group"):
            own = read_fields(Path(f"runs/twins/seed{seed}/{name}/config.yaml"), DetectConfig)
            assert own.seed == seed and own.aggregate == name.split("-")[0]
    stamps = [p.stat().st_mtime_ns for p in sorted(Path("runs/twins").rglob("*.safetensors"))]
    assert main(["detect", "compare", "--resume", "runs/twins"]) == 0
    assert [p.stat().st_mtime_ns for p in sorted(Path("runs/twins").rglob("*.safetensors"))] == stamps


def test_pretrained_weights_from_a_file_are_frozen_and_told(clean_set, capsys):
    torch.manual_seed(9)
    host = timm.create_model("tiny_backbone")
    save_file(host.state_dict(), "host.safetensors")
    own = ["--keep-identity", "--backbone-weights", "host.safetensors", "--frozen-stages", "1"]
    arguments = [
        *TINY,
        *own,
        "--detector=fcos",
        "--fpn-channels=64",
        "--norm-eval",
        "--sync-bn",
        "--data-dir",
        str(clean_set),
        "--name",
        "f",
    ]
    assert main(["detect", "train", *arguments, "--epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "backbone: 126 tensors loaded from" in out and "18 tensors are frozen" in out
    assert "stay trainable: layer1.shortcut.weights.0" in out
    trained = read_tensors(Path("runs/f/model.safetensors"))[0]
    for name, value in host.state_dict().items():
        if name.startswith(("conv1", "bn1", "layer1")) or "running" in name:
            assert torch.equal(trained[f"backbone.body.features.{name}"], value), name
    assert not torch.equal(trained["backbone.body.features.layer2.0.conv1.weight"], host.layer2[0].conv1.weight)
    assert trained["backbone.body.features.layer1.shortcut.weights.1"].abs().sum() > 0  # began at zero


def test_a_loss_that_is_not_finite_ends_the_run(clean_set, capsys):
    arguments = ["detect", "train", *TINY, "--lr=1e30", "--warmup-steps=0", "--data-dir", str(clean_set), "--name", "a"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "dsnet: error: the loss became" in error and "lower --lr" in error and error.count("\n") == 1


def test_the_learning_rate_rises_and_falls_by_steps():
    parameter = torch.nn.Parameter(torch.zeros(1))

    def rates(**changes) -> list[float]:
        config = DetectConfig(lr=1.0, epochs=4, warmup_steps=5, **changes)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = make_schedule(config, optimizer, 10)
        found = []
        for step in range(40):
            schedule.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    cuts = rates(sched="multistep", milestones=(2, 3), decay_rate=0.1)
    assert cuts[0] == pytest.approx(0.001) and cuts[5] == 1.0 and cuts[19] == 1.0
    assert cuts[20] == pytest.approx(0.1) and cuts[30] == pytest.approx(0.01)
    cosine = rates(sched="cosine")
    assert all(a < b for a, b in pairwise(cosine[:6])) and cosine[39] < 0.01
    assert all(a > b for a, b in pairwise(cosine[5:]))


def test_a_recipe_gives_the_defaults_and_flags_have_the_last_word():
    Path("r.yaml").write_text("detector: fcos\nimg_size: [96, 128]\nlr: 1e-3\n")
    config = parse(["detect", "train", "--recipe", "r.yaml", "--epochs", "3"]).config
    assert (config.detector, config.img_size, config.lr, config.epochs) == ("fcos", (96, 128), 1e-3, 3)
    assert parse(["detect", "compare", "--recipe", "r.yaml", "--seeds", "7"]).config.detector == "fcos"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data-dir DIR"),
        (["--data-dir", "nowhere"], "is not a folder"),
        (["--data-dir", "."], "has no train split in COCO's layout"),
        (["--data-dir", "SET", "--model", "tiny_resnot"], "unknown model 'tiny_resnot'"),
        (["--data-dir", "SET", "--batch-size", "20"], "8 training images are fewer than one batch"),
        (["--data-dir", "SET", "--out-indices", "9"], "has the levels 0 to 4"),
        (["--data-dir", "SET", "--frozen-stages", "7"], "is more than the 4 stages"),
        (["--data-dir", "SET", "--backbone-weights", "none.safetensors"], "none.safetensors does not exist"),
        (["--data-dir", "SET", "--pretrained"], "there are no pretrained weights of tiny_backbone"),
        (["--data-dir", "SET", "--opt", "sgdx"], "--opt 'sgdx'"),
        (["--data-dir", "SET", "--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--detector", "fcos", "--fpn-channels", "32"], "does not suit fcos"),
        (["--detector", "fcos", "--fpn-channels", "80"], "does not suit fcos"),
        (["--img-size", "8"], "--img-size must be"),
        (["--lr", "0"], "--lr is 0.0: it must be above 0"),
        (["--sched", "multistep", "--milestones"], "needs --milestones"),
        (["--name", "a/b"], "not a plain folder name"),
        (["--recipe", "missing.yaml"], "missing.yaml is no file and no recipe"),
        (["--resume", "nowhere"], "give no other flag beside it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_with_code_2_and_leaves_nothing(arguments, message, clean_set, capsys):
    arguments = [str(clean_set) if argument == "SET" else argument for argument in arguments]
    assert message in refused(["detect", "train", *TINY, *arguments], capsys)


def test_a_bad_command_or_flag_is_one_sentence_that_names_the_commands_own_help(capsys):
    assert "`dsnet detect train --help` lists" in refused(["detect", "train", "--epoch", "3"], capsys)
    assert "required: COMMAND: `dsnet detect --help` lists what there is" in refused(["detect"], capsys)
    assert "nowhere is no run to resume" in refused(["detect", "train", "--resume", "nowhere"], capsys)
    assert "nowhere is no checkpoint" in refused(["detect", "eval", "nowhere"], capsys)
    Image.new("RGB", (8, 8)).save("image.png")
    assert "nowhere is no checkpoint" in refused(["detect", "predict", "nowhere", "image.png"], capsys)
    with pytest.raises(SystemExit):
        main(["detect", "train", "--help"])
    assert "--frozen-stages" in capsys.readouterr().out


def test_predict_refuses_paths_without_images(made, capsys):
    Path("empty").mkdir()
    Path("bad.png").write_bytes(b"x")
    assert "empty holds no image" in refused(["detect", "predict", str(made), "empty"], capsys)
    assert "nowhere.png does not exist" in refused(["detect", "predict", str(made), "nowhere.png"], capsys)
    assert "--threshold is 2.0" in refused(["detect", "predict", str(made), "bad.png", "--threshold", "2"], capsys)
    assert main(["detect", "predict", str(made), "bad.png"]) == 2
    assert "not one of the files is an image" in capsys.readouterr().err


def test_data_with_other_categories_is_refused(made, clean_set, tmp_path, capsys):
    other = write_set(tmp_path / "other", train=4, val=2)
    path = other / "annotations" / "instances_val2017.json"
    content = read_json(path)
    write_json(path, content["images"], content["annotations"], [*CATEGORIES[:2], {"id": 7, "name": "violet"}])
    assert "of the same categories" in refused(["detect", "eval", str(made), "--data-dir", str(other)], capsys)
    error = refused(["detect", "train", *TINY, "--data-dir", str(other)], capsys)
    assert "the splits differ in the categories 7 blue, 7 violet" in error


def test_a_missing_library_is_named_with_its_extra(clean_set, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    arguments = ["detect", "train", *TINY, "--data-dir", str(clean_set)]
    assert "pip install 'dense-shortcuts[detect]'" in refused(arguments, capsys)


def test_a_checkpoint_of_another_run_is_refused(made, tmp_path, capsys):
    copied = Path(shutil.copytree(made, tmp_path / "copied"))
    config = (copied / "config.yaml").read_text().replace("aggregate: stage", "aggregate: identity")
    (copied / "config.yaml").write_text(config)
    assert "weights are of another network" in refused(["detect", "eval", str(copied)], capsys)
    (copied / "model.json").write_text(json.dumps({}))
    assert "lacks what a detector is built from" in refused(["detect", "eval", str(copied)], capsys)


def test_the_real_bccd_is_trained_on(bccd, capsys):
    few = ["--limit-train=4", "--limit-val=2", "--epochs=1", "--detector=fcos", "--fpn-channels=64", "--name", "cells"]
    assert main(["detect", "train", *TINY, *few, "--data-dir", str(bccd)]) == 0
    assert read_json(Path("runs/cells/figures.json"))["classes"].keys() == {"RBC", "WBC", "Platelets"}
    assert read_split(bccd, "val", 2).names == ["RBC", "WBC", "Platelets"]
    assert ds.__version__ == read_json(Path("runs/cells/model.json"))["dense_shortcuts"]
