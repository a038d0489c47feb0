"""The configuration: YAML both ways, and one sentence for each thing that is wrong."""

import dataclasses

import pytest

from dense_shortcuts import DenseShortcutError, recipes
from dense_shortcuts.experiments.train.config import TrainConfig, read_yaml, write_yaml

RECIPES = [
    path
    for path in sorted(recipes.FOLDER.glob("*.yaml"))
    if "\ngrid:" not in path.read_text()  # that is a sweep's file
    and not path.name.startswith("detect")
]


def test_every_field_survives_a_yaml_round_trip(tmp_path):
    config = TrainConfig(
        model="resnet18",
        aggregate="block",
        norm="none",
        groups=4,
        init="uniform",
        inner=True,
        keep_identity=True,
        data="imagefolder",
        data_dir="somewhere",
        img_size=48,
        milestones=(3, 5),
        sched="multistep",
        epochs=9,
        weight_decay=5e-5,
        auto_augment="rand-m9-mstd0.5",
        flip=False,
        ema_decay=0.99,
        precision="no",
        name="yes",
        seed=7,
    )
    (tmp_path / "c.yaml").write_text(write_yaml(config))
    assert read_yaml(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_read_and_names_a_known_model(path):
    import timm

    config = read_yaml(path)
    assert timm.is_model(config.model) and config.data != "digits"
    assert read_yaml(path) == dataclasses.replace(config)


def test_the_20_epoch_recipe_is_the_one_that_was_measured():
    config = read_yaml(next(p for p in RECIPES if p.stem == "cifar100-20ep"))
    measured = ("dsnet50_cifar", 20, 512, "sgd", 0.4, "cosine", 3, 5e-4, 0.1, "bf16", True, 0)
    fields = "model epochs batch_size opt lr sched warmup_epochs weight_decay smoothing precision channels_last seed"
    assert tuple(getattr(config, field) for field in fields.split()) == measured


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch': did you mean 'epochs'"),
        ("epochs: many", "epochs in .* is 'many': it must be a whole number"),
        ("epochs: 2.5", "it must be a whole number"),
        ("epochs: true", "it must be a whole number"),
        ("lr: fast", "lr in .* is 'fast': it must be a number"),
        ("compile: 1", "it must be true or false"),
        ("norm: grup", "choose one of group, batch, layer, instance, none"),
        ("milestones: 3", "it must be a list"),
        ("- epochs", "must hold lines of the form"),
        ("epochs: [", "is not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_told_in_one_sentence(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(DenseShortcutError, match=message) as caught:
        read_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_numbers_without_a_point_and_a_bare_no_are_read_as_meant(tmp_path):
    (tmp_path / "c.yaml").write_text("weight_decay: 5e-4\nlr: 1\nprecision: no\nclip_grad: 2\n")
    config = read_yaml(tmp_path / "c.yaml")
    assert (config.weight_decay, config.lr, config.precision, config.clip_grad) == (5e-4, 1.0, "no", 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"smoothing": 1.0}, "--smoothing is 1.0"),
        ({"warmup_epochs": 3, "epochs": 3}, "leaves nothing of 3 epochs"),
        ({"sched": "multistep"}, "needs --milestones"),
        ({"mixup": 0.2, "batch_size": 31}, "is odd"),
        ({"name": "../elsewhere"}, "not a plain folder name"),
        ({"crop_pct": 1.2}, "--crop-pct 1.2 is above 1"),
        ({"max_broken": 1.0}, "--max-broken is 1.0"),
        ({"aug_repeats": 0}, "--aug-repeats is 0"),
        ({"validation": 0}, "--validation is 0"),
        ({"validation": 5, "data": "streaming"}, "--validation does not go with --data streaming"),
        ({"hub": "a/b"}, "--hub goes with --data streaming"),
        ({"hub": "a/b", "data": "streaming", "data_dir": "."}, "stands in for --data-dir"),
        ({"bce_threshold": 0.2}, "--bce-threshold goes with --loss bce"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(DenseShortcutError, match=message):
        TrainConfig(**settings).resolved()


def test_what_the_data_set_decides_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_SHORTCUTS_DATA", str(tmp_path))
    cifar = TrainConfig(data="cifar100").resolved()
    assert (cifar.img_size, cifar.flip, cifar.crop_padding) == (32, True, 4)
    assert cifar.data_dir == str(tmp_path.resolve() / "cifar100")
    tiny = TrainConfig(data="tiny-imagenet").resolved()
    assert (tiny.img_size, tiny.crop_padding, tiny.crop_pct, tiny.interpolation) == (64, 8, 1.0, "bilinear")
    assert tiny.data_dir == str(tmp_path.resolve() / "tiny-imagenet")
    for data in ("imagefolder", "parquet", "streaming", "webdataset"):
        photographs = TrainConfig(data=data).resolved()
        assert (photographs.img_size, photographs.crop_padding, photographs.data_dir) == (224, None, None)
        assert (photographs.crop_pct, photographs.interpolation, photographs.flip) == (0.875, "bicubic", True)
    digits = TrainConfig(data="digits", flip=True).resolved()
    assert (digits.flip, digits.workers, digits.data_dir) == (True, 0, None)


def test_the_warm_up_follows_the_epochs_unless_it_is_given():
    assert [TrainConfig(epochs=epochs).resolved().warmup_epochs for epochs in (1, 2, 30)] == [0, 1, 1]
    assert TrainConfig(epochs=1, warmup_epochs=0).resolved().warmup_epochs == 0
