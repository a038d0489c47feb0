"""Each source of images in each of its layouts: what is read, which labels and classes it has, what it refuses."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from train_helpers import load, number_image, one_sentence, png, write_shard

from dense_shortcuts.experiments.train.data.parquet import parts_of


def jpeg(seed: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(pixels, "L").save(buffer, "JPEG")  # some of Tiny ImageNet's images are grey
    return buffer.getvalue()


def write_images(folder, part, images, labels, *, image="image", label="label", classes=None):
    """A parquet file as the hub has it; `classes` go into its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": f"{part}-{i}.png"} for i, content in enumerate(images)]
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels, pa.int64())})
    if classes is not None:
        features = {image: {"_type": "Image"}, label: {"names": list(classes), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = folder / f"{part}-00000-of-00001.parquet"
    pq.write_table(table, path)
    return path


# CIFAR-10 -------------------------------------------------------------------------------------------------------------


def write_cifar10(folder, labels=(3, 9, 0)):
    for part in ("train", "test"):
        write_images(folder, part, [png(i, 32) for i in range(len(labels))], list(labels), image="img")
    return str(folder)


def test_cifar10_is_read_from_its_parquet_files(tmp_path):
    data = load(data="cifar10", data_dir=write_cifar10(tmp_path))
    assert data.train.images.labels.tolist() == [3, 9, 0] and len(data.classes) == 10
    assert (data.classes[3], data.classes[9]) == ("cat", "truck")
    assert np.array_equal(data.train.images.pixels[1], np.asarray(Image.open(io.BytesIO(png(1, 32)))))


def test_a_label_outside_cifar10_is_named(tmp_path):
    text = one_sentence(data="cifar10", data_dir=write_cifar10(tmp_path, (3, 10)))
    assert "row 1 of" in text and "the label 10: CIFAR-10's label is from 0 to 9" in text


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    import torchvision

    class Kept:
        classes = ("a", "b")

        def __init__(self, root, train, download=False):
            assert root == str(tmp_path)
            self.data = np.full((3 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = [0, 1, 1][: len(self.data)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Kept)
    data = load(data="cifar10", data_dir=str(tmp_path))
    assert data.train.images.labels.tolist() == [0, 1, 1] and (len(data.test), data.classes) == (2, ("a", "b"))


def test_named_sets_are_found_in_the_folder_of_all_data(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "cifar10")
    monkeypatch.setenv("DENSE_SHORTCUTS_DATA", str(tmp_path))
    assert len(load(data="cifar10").train) == 3


# Tiny ImageNet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_zip(tmp_path):
    """The unpacked tiny-imagenet-200.zip with two classes."""
    folder = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n01", "n02")):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for i in range(3):
            (images / f"{name}_{i}.JPEG").write_bytes(jpeg(10 * label + i))
    (folder / "val" / "images").mkdir(parents=True)
    for i in range(2):
        (folder / "val" / "images" / f"val_{i}.JPEG").write_bytes(jpeg(50 + i))
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t1\t1\t9\t9\n")
    return tmp_path


@pytest.mark.parametrize("loader", ["device", "workers"])
def test_tiny_imagenet_is_read_as_its_zip_has_it(tiny_zip, loader):
    data = load(data="tiny-imagenet", data_dir=str(tiny_zip), loader=loader)
    assert data.classes == ("n01", "n02") and (len(data.train), len(data.test)) == (6, 2)
    assert data.test.images.labels.tolist() == [1, 0]
    image, label = data.test[(0, 0)]
    grey = np.asarray(Image.open(io.BytesIO(jpeg(50)))) / 255
    assert label == 1 and image.shape == (3, 64, 64)
    np.testing.assert_allclose(image[0].numpy(), (grey - 0.485) / 0.229, rtol=1e-5, atol=1e-5)


def test_tiny_imagenet_is_read_from_class_folders_and_from_parquet(tmp_path):
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / "folders" / part / name).mkdir(parents=True)
            (tmp_path / "folders" / part / name / "0.JPEG").write_bytes(jpeg(1))
    assert load(data="tiny-imagenet", data_dir=str(tmp_path / "folders")).test.images.labels.tolist() == [0, 1]
    hub = tmp_path / "hub" / "data"
    write_images(hub, "train", [jpeg(1), jpeg(2)], [0, 1], classes=("n01", "n02"))
    write_images(hub, "valid", [jpeg(3)], [1], classes=("n01", "n02"))
    data = load(data="tiny-imagenet", data_dir=str(tmp_path / "hub"))
    assert data.classes == ("n01", "n02") and data.test.images.labels.tolist() == [1] and len(data.train) == 2


def test_a_tiny_imagenet_that_is_not_there_or_broken_is_told(tiny_zip, tmp_path):
    empty = tmp_path / "tiny-imagenet-200" / "val"
    assert "unpack tiny-imagenet-200.zip there" in one_sentence(data="tiny-imagenet", data_dir=str(empty))
    (tiny_zip / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03\t0\t0\t9\t9\n")
    assert "line 1 of" in one_sentence(data="tiny-imagenet", data_dir=str(tiny_zip))


# Parquet --------------------------------------------------------------------------------------------------------------


def test_parquet_finds_its_columns_and_classes(tmp_path):
    write_images(tmp_path, "train", [png(0), png(1), png(2)], [1, 0, 1], image="picture", label="kind", classes="ab")
    write_images(tmp_path, "validation", [png(3)], [1], image="picture", label="kind", classes="ab")
    data = load(data="parquet", data_dir=str(tmp_path), img_size=8, crop_pct=1.0)
    assert data.classes == ("a", "b") and data.train.images.labels.tolist() == [1, 0, 1]
    picture, label = data.train.images[2]
    assert label == 1 and np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(png(2)))))
    assert data.test[(0, 0)][0].shape == (3, 8, 8)


def test_parquet_without_class_names_numbers_them_also_under_a_limit(tmp_path):
    write_images(tmp_path, "train", [png(i) for i in range(6)], [0, 1, 2, 3, 4, 5])
    write_images(tmp_path, "test", [png(9)], [2])
    data = load(data="parquet", data_dir=str(tmp_path), limit_train=2)
    assert len(data.classes) == 6 and len(data.train) == 2
    chosen = data.train.images.labels
    assert [np.asarray(data.train.images[i][0]).sum() for i in range(2)] == [
        np.asarray(Image.open(io.BytesIO(png(int(label))))).sum(dtype=np.int64) for label in chosen
    ]


def test_parquet_takes_named_columns_and_files(tmp_path):
    kind = pa.struct([("bytes", pa.binary())])
    for name, first in (("a-0", 0), ("a-1", 3), ("b-0", 6)):
        rows = pa.array([{"bytes": png(first + i)} for i in range(3)], kind)
        pq.write_table(pa.table({"img": rows, "coarse": [0, 1, 0], "fine": [2, 3, 4]}), tmp_path / f"{name}.parquet")
    files = {"train_files": "a-{0..1}.parquet", "test_files": "b-*.parquet"}
    data = load(data="parquet", data_dir=str(tmp_path), label_column="fine", **files)
    assert data.train.images.labels.tolist() == [2, 3, 4] * 2 and len(data.test) == 3 and len(data.classes) == 5
    text = one_sentence(data="parquet", data_dir=str(tmp_path), **files)
    assert "several label columns: give --label-column one of coarse, fine" in text
    text = one_sentence(data="parquet", data_dir=str(tmp_path), image_column="photo", **files)
    assert "no column photo: give --image-column one of img" in text
    assert "has no c-*.parquet" in one_sentence(data="parquet", data_dir=str(tmp_path), train_files="c-*.parquet")
    assert "brace without its partner" in one_sentence(data="parquet", data_dir=str(tmp_path), train_files="{c.parquet")


def test_parquet_refuses_what_it_cannot_hold_or_read(tmp_path, monkeypatch):
    assert "has no train*.parquet" in one_sentence(data="parquet", data_dir=str(tmp_path))
    path = write_images(tmp_path, "train", [png(0), png(1)], [0, 1], classes="ab")
    assert "has no validation*.parquet or" in one_sentence(data="parquet", data_dir=str(tmp_path))
    write_images(tmp_path, "test", [png(0)], [2], classes="ab")
    assert "has the label 2: with 2 classes it is from 0 to 1" in one_sentence(data="parquet", data_dir=str(tmp_path))
    write_images(tmp_path, "test", [png(0)], [None], classes="ab")
    assert "images without a label" in one_sentence(data="parquet", data_dir=str(tmp_path))
    write_images(tmp_path, "test", [png(0)], [0], classes="ab")
    monkeypatch.setattr("dense_shortcuts.experiments.train.data.parquet.free_bytes", lambda: 100)
    assert "over half of the free memory: take --data streaming" in one_sentence(data="parquet", data_dir=str(tmp_path))
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-9])
    assert f"{path} is not a whole parquet file" in one_sentence(data="parquet", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("names", "part", "found"),
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], "train", ["imagenet1k-train-0000.tar"]),
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], "test", ["imagenet1k-validation-00.tar"]),
        (["train0.tar", "test0.tar", "val.tar"], "test", ["val.tar"]),
        (["training.tar", "latest.tar"], "test", []),
    ],
)
def test_the_files_of_a_part_are_found_by_its_name(tmp_path, names, part, found):
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in parts_of(tmp_path, None, part, ".tar")] == found


# WebDataset -----------------------------------------------------------------------------------------------------------


def write_wds(folder, shards=2, each=4):
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        entries = [(f"{n:04d}", number_image(n), str(n % 3)) for n in numbers]
        write_shard(folder / f"set-train-{shard:02d}.tar", entries)
    write_shard(folder / "set-validation-00.tar", [(f"v/{n}", number_image(200 + n), str(n % 3)) for n in range(5)])
    (folder / "classes.txt").write_text("ant\nbee\nfly ing\n")
    return {"data": "webdataset", "data_dir": str(folder), "img_size": 8, "crop_pct": 1.0}


def test_webdataset_tests_are_read_in_order_from_their_place_in_the_shard(tmp_path):
    data = load(**write_wds(tmp_path), train_images=8)
    assert data.classes == ("ant", "bee", "fly ing") and len(data.train) == 8
    assert data.test.images.labels.tolist() == [0, 1, 2, 0, 1]
    assert [data.test.images[i][0].getpixel((0, 0))[0] for i in range(5)] == [200, 201, 202, 203, 204]
    assert len(load(**write_wds(tmp_path), train_images=8, limit_train=5, limit_test=2).test) == 2


def test_the_length_of_a_webdataset_comes_from_its_index_or_a_flag(tmp_path):
    settings = write_wds(tmp_path)
    assert "give --train-images" in one_sentence(**settings)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {"num_samples": 8}}}))
    assert len(load(**settings).train) == 8 and len(load(**settings, train_images=6).train) == 6
    (tmp_path / "_info.json").write_text("{}")
    assert "does not hold splits, train, num_samples" in one_sentence(**settings)


def test_webdataset_refuses_what_it_cannot_read(tmp_path):
    settings = write_wds(tmp_path) | {"train_images": 8}
    (tmp_path / "classes.txt").unlink()
    assert "give --num-classes" in one_sentence(**settings)
    assert len(load(**settings, num_classes=3).classes) == 3
    assert "has the label 2: with 2 classes" in one_sentence(**settings, num_classes=2)
    shard = tmp_path / "set-validation-00.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    assert f"{shard} is not a whole tar file" in one_sentence(**settings, num_classes=3)
    first = tmp_path / "set-train-00.tar"
    kept = first.read_bytes()
    for short in (kept[:2048], b""):
        first.write_bytes(short)
        assert f"{first} is not a whole tar file" in one_sentence(**settings, num_classes=3)
    first.write_bytes(kept)
    write_shard(shard, [("1", number_image(1), None)])
    assert "has no image with a label" in one_sentence(**settings, num_classes=3)
    write_shard(shard, [("1", number_image(1), "one")])
    assert "1 in " in one_sentence(**settings, num_classes=3)
    shard.unlink()
    assert "has no validation*.tar" in one_sentence(**settings, num_classes=3)


@pytest.mark.parametrize(
    ("library", "settings"),
    [("webdataset", {"data": "webdataset"}), ("datasets", {"data": "streaming"})],
)
def test_a_missing_library_is_told_with_its_extra(library, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert "pip install 'dense-shortcuts[data]'" in one_sentence(**settings, data_dir=str(tmp_path))


# Streaming ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The cache of `datasets` in a folder of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_streaming_reads_the_hubs_layout_with_names_or_numbers_for_classes(tmp_path):
    for name, classes in (("named", "abc"), ("plain", None)):
        write_images(tmp_path / name, "train", [number_image(i) for i in range(6)], [0, 1, 2, 0, 1, 2], classes=classes)
        write_images(tmp_path / name, "validation", [number_image(9), number_image(8)], [2, 0], classes=classes)
        data = load(data="streaming", data_dir=str(tmp_path / name), img_size=8, crop_pct=1.0)
        assert data.classes == (tuple("abc") if classes else ("0", "1", "2")) and len(data.train) == 6
        assert data.test.images.labels.tolist() == [2, 0]
        assert [data.test.images[i][0].getpixel((0, 0))[0] for i in range(2)] == [9, 8]


def test_a_data_set_of_the_hub_is_opened_by_name_as_a_stream(tmp_path, monkeypatch):
    import datasets

    for part, numbers in (("train", range(4)), ("validation", range(2))):
        write_images(tmp_path, part, [number_image(i) for i in numbers], [0] * len(numbers), classes="ab")
    real, asked = datasets.load_dataset, []

    def local(name, **how):
        asked.append((name, how))
        path = str(next(tmp_path.glob(f"{how['split']}-*.parquet")))
        found = real("parquet", data_files=path, split="train", streaming=how.get("streaming", False))
        found.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=4)})
        return found

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "validation", "test"])
    data = load(data="streaming", hub="owner/pictures", img_size=8)
    assert asked == [
        ("owner/pictures", {"split": "train", "streaming": True}),
        ("owner/pictures", {"split": "validation"}),
    ]
    assert len(data.train) == 4 and len(data.test) == 2 and data.classes == ("a", "b")


def test_a_data_set_that_the_hub_does_not_have_is_told(monkeypatch):
    import datasets

    def missing(name):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/none' doesn't exist on the Hub.\nSecond line.")

    monkeypatch.setattr(datasets, "get_dataset_split_names", missing)
    assert "the data set owner/none cannot be opened" in one_sentence(data="streaming", hub="owner/none")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "other"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **how: None)
    assert "no split validation or valid or val or test: it has train, other" in one_sentence(
        data="streaming", hub="owner/none"
    )
