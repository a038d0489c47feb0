"""Streams: every image of an epoch once over all processes and workers, shuffled by the seed, at its stated length."""

import json

import numpy as np
import pytest
import torch
from process_helpers import Group
from test_data_sources import write_images
from torch.utils.data import DataLoader
from train_helpers import number_image, numbers_in, write_shard

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.train import loop
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import epochs_of, load_data, make_loader
from dense_shortcuts.experiments.train.data import hub as hub_module
from dense_shortcuts.experiments.train.data.stream import Place, StreamShare
from dense_shortcuts.experiments.train.loop import batches
from dense_shortcuts.experiments.train.processes import make_accelerator
from dense_shortcuts.experiments.train.rerun import unclocked

IMAGES = 48


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both kinds of streams: four training files of twelve images that say their number, label = number % 3."""
    folder = tmp_path_factory.mktemp("streams")
    for shard in range(4):
        numbers = range(12 * shard, 12 * shard + 12)
        write_shard(folder / f"train-{shard}.tar", [(f"{n:03d}", number_image(n), str(n % 3)) for n in numbers])
        path = write_images(
            folder, "train", [number_image(n) for n in numbers], [n % 3 for n in numbers], classes="abc"
        )
        path.rename(folder / f"train-{shard}.parquet")
    write_shard(folder / "test-0.tar", [(f"{n}", number_image(n), str(n % 3)) for n in range(5)])
    write_images(folder, "test", [number_image(n) for n in range(5)], [n % 3 for n in range(5)], classes="abc")
    (folder / "classes.txt").write_text("a\nb\nc\n")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The cache of `datasets` in a folder of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def settings(made, data, **more) -> TrainConfig:
    known = {"data": data, "data_dir": str(made), "img_size": 8, "crop_padding": 0, "flip": False, "crop_pct": 1.0}
    known |= {"batch_size": 4, "workers": 0, "shuffle_buffer": 8}
    known |= {"train_images": IMAGES} if data == "webdataset" else {}
    return TrainConfig(**known | more).resolved()


def epoch_of(loader, epoch: int) -> tuple[list[int], list[int]]:
    epochs_of(loader).epoch = epoch
    found = list(batches(loader))
    return numbers_in(torch.cat([i for i, _ in found])), torch.cat([x for _, x in found]).tolist()


both = pytest.mark.parametrize("data", ["streaming", "webdataset"])


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_image_once_with_its_label_and_is_shuffled_anew(made, data, workers):
    config = settings(made, data, workers=workers)
    loader = make_loader(load_data(config).train, config, training=True)
    assert len(loader) == 12
    numbers, labels = epoch_of(loader, 0)
    assert sorted(numbers) == list(range(IMAGES)) and labels == [n % 3 for n in numbers]
    assert numbers != sorted(numbers) and abs(np.corrcoef(numbers[:12], range(12))[0, 1]) < 0.98
    later = epoch_of(loader, 1)[0]
    assert sorted(later) == list(range(IMAGES)) and later != numbers
    assert epoch_of(loader, 0)[0] == numbers
    other = settings(made, data, workers=workers, seed=1)
    assert epoch_of(make_loader(load_data(other).train, other, training=True), 0)[0] != numbers


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_share_an_epoch_without_a_repeat(made, data, workers):
    stream = load_data(settings(made, data)).train
    assert stream.source.readers(2) == 2
    seen = []
    for process in (0, 1):
        share = StreamShare(stream, process, 2, batches=12, batch_size=2)
        found = list(DataLoader(share, batch_size=2, num_workers=workers))
        assert [len(labels) for _, labels in found] == [2] * 12
        seen.append(numbers_in(torch.cat([images for images, _ in found])))
    assert sorted(seen[0] + seen[1]) == list(range(IMAGES))


@both
def test_more_processes_than_files_are_shared_out_or_refused(made, data):
    source = load_data(settings(made, data)).train.source
    if data == "webdataset":
        assert source.readers(5) == 0
        return
    assert source.readers(5) == 4  # each process reads all four files and keeps a fifth of the images
    parts = [[label for _, label, _ in source.samples(Place(process, 5, 0, 1, 3), None)] for process in range(5)]
    assert sum(len(part) for part in parts) == IMAGES and min(len(part) for part in parts) >= 9


def test_fewer_shards_than_processes_are_refused(made, monkeypatch):
    config = settings(made, "webdataset")
    stream = load_data(config).train
    monkeypatch.setattr(type(stream.source), "readers", lambda self, processes: 0)
    with pytest.raises(DenseShortcutError, match="cut them into more shards"):
        make_loader(stream, config, training=True)


@both
def test_there_are_never_more_workers_than_files(made, data):
    config = settings(made, data, workers=9)
    assert make_loader(load_data(config).train, config, training=True).num_workers == 4


@both
def test_an_epoch_longer_than_the_files_begins_them_anew_and_a_shorter_one_is_cut(made, data):
    config = settings(made, data)
    stream = load_data(config).train
    share = StreamShare(stream, 0, 1, batches=20, batch_size=4)
    counts = np.bincount(numbers_in(torch.stack([image for image, _ in share])), minlength=IMAGES)
    assert counts.sum() == 80 and counts.min() == 1 and counts.max() == 2
    short = settings(made, data, limit_train=10)
    assert len(make_loader(load_data(short).train, short, training=True)) == 2


@both
def test_augmentation_of_a_stream_follows_from_seed_and_epoch(made, data):
    def epoch(number, seed=0):
        config = settings(made, data, crop_padding=2, flip=True, seed=seed, limit_train=16)
        loader = make_loader(load_data(config).train, config, training=True)
        epochs_of(loader).epoch = number
        return torch.cat([images for images, _ in loader])

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1)) and not torch.equal(epoch(0), epoch(0, seed=1))


def test_a_label_outside_the_classes_ends_the_stream_with_its_name(made):
    config = settings(made, "webdataset")
    (made / "train-0.tar").rename(made / "kept")
    try:
        write_shard(made / "train-0.tar", [("x7", number_image(1), "3")])
        with pytest.raises(DenseShortcutError, match=r"x7 in .*train-0.tar has the label 3: with 3 classes"):
            list(batches(make_loader(load_data(config).train, config, training=True)))
    finally:
        (made / "kept").rename(made / "train-0.tar")


def test_a_stream_of_the_hub_needs_a_known_length_and_classes(monkeypatch):
    import datasets

    rows = [{"image": {"bytes": number_image(n), "path": None}, "label": n} for n in range(3)]
    kept = datasets.Dataset.from_list(rows)

    def opened(name, split, streaming=False):
        return kept.to_iterable_dataset() if streaming else kept

    monkeypatch.setattr(hub_module, "split_of", lambda name, part: part)
    monkeypatch.setattr(hub_module, "opened", opened)
    base = {"data": "streaming", "hub": "a/b", "img_size": 8}
    with pytest.raises(DenseShortcutError, match="a/b does not say how large it is"):
        load_data(TrainConfig(**base).resolved())
    data = load_data(TrainConfig(**base, num_classes=3, train_images=3).resolved())
    assert data.classes == ("0", "1", "2") and len(data.train) == 3


@both
def test_a_run_on_a_stream_that_stopped_goes_on_to_the_same_result(made, data, fit, tmp_path, monkeypatch):
    config = settings(made, data, model="dsnet20", epochs=2, warmup_epochs=0, limit_train=16, batch_size=8)
    expected = fit(config, tmp_path / "whole")
    original = loop.train_epoch

    def stopping(training, config, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(training, config, epoch, *rest)

    monkeypatch.setattr(loop, "train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert unclocked(fit(config, tmp_path / "stopped")) == unclocked(expected)


@both
def test_real_processes_read_their_own_part_and_accelerate_leaves_it_to_them(made, data, tmp_path):
    def work(rank: int) -> None:
        from torch import distributed

        config = settings(made, data)
        accelerator = make_accelerator(config)
        loader = make_loader(load_data(config).train, config, training=True)
        assert accelerator.prepare(loader) is loader and (rank, 2) == (
            accelerator.process_index,
            accelerator.num_processes,
        )
        numbers, labels = epoch_of(loader, 0)
        assert labels == [n % 3 for n in numbers]
        (tmp_path / f"{rank}.json").write_text(json.dumps(numbers))
        distributed.destroy_process_group()

    Group(2, work, tmp_path / "output").succeed()
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(part) for part in seen] == [24, 24] and sorted(seen[0] + seen[1]) == list(range(IMAGES))
