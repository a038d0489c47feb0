"""The loader that keeps images on the device gives the worker loader's batches, bit for bit."""

import numpy as np
import pytest
import torch
from torchvision import transforms
from train_helpers import png, write_parquet

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import load_data, make_loader, mixed_seed
from dense_shortcuts.experiments.train.data import loading as loading_module
from dense_shortcuts.experiments.train.data.device import DeviceImages, crops, first_numbers
from dense_shortcuts.experiments.train.data.transformed import TransformedImages, seeded
from dense_shortcuts.experiments.train.loop import batches
from dense_shortcuts.experiments.train.rerun import unclocked


def epoch_of(config: TrainConfig, epoch: int, *, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches of an epoch, one behind the other."""
    data = load_data(config)
    loader = make_loader(data.train if training else data.test, config, training=training)
    loader.sampler.epoch = epoch
    found = list(batches(loader))
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def both(training: bool, epoch: int = 3, **settings):
    """The batches of both loaders for the same settings."""
    made = []
    for loader in ("workers", "device"):
        config = TrainConfig(loader=loader, **settings).resolved()
        assert isinstance(load_data(config).train, DeviceImages if loader == "device" else TransformedImages)
        made.append(epoch_of(config, epoch, training=training))
    return made


@pytest.fixture
def small(tmp_path):
    """Forty training and nine test images of 16x16 in CIFAR-100's layout."""
    write_parquet(tmp_path, "train", [png(i, 16) for i in range(40)], [i % 5 for i in range(40)])
    write_parquet(tmp_path, "test", [png(100 + i, 16) for i in range(9)], [i % 5 for i in range(9)])
    return {"data": "cifar100", "data_dir": str(tmp_path), "img_size": 16, "batch_size": 8, "workers": 0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_padding": 0},
        {"crop_padding": 3},
        {"flip": False},
        {"flip": False, "crop_padding": 0},
        {"img_size": 12},
        {"seed": 7, "aug_repeats": 3},
    ],
    ids=str,
)
def test_training_batches_are_those_of_the_worker_loader(small, change):
    (images, labels), (kept, kept_labels) = both(True, **small | change)
    assert torch.equal(labels, kept_labels) and len(labels) == 40
    assert kept.dtype == torch.float32 and kept.is_contiguous() and torch.equal(images, kept)


@pytest.mark.parametrize("training", [True, False], ids=["training", "test"])
def test_each_of_two_processes_gets_the_share_that_the_worker_loader_gives_it(small, training):
    from accelerate.data_loader import prepare_data_loader

    def share(loader: str, process: int) -> list[torch.Tensor]:
        config = TrainConfig(loader=loader, **small | {"batch_size": 4}).resolved()
        data = load_data(config)
        whole = make_loader(data.train if training else data.test, config, training=training)
        how = {"num_processes": 2, "process_index": process, "split_batches": True, "put_on_device": False}
        found = prepare_data_loader(whole, **how)
        return [torch.cat([images.flatten(1), labels[:, None]], 1) for images, labels in found]

    for process in (0, 1):
        kept, made = share("device", process), share("workers", process)
        assert [len(batch) for batch in kept] == [2] * (10 if training else 3)
        assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))
    assert not torch.equal(share("device", 0)[0], share("device", 1)[0])


@pytest.mark.parametrize("change", [{}, {"img_size": 12}, {"test_size": 24}, {"crop_pct": 0.8}], ids=str)
def test_test_batches_are_those_of_the_worker_loader_with_a_ragged_last_one(small, change):
    (images, labels), (kept, kept_labels) = both(False, **small | change)
    assert torch.equal(labels, kept_labels) and len(labels) == 9 and torch.equal(images, kept)


def test_real_cifar100_comes_alike_from_both_loaders(cifar100):
    settings = {"data": "cifar100", "data_dir": str(cifar100), "limit_train": 256, "limit_test": 100, "workers": 0}
    for training in (True, False):
        (images, labels), (kept, kept_labels) = both(training, **settings)
        assert torch.equal(images, kept) and torch.equal(labels, kept_labels)


def test_crops_and_flips_are_even_over_all_positions():
    top, left, mirrored = crops(0, [(0, place) for place in range(20000)], 4, flip=True)
    for drawn in (top, left):
        assert drawn.min() == 0 and drawn.max() == 8
        # Nine positions with 2,222 each; the standard deviation of a count is 44.
        assert np.abs(np.bincount(drawn) - 20000 / 9).max() < 5 * 44
    assert abs(mirrored.mean() - 0.5) < 5 * 0.0036
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.04 and abs(np.corrcoef(top, mirrored)[0, 1]) < 0.04


def test_crops_are_what_torchvision_draws():
    top, left, mirrored = crops(5, [(2, place) for place in range(300)], 4, flip=True)
    for place in range(300):
        with seeded(5, 2, place):
            i, j, _, _ = transforms.RandomCrop.get_params(torch.empty(3, 40, 40), (32, 32))
            assert (i, j, bool(torch.rand(1) < 0.5)) == (top[place], left[place], mirrored[place])


def test_first_numbers_are_those_of_the_mersenne_twister():
    seeds = np.array([0, 1, 12345, mixed_seed(1, 2), 2**32 - 1], np.uint32)
    numbers = np.stack(first_numbers(seeds, 5), axis=1)
    for seed, found in zip(seeds, numbers, strict=True):
        assert found.tolist() == np.random.RandomState(seed).randint(0, 2**32, 5, dtype=np.uint64).tolist()


def test_an_image_is_augmented_alike_in_any_batch_and_anew_in_each_epoch(small):
    images = load_data(TrainConfig(**small).resolved()).train
    whole, _ = images.__getitems__([(0, place) for place in range(40)])
    assert torch.equal(whole[7], images[(0, 7)][0])
    assert torch.equal(whole[[3, 9]], images.__getitems__([(0, 3), (0, 9)])[0])
    later, _ = images.__getitems__([(1, place) for place in range(40)])
    assert sum(not torch.equal(a, b) for a, b in zip(whole, later, strict=True)) > 35


def test_the_loader_changes_no_result_of_a_run(tiny, fit, tmp_path):
    runs = [fit(tiny(loader=loader, mixup=0.2), tmp_path / loader) for loader in ("workers", "device")]
    assert unclocked(runs[0]) == unclocked(runs[1])


def test_auto_takes_the_device_where_it_can(small, image_folder, monkeypatch):
    def kept(**settings):
        return isinstance(load_data(TrainConfig(**settings).resolved()).train, DeviceImages)

    assert kept() and kept(**small)
    assert not kept(**small, auto_augment="rand-m5")
    assert not kept(**small, loader="workers")
    assert not kept(data="imagefolder", data_dir=str(image_folder), img_size=16)
    monkeypatch.setattr(loading_module, "free_memory", lambda device: 1000)
    assert not kept(**small)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"auto_augment": "rand-m5"}, "knows crops and flips, not --auto-augment"),
        ({"data": "imagefolder", "img_size": 16}, "does not hold --data imagefolder"),
    ],
)
def test_a_device_loader_that_cannot_be_had_is_told(image_folder, settings, sentence):
    config = TrainConfig(loader="device", data_dir=str(image_folder), **settings).resolved()
    with pytest.raises(DenseShortcutError, match=sentence):
        load_data(config)


def test_too_little_memory_for_the_device_loader_is_told(small, monkeypatch):
    monkeypatch.setattr(loading_module, "free_memory", lambda device: 1000)
    with pytest.raises(DenseShortcutError, match=r"needs twice the 0\.0 GiB of the images free on cpu"):
        load_data(TrainConfig(loader="device", **small).resolved())
