"""Images: what is read, that their augmentation follows from the seed alone, and one sentence for each broken input."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from train_helpers import load, one_sentence, png, write_parquet

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import EpochSampler, load_data
from dense_shortcuts.experiments.train.loop import batches, make_loader


def test_digits_are_all_used_once_and_a_fifth_of_each_class_is_held_out():
    data = load(data="digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    share = np.bincount(data.test.images.labels) / np.bincount(
        np.concatenate([data.train.images.labels, data.test.images.labels])
    )
    assert np.all(np.abs(share - 0.2) < 0.005)
    both = np.concatenate([data.train.images.pixels, data.test.images.pixels])[..., 0].reshape(1797, 64)
    from sklearn.datasets import load_digits

    original = np.round(load_digits().data * 255 / 16)
    assert np.array_equal(np.sort(both.sum(1)), np.sort(original.sum(1)))


def test_a_limit_takes_a_prefix_of_the_same_images():
    whole, part = load(), load(limit_train=40, limit_test=7)
    assert (len(part.train), len(part.test)) == (40, 7)
    assert np.array_equal(part.train.images.pixels, whole.train.images.pixels[:40])


def test_validation_images_are_held_out_from_training():
    whole, part = load(limit_train=40), load(limit_train=40, validation=10)
    assert (len(part.train), len(part.test)) == (30, 10)
    both = np.concatenate([part.train.images.pixels, part.test.images.pixels]).reshape(40, -1)
    assert np.array_equal(np.unique(both, axis=0), np.unique(whole.train.images.pixels.reshape(40, -1), axis=0))


def test_validation_images_must_leave_some_for_training():
    assert "--validation 40 leaves nothing of 40 training images" in one_sentence(limit_train=40, validation=40)


def test_test_images_are_normalised_and_not_augmented():
    data = load(data="digits", img_size=8)
    image, label = data.test[(0, 3)]
    pixels = torch.from_numpy(data.test.images.pixels[3]).permute(2, 0, 1) / 255
    assert label == data.test.images.labels[3]
    torch.testing.assert_close(image, (pixels - 0.305) / 0.376)
    assert torch.equal(image, data.test[(5, 3)][0])


def test_augmentation_differs_between_epochs_and_repeats_within_one():
    data = load(limit_train=30)
    first = torch.stack([data.train[(0, i)][0] for i in range(30)])
    backwards = torch.stack([data.train[(0, i)][0] for i in reversed(range(30))]).flip(0)
    assert torch.equal(first, backwards)
    moved = sum(not torch.equal(a, data.train[(1, i)][0]) for i, a in enumerate(first))
    assert moved > 20


def test_another_seed_gives_another_augmentation():
    images = [torch.stack([load(limit_train=30, seed=s).train[(0, i)][0] for i in range(30)]) for s in (0, 1)]
    assert not torch.equal(*images)


def test_drawing_images_leaves_the_training_random_numbers_alone():
    data = load(limit_train=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    data.train[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_two_worker_processes_give_the_batches_of_none():
    passes = []
    for workers in (0, 2):
        config = TrainConfig(limit_train=64, batch_size=16, workers=workers, auto_augment="rand-m9-mstd0.5").resolved()
        loader = make_loader(load_data(config).train, config, training=True)
        epochs = []
        for epoch in (3, 4):
            loader.sampler.epoch = epoch
            epochs += [torch.cat([images.flatten(1), labels[:, None]], 1) for images, labels in loader]
        passes.append(torch.cat(epochs))
    assert torch.equal(*passes)


def test_the_order_of_an_epoch_is_a_permutation_that_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(50, shuffle=True, seed=seed)
        sampler.epoch = epoch
        return [place for _, place in sampler]

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_repeated_augmentation_takes_the_places_of_timms_sampler_and_augments_each_copy_anew():
    from timm.data.distributed_sampler import RepeatAugSampler

    ours = list(EpochSampler(10, shuffle=False, seed=0, repeats=3))
    timms = list(RepeatAugSampler(range(10), num_replicas=1, rank=0, shuffle=False, num_repeats=3, selected_round=0))
    assert [place for _, place, _ in ours] == timms and len(ours) == 10
    assert [copy for _, _, copy in ours] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    shuffled = [place for _, place, _ in EpochSampler(30, shuffle=True, seed=0, repeats=3)]
    assert shuffled == [place for place in shuffled[::3] for _ in range(3)] and len(set(shuffled)) == 10
    train = load(limit_train=30).train
    copies = [torch.stack([train[(0, i, copy)][0] for i in range(30)]) for copy in (0, 1)]
    assert not torch.equal(*copies)


def test_real_cifar100_is_read_from_its_parquet_files(cifar100):
    data = load(data="cifar100", data_dir=str(cifar100), limit_train=200, limit_test=50)
    table = pq.read_table(next(cifar100.glob("test-*.parquet")))
    assert data.test.images.labels.tolist() == table["fine_label"][:50].to_pylist()
    assert data.train.images.pixels.shape == (200, 32, 32, 3)
    assert data.classes == tuple((cifar100 / "classes.txt").read_text().split())
    assert 0.3 < data.train.images.pixels.mean() / 255 < 0.65


def test_parquet_images_keep_their_pixels_and_labels(parquet_folder):
    import io

    from PIL import Image

    data = load(data="cifar100", data_dir=str(parquet_folder))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(png(i)))) for i in range(12)])
    assert np.array_equal(data.train.images.pixels, expected)
    assert data.train.images.labels.tolist() == [i % 3 for i in range(12)]
    assert len(data.classes) == 100


def test_a_limit_decodes_only_the_prefix(parquet_folder):
    write_parquet(parquet_folder, "train", [png(0), png(1), b"broken"], [0, 1, 2])
    assert len(load(data="cifar100", data_dir=str(parquet_folder), limit_train=2).train) == 2


@pytest.mark.parametrize(
    "content", [b"not an image", png(3)[:60], b"", None], ids=["corrupt", "truncated", "empty", "none"]
)
def test_a_broken_image_in_a_parquet_file_is_named_by_its_row(parquet_folder, content):
    write_parquet(parquet_folder, "train", [png(0), content], [0, 1])
    assert "row 1 of" in one_sentence(data="cifar100", data_dir=str(parquet_folder))


@pytest.mark.parametrize("label", [100, -1])
def test_a_label_outside_the_classes_is_named_by_its_row(parquet_folder, label):
    write_parquet(parquet_folder, "test", [png(0), png(1)], [0, label])
    text = one_sentence(data="cifar100", data_dir=str(parquet_folder))
    assert "row 1 of" in text and f"the label {label}" in text


def test_an_image_of_another_size_is_named_by_its_row(parquet_folder):
    write_parquet(parquet_folder, "train", [png(0), png(1, size=9)], [0, 1])
    assert "row 1 of" in one_sentence(data="cifar100", data_dir=str(parquet_folder))


def test_a_parquet_file_without_the_columns_is_told_which(parquet_folder):
    pq.write_table(pa.table({"image": [1], "label": [2]}), next(parquet_folder.glob("train-*.parquet")))
    text = one_sentence(data="cifar100", data_dir=str(parquet_folder))
    assert "no column img and no column fine_label (it has image, label)" in text


def test_a_truncated_parquet_file_is_named(parquet_folder):
    path = next(parquet_folder.glob("test-*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is not a whole parquet file" in one_sentence(data="cifar100", data_dir=str(parquet_folder))


def test_parquet_files_without_a_row_are_refused(parquet_folder):
    write_parquet(parquet_folder, "train", [], [])
    assert "without a row" in one_sentence(data="cifar100", data_dir=str(parquet_folder))


def test_a_missing_part_of_the_parquet_files_is_named(parquet_folder):
    next(parquet_folder.glob("test-*.parquet")).unlink()
    assert "has no test-*.parquet" in one_sentence(data="cifar100", data_dir=str(parquet_folder))


def test_a_missing_folder_is_named(tmp_path):
    for data in ("cifar100", "imagefolder"):
        assert "is not a folder" in one_sentence(data=data, data_dir=str(tmp_path / "nowhere"))


def test_no_folder_at_all_asks_for_one(monkeypatch):
    monkeypatch.delenv("DENSE_SHORTCUTS_DATA", raising=False)
    for data in ("cifar100", "imagefolder"):
        assert "--data-dir" in one_sentence(data=data)


def test_an_empty_cifar_folder_says_what_it_lacks_when_the_download_fails(tmp_path, monkeypatch):
    from urllib.error import URLError

    import torchvision

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    text = one_sentence(data="cifar100", data_dir=str(tmp_path))
    assert "has no train-*.parquet" in text and "no network" in text
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_cifar_that_is_not_the_original_is_never_unpickled(tmp_path, monkeypatch):
    import pickle
    from urllib.error import URLError

    import torchvision

    marker = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    one_sentence(data="cifar100", data_dir=str(tmp_path))
    assert not marker.exists()


def test_an_image_folder_is_read_with_its_classes(image_folder):
    data = load(data="imagefolder", data_dir=str(image_folder), img_size=16)
    assert data.classes == ("ants", "bees") and (len(data.train), len(data.test)) == (16, 6)
    assert data.test[(0, 5)][0].shape == (3, 16, 16) and data.test[(0, 5)][1] == 1
    sample = load(data="imagefolder", data_dir=str(image_folder), limit_train=8)
    assert set(sample.train.images.labels.tolist()) == {0, 1}


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"no image", png(3)[:60]], ids=["corrupt", "truncated"])
def test_where_none_may_be_broken_a_file_is_named_also_from_a_worker_process(image_folder, workers, content):
    broken = image_folder / "train" / "bees" / "4.png"
    broken.write_bytes(content)
    config = TrainConfig(data="imagefolder", data_dir=str(image_folder), img_size=16, batch_size=4, workers=workers)
    config = config.resolved()
    config = dataclasses.replace(config, max_broken=0.0)
    loader = make_loader(load_data(config).train, config, training=True)
    with pytest.raises(DenseShortcutError) as caught:
        list(batches(loader))
    text = str(caught.value)
    assert text.startswith(f"{broken} is not a whole image") and "\n" not in text


def test_an_image_folder_without_its_parts_or_classes_is_refused(image_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold train/ and val/" in one_sentence(data="imagefolder", data_dir=str(empty))
    (empty / "train").mkdir()
    (empty / "val").mkdir()
    assert "needs a folder with images for every class" in one_sentence(data="imagefolder", data_dir=str(empty))
    (image_folder / "train" / "cats").mkdir()
    assert "cats" in one_sentence(data="imagefolder", data_dir=str(image_folder))
    (image_folder / "train" / "cats").joinpath("1.png").write_bytes(png(1))
    assert "differ in the classes cats" in one_sentence(data="imagefolder", data_dir=str(image_folder))


def test_fewer_training_images_than_a_batch_are_refused():
    config = TrainConfig(limit_train=10, batch_size=16).resolved()
    with pytest.raises(DenseShortcutError, match="take --batch-size 10 or less"):
        make_loader(load_data(config).train, config, training=True)
