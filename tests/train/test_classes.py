"""Training on some of the classes: which images stay, how they are numbered, and what is refused."""

import numpy as np
import pytest
from test_data_sources import write_images
from train_helpers import number_image, png

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.checkpoint import read_model
from dense_shortcuts.experiments.train.config import TrainConfig, class_numbers
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.fingerprint import fingerprints
from dense_shortcuts.experiments.train.run import evaluate

LABELS = [0, 1, 2, 3, 4, 1, 2, 0, 4, 3]


def load(**settings):
    return load_data(TrainConfig(**{"workers": 0, "img_size": 8, "crop_padding": 0} | settings).resolved())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Ten images of five classes, which say their number in red, in each layout; test images the same."""
    folder = tmp_path_factory.mktemp("classes")
    images = [number_image(i) for i in range(10)]
    for part in ("train", "test"):
        write_images(folder / "cifar10", part, images, LABELS, image="img")
        write_images(folder / "cifar100", part, images, LABELS, image="img", label="fine_label")
        write_images(folder / "parquet", part, images, LABELS, classes="abcde")
        for number, label in enumerate(LABELS):
            for name in ("imagefolder", "tiny-imagenet"):
                place = folder / name / part / "abcde"[label]
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.png").write_bytes(images[number])
    return folder


@pytest.mark.parametrize("loader", ["auto", "workers"])
@pytest.mark.parametrize("data", ["cifar10", "cifar100", "tiny-imagenet", "imagefolder", "parquet"])
def test_images_of_other_classes_are_left_out_and_labels_numbered_anew(folders, data, loader):
    everything = load(data=data, data_dir=str(folders / data))
    some = load(data=data, data_dir=str(folders / data), classes="1,3-4", loader=loader)
    assert some.classes == tuple(everything.classes[i] for i in (1, 3, 4))
    for part in ("train", "test"):
        images = getattr(some, part).images
        numbers = [images[i][0].getpixel((0, 0))[0] for i in range(len(images))]
        assert sorted(numbers) == [1, 3, 4, 5, 8, 9]
        for i, number in enumerate(numbers):
            label = [1, 3, 4].index(LABELS[number])
            assert images[i][1] == images.labels[i] == label
            epoch_and_place = (0, i)
            assert int(getattr(some, part)[epoch_and_place][1]) == label


def test_the_digits_too():
    some, everything = load(data="digits", classes="7-9"), load(data="digits")
    assert some.classes == ("7", "8", "9")
    for part in ("train", "test"):
        mine, all_ = getattr(some, part).images, getattr(everything, part).images
        kept = np.flatnonzero(all_.labels >= 7)
        assert np.array_equal(mine.labels, all_.labels[kept] - 7) and set(mine.labels) == {0, 1, 2}
        assert np.array_equal(mine.pixels, all_.pixels[kept])


def test_a_limit_is_of_the_images_of_the_chosen_classes():
    some = load(classes="7-9", limit_train=50, limit_test=20)
    assert (len(some.train), len(some.test)) == (50, 20)
    assert set(some.train.images.labels) == {0, 1, 2}
    assert fingerprints(some) == fingerprints(load(classes="7-9", limit_train=50, limit_test=20))


def test_the_fingerprint_knows_the_classes():
    found = [fingerprints(load(classes=classes, limit_train=60, limit_test=20)) for classes in (None, "0-4", "5-9")]
    for part in ("train", "test", "classes"):
        assert len({each[part] for each in found}) == 3


def test_ranges_and_numbers_may_overlap_and_come_in_any_order():
    assert class_numbers("8-9, 3,0-1,9") == (0, 1, 3, 8, 9)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1,,2", "5-3", "0:4", "1.5"])
def test_another_form_is_told(text):
    with pytest.raises(DenseShortcutError, match=r"is not of the form 0-79 or 3,5,8-9: give numbers and ranges\.$"):
        TrainConfig(classes=text).resolved()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": "3"}, "is one class: give at least two"),
        ({"classes": "8-10"}, "names class 10: fashion has the classes 0 to 9"),
        ({"classes": "0-1", "data": "streaming"}, "does not go with --data streaming, whose labels are known only as"),
        ({"classes": "0-1", "data": "webdataset"}, "does not go with --data webdataset"),
    ],
)
def test_classes_that_cannot_be_had_are_told(settings, message):
    with pytest.raises(DenseShortcutError, match=message):
        load(**settings)


@pytest.mark.parametrize(
    ("data", "classes", "message"),
    [
        ("cifar100", "80-100", "names class 100: cifar100 has the classes 0 to 99"),
        ("imagefolder", "4-5", "names class 5: imagefolder has the classes 0 to 4"),
        ("cifar10", "5-9", "without a row of the wanted classes"),
    ],
)
def test_classes_without_images_are_told(folders, data, classes, message):
    with pytest.raises(DenseShortcutError, match=message):
        load(data=data, data_dir=str(folders / data), classes=classes)


def test_a_set_without_a_test_image_of_the_classes_is_told(tmp_path):
    for part, labels in (("train", [0, 1, 2, 3]), ("test", [0, 1, 0, 1])):
        write_images(tmp_path, part, [png(i) for i in range(4)], labels, classes="abcd")
    with pytest.raises(DenseShortcutError, match="parquet has no test image of --classes '2-3': take others"):
        load(data="parquet", data_dir=str(tmp_path), classes="2-3")


def test_a_trained_network_knows_its_classes_and_is_scored_on_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["--img-size=8", "--crop-padding=1", "--limit-train=64", "--limit-test=30", "--batch-size=32"]
    tiny += ["--epochs=1", "--warmup-epochs=0", "--tracker=none", "--classes=7-9", "--name=a", "--data=digits"]
    assert main(["train", "--model=dsnet20", *tiny]) == 0
    folder = tmp_path / "runs/a/stage-auto"
    model, card = read_model(folder)
    assert model.num_classes == 3 and card["classes"] == ["7", "8", "9"]
    assert evaluate(folder)["images"] == 30
    (tmp_path / "runs/a/config.yaml").unlink()  # the folder alone knows them too
    assert evaluate(folder)["images"] == (load(data="digits").test.images.labels >= 7).sum()
