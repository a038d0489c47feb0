"""A broken image never ends a run: it is told of once by name, replaced alike every time, and counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_sources import write_images
from torch.utils.data import DataLoader
from train_helpers import number_image, numbers_in, png, write_shard

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import BrokenImage, load_data, make_loader
from dense_shortcuts.experiments.train.data.broken import BrokenImages
from dense_shortcuts.experiments.train.data.stream import StreamShare
from dense_shortcuts.experiments.train.loop import batches, read_metrics
from dense_shortcuts.experiments.train.rerun import unclocked


@pytest.fixture
def numbered(tmp_path):
    """A folder of two classes with ten training images each, which say their number, and two test images each."""
    folder = tmp_path / "numbered"
    for label, name in enumerate(("ants", "bees")):
        for part, count in (("train", 10), ("val", 2)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                (folder / part / name / f"{i}.png").write_bytes(number_image(10 * label + i))
    return folder


def settings(folder: Path, **more) -> TrainConfig:
    known = {"data": "imagefolder", "data_dir": str(folder), "img_size": 8, "crop_pct": 1.0, "crop_padding": 0}
    return TrainConfig(**known | {"flip": False, "batch_size": 4, "workers": 0} | more).resolved()


def epoch_of(config: TrainConfig, data) -> tuple[list[int], list[int]]:
    found = list(batches(make_loader(data.train, config, training=True)))
    return numbers_in(torch.cat([i for i, _ in found])), torch.cat([x for _, x in found]).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "corrupt", "empty", "missing"])
def test_the_next_image_stands_in_for_a_broken_one_with_its_own_label(numbered, workers, how):
    config = settings(numbered, workers=workers)
    whole, _ = epoch_of(config, load_data(config))
    data = load_data(config)
    for name in ("3.png", "4.png"):
        path = numbered / "train" / "ants" / name
        path.write_bytes({"truncated": number_image(3)[:50], "corrupt": b"no image", "empty": b""}.get(how, b""))
        if how == "missing":
            path.unlink()
    data.train.broken.allowed = 2
    numbers, labels = epoch_of(config, data)
    assert numbers == [5 if n in (3, 4) else n for n in whole] and labels == [n // 10 for n in numbers]
    told = data.train.broken.take()
    assert len(told) == 2 and all(line.startswith(str(numbered / "train" / "ants")) for line in told)
    assert data.train.broken.take() == [] and epoch_of(config, data)[0] == numbers
    assert data.train.broken.take() == told


def test_a_broken_test_image_is_black_and_keeps_its_label(numbered):
    (numbered / "val" / "bees" / "0.png").write_bytes(b"no image")
    data = load_data(settings(numbered))
    image, label = data.test[(0, 2)]
    assert label == 1 and numbers_in(image[None]) == [0] and image.shape == (3, 8, 8)
    assert len(data.test.broken.take()) == 1 and data.train.broken.take() == []


def test_more_broken_images_than_allowed_are_refused_with_one_of_them_named():
    broken = BrokenImages(0.01, 300, "training images")
    for i in (0, 1, 2, 1, 0):
        broken.add(BrokenImage(f"{i}.png is no image."))
    expected = r"4 of 300 training images cannot be read, more than --max-broken 0\.01 allows; one of them: 3\.png"
    with pytest.raises(DenseShortcutError, match=expected) as caught:
        broken.add(BrokenImage("3.png is no image."))
    assert not isinstance(caught.value, BrokenImage)
    assert [BrokenImages(share, 5, "").allowed for share in (0, 0.001, 0.5)] == [0, 1, 2]


def test_too_many_broken_images_for_the_shared_memory_keep_what_there_is(monkeypatch):
    monkeypatch.setattr("dense_shortcuts.experiments.train.data.broken.REPORT_BYTES", 30)
    broken = BrokenImages(0.9, 300, "training images")
    for i in range(9):
        broken.add(BrokenImage(f"{i}.png is no image."))
    assert broken.take() == ["0.png is no image."]


def test_a_folder_without_a_readable_image_is_refused(numbered):
    for path in (numbered / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    config = settings(numbered, max_broken=0.99)
    data = load_data(config)
    with pytest.raises(DenseShortcutError, match="no image can be read"):
        epoch_of(config, data)


@pytest.mark.parametrize("loader", ["device", "workers"])
def test_tiny_imagenet_tells_of_a_broken_image_with_either_loader(numbered, loader):
    (numbered / "train" / "ants" / "3.png").write_bytes(b"no image")
    (numbered / "val" / "bees" / "0.png").write_bytes(b"no image")
    config = settings(numbered, data="tiny-imagenet", loader=loader)
    data = load_data(config)
    numbers, labels = epoch_of(config, data)
    assert sorted(numbers) == sorted([*(n for n in range(20) if n != 3), 4]) and labels == [n // 10 for n in numbers]
    assert numbers_in(data.test[(0, 2)][0][None]) == [0] and int(data.test[(0, 2)][1]) == 1
    for part in (data.train, data.test):
        told = part.broken.take()
        assert len(told) == 1 and "no image" not in told[0] and "is not a whole image" in told[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["image", "label", "shard", "none"])
def test_a_stream_leaves_out_what_is_broken_and_goes_on(tmp_path, workers, kind):
    for shard in range(2):
        entries = [(f"{n:03d}", number_image(n), "0") for n in range(10 * shard, 10 * shard + 10)]
        if shard == 0 and kind in ("image", "label", "none"):
            entries[3] = {
                "image": ("003", b"no", "0"),
                "label": ("003", number_image(3), "x"),
                "none": ("003", None, "0"),
            }[kind]
        write_shard(tmp_path / f"train-{shard}.tar", entries)
    write_shard(tmp_path / "test-0.tar", [("0", number_image(0), "0")])
    known = {"data": "webdataset", "num_classes": 1, "train_images": 20, "shuffle_buffer": 4}
    data = load_data(settings(tmp_path, **known))
    if kind == "shard":  # cut in its fourth picture; a picture and a label are 2,048 bytes
        first = tmp_path / "train-0.tar"
        first.write_bytes(first.read_bytes()[: 3 * 2048 + 540])
    share = StreamShare(data.train, 0, 1, batches=6, batch_size=4)
    found = list(DataLoader(share, batch_size=4, num_workers=workers))
    numbers = numbers_in(torch.cat([images for images, _ in found]))
    missing = set(range(20)) - set(numbers)
    # Of the image before the cut nobody knows that nothing of it follows, so it is left out too.
    assert missing == (set(range(2, 10)) if kind == "shard" else {3}) and len(numbers) == 24
    told = data.train.broken.take()
    name = str(tmp_path / "train-0.tar")
    assert len(told) == 1 and told[0].startswith(name if kind == "shard" else f"003 in {name}")


def test_a_parquet_stream_names_a_broken_image_by_its_path(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [number_image(n) for n in range(8)]
    images[2] = b"no image"
    write_images(tmp_path, "train", images, [0] * 8, classes="a")
    write_images(tmp_path, "test", [number_image(0), b"no image"], [0, 0], classes="a")
    data = load_data(settings(tmp_path, data="streaming", batch_size=2))
    numbers = [
        n
        for images, _ in make_loader(data.train, settings(tmp_path, batch_size=2), training=True)
        for n in numbers_in(images)
    ]
    assert len(numbers) == 8 and 2 not in numbers
    assert data.train.broken.take() == [
        "train-2.png is not a whole image (cannot identify image file): replace or remove it."
    ]
    assert numbers_in(data.test[(0, 1)][0][None]) == [0] and len(data.test.broken.take()) == 1


@pytest.mark.long
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_with_broken_images_ends_well_says_so_once_and_repeats(
    image_folder, workers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    broken = [image_folder / "train" / "bees" / "4.png", image_folder / "val" / "ants" / "1.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    size = ["--img-size", "32", "--batch-size", "4", "--epochs", "2", "--warmup-epochs", "0", "--workers", workers]
    command = ["train", "--data", "imagefolder", "--data-dir", str(image_folder), "--model", "dsnet20", *size]
    assert main([*command, "--name", "a"]) == 0
    out = capsys.readouterr().out
    for path in broken:
        assert out.count(f"left out: {path} is not a whole image") == 1
        assert Path("runs/a/run.log").read_text().count(f"{path} is not a whole image") == 1
    rows = read_metrics(Path("runs/a/stage-auto/metrics.jsonl"))
    assert [row["broken_images"] for row in rows] == [2, 2]
    assert "2 broken images were left out." in " ".join(Path("runs/a/table.md").read_text().split())
    assert main([*command, "--name", "b"]) == 0
    assert unclocked(read_metrics(Path("runs/b/stage-auto/metrics.jsonl"))) == unclocked(rows)


def test_a_noisy_image_folder_reports_nothing(image_folder):
    (image_folder / "train" / "bees" / "4.png").write_bytes(png(5, size=20))
    config = settings(image_folder)
    data = load_data(config)
    epoch_of(config, data)
    assert data.train.broken.take() == [] and np.isin(data.train.images.labels, (0, 1)).all()
