"""A run repeated from its folder: bit-equal, and every difference told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.checkpoint import WEIGHTS
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.data.images import Arrays, Files
from dense_shortcuts.experiments.train.fingerprint import fingerprint, fingerprints
from dense_shortcuts.experiments.train.rerun import compared, differences, rerun
from dense_shortcuts.files import read_json, read_tensors, write_tensors

TINY = [
    *("--model=dsnet20", "--img-size=8", "--crop-padding=1", "--limit-train=64", "--limit-test=20"),
    *("--batch-size=32", "--warmup-epochs=0", "--lr=0.05", "--epochs=2", "--tracker=none"),
]
NETWORK = "stage-auto"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a finished run `a`."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["train", *TINY, "--output", str(folder), "--name", "a"]) == 0
    return folder


@pytest.fixture(autouse=True)
def run(made, tmp_path, monkeypatch) -> Path:
    """A copy of that run, in runs/a below the working folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / "a", "runs/a"))


def test_a_run_folder_says_what_the_run_depends_on(run):
    about = read_json(run / "environment.json")
    assert about["line"].startswith("dsnet train --model=dsnet20") and about["seed"] == 0
    assert about["packages"]["torch"] == torch.__version__.split("+")[0] and about["threads"] == 1
    assert set(about["git"]) == {"commit", "changed"}
    config = TrainConfig(model="dsnet20", img_size=8, limit_train=64, limit_test=20).resolved()
    assert about["data"] == fingerprints(load_data(config))


def test_a_rerun_is_bit_equal_and_says_so(run, capsys):
    assert main(["rerun", "runs/a"]) == 0
    out = capsys.readouterr().out
    assert f"{NETWORK}: bit-equal in 2 epochs' metrics and in the weights" in out
    assert "surroundings: " in out
    outcome = json.loads(Path("runs/a-rerun/rerun.json").read_text())
    assert outcome["equal"] and outcome["of"] == "runs/a"
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (run / NETWORK / name).is_file()
    ours, theirs = ((Path(f"runs/{name}") / NETWORK / WEIGHTS).read_bytes() for name in ("a", "a-rerun"))
    assert ours == theirs
    before = (Path("runs/a-rerun") / NETWORK / WEIGHTS).stat().st_mtime_ns
    assert rerun(run)[1]["equal"]  # goes on with what is there, which is finished
    assert (Path("runs/a-rerun") / NETWORK / WEIGHTS).stat().st_mtime_ns == before


def test_another_metric_or_weight_is_found_and_named(run):
    other = Path(shutil.copytree(run / NETWORK, "other"))
    assert compared(run / NETWORK, other)["equal"]
    lines = (other / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    row["train_loss"] += 0.25
    (other / "metrics.jsonl").write_text(f"{lines[0]}\n{json.dumps(row)}\n")
    found = compared(run / NETWORK, other)
    assert not found["equal"] and found["weight"] == 0.0
    assert found["metric"]["name"] == "train_loss of epoch 2"
    assert found["metric"]["difference"] == pytest.approx(0.25)

    tensors, about = read_tensors(run / NETWORK / WEIGHTS)
    tensors["fc.bias"][3] += 0.5
    other = Path(shutil.copytree(run / NETWORK, "another"))
    write_tensors(other / WEIGHTS, tensors, about)
    found = compared(run / NETWORK, other)
    assert not found["equal"] and found["weight"] == pytest.approx(0.5) and found["metric"]["difference"] == 0.0


def test_other_surroundings_are_told_one_by_one():
    before = {"python": "3.11", "packages": {"torch": "2.9", "timm": "1"}, "data": {"train": "x"}, "threads": 1}
    now = {"python": "3.11", "packages": {"torch": "2.14", "timm": "1"}, "data": {"train": "y"}, "threads": 2}
    now["git"] = {"commit": "abc", "changed": True}
    assert differences(before, now) == [
        "threads was 1 and is 2",
        "packages: torch was 2.9 and is 2.14",
        "data: train was x and is y",
        "commit of this package was not recorded and is abc",
        "the package's source had changes that were not committed, which nobody recorded",
    ]
    assert differences(before, before) == []


def test_a_folder_that_cannot_be_repeated_is_told(run):
    with pytest.raises(DenseShortcutError, match=r"nowhere is no run to repeat, for it has no config\.yaml"):
        rerun(Path("nowhere"))
    (shutil.copytree(run, Path("runs/other")) / "config.yaml").write_text((run / "config.yaml").read_text() + "lr: 9\n")
    with pytest.raises(DenseShortcutError, match="runs/other exists already"):
        rerun(run, name="other")
    (run / NETWORK / "model.json").unlink()
    with pytest.raises(DenseShortcutError, match="is not finished: go on with `dsnet train --resume runs/a` first"):
        rerun(run)


# Fingerprints ---------------------------------------------------------------------------------------------------------


def test_every_pixel_and_label_of_a_set_in_memory_counts():
    pixels, labels = np.zeros((3, 2, 2, 3), np.uint8), np.arange(3)
    first = fingerprint(Arrays(pixels, labels))
    assert first == fingerprint(Arrays(pixels.copy(), labels.astype(np.int32)))
    for place in ((0, 0, 0, 0), (2, 1, 1, 2)):
        changed = pixels.copy()
        changed[place] = 1
        assert fingerprint(Arrays(changed, labels)) != first
    assert fingerprint(Arrays(pixels, labels[::-1])) != first
    assert fingerprint(Arrays(pixels.reshape(3, 4, 1, 3), labels)) != first


def test_names_sizes_labels_and_pixels_of_files_count_and_the_folder_they_lie_in_does_not(tmp_path):
    def files(root: str, grey: int = 0, name: str = "0.bmp", label: int = 0) -> Files:
        (tmp_path / root / "ants").mkdir(parents=True)
        samples = []
        for each, value in ((name, grey), ("1.bmp", 7)):
            path = tmp_path / root / "ants" / each
            Image.new("RGB", (4, 4), (value,) * 3).save(path)
            samples.append((str(path), label))
        return Files(samples)

    first = fingerprint(files("here"))
    assert fingerprint(files("there")) == first
    assert fingerprint(files("grey", grey=1)) != first
    assert fingerprint(files("named", name="2.bmp")) != first
    assert fingerprint(files("labelled", label=1)) != first
