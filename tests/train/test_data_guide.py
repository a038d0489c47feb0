"""docs/data.md holds: its commands run at a tiny size on generated images in the layouts that it names."""

import json
import re
import shlex
from pathlib import Path

import pytest
from test_data_sources import write_images
from train_helpers import number_image, png, write_shard

from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.config import DATA_DEFAULTS, TrainConfig
from dense_shortcuts.experiments.train.loop import read_metrics

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("dsnet")]
TINY = [
    *("--limit-train=4", "--limit-test=4", "--batch-size=4", "--epochs=1", "--warmup-epochs=0"),
    *("--img-size=16", "--workers=0"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Generated images in each layout."""
    folder = tmp_path_factory.mktemp("guide")
    images, labels = [png(i, 32) for i in range(8)], [0, 1] * 4
    for part in ("train", "test"):
        write_images(folder / "cifar10", part, images, labels, image="img")
        write_images(folder / "cifar100", part, images, labels, image="img", label="fine_label")
    for part in ("train", "val"):
        for label in ("ants", "bees"):
            (folder / "imagefolder" / part / label).mkdir(parents=True)
            for i in range(4):
                (folder / "imagefolder" / part / label / f"{i}.png").write_bytes(png(i, 20))
    tiny = folder / "tiny-imagenet" / "tiny-imagenet-200"
    for label in ("n01", "n02"):
        (tiny / "train" / label / "images").mkdir(parents=True)
        for i in range(4):
            (tiny / "train" / label / "images" / f"{label}_{i}.JPEG").write_bytes(png(i, 64))
    (tiny / "val" / "images").mkdir(parents=True)
    (tiny / "val" / "images" / "val_0.JPEG").write_bytes(png(9, 64))
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    write_images(folder / "parquet", "train", images, labels, classes="ab")
    write_images(folder / "parquet", "validation", images, labels, classes="ab")
    for shard in range(2):
        write_shard(
            folder / "webdataset" / f"imagenet-train-{shard}.tar",
            [(f"{shard}{i}", number_image(i, 20), str(i % 2)) for i in range(4)],
        )
    write_shard(
        folder / "webdataset" / "imagenet-validation-0.tar", [(f"{i}", number_image(i, 20), "1") for i in range(3)]
    )
    (folder / "webdataset" / "classes.txt").write_text("ants\nbees\n")
    (folder / "webdataset" / "_info.json").write_text(json.dumps({"splits": {"train": {"num_samples": 8}}}))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The cache of `datasets` in a folder of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_runs(command, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    arguments = shlex.split(re.sub(r" --model \S+", "", command))[1:]
    assert main([*arguments, *TINY, "--output", str(tmp_path), "--name", "a"]) == 0, capsys.readouterr().err
    assert len(read_metrics(tmp_path / "a" / "stage-auto" / "metrics.jsonl")) == 1


def test_every_source_has_a_row_and_a_command():
    rows = set(re.findall(r"^\| `(\w[\w-]*)` \|", GUIDE, re.MULTILINE))
    assert rows == set(DATA_DEFAULTS)
    assert {re.search(r"--data (\S+)", command)[1] for command in COMMANDS} == rows - {"fashion", "digits"}


def test_the_stated_defaults_are_those_of_the_configuration():
    config = TrainConfig()
    assert f"`--shuffle-buffer` ones\n({config.shuffle_buffer:,})" in GUIDE
    assert f"(a share, {config.max_broken}; one is always allowed)" in GUIDE
