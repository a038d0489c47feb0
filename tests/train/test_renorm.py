"""Another norm for a trained network: the weights stay, the statistics come from the images, training goes on."""

import json

import pytest
import torch

import dense_shortcuts as ds
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.renorm import renorm, take_weights
from dense_shortcuts.experiments.train.checkpoint import read_model
from dense_shortcuts.experiments.train.config import TrainConfig, TuneConfig
from dense_shortcuts.experiments.train.network import build_network


def test_batch_norm_takes_the_place_of_group_norm_and_training_goes_on(trained, tmp_path, capsys):
    assert main(["renorm", str(trained), "--epochs", "1", "--lr", "0.01"]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "a-batch" / "stage-batch"
    said = capsys.readouterr().out
    figures = json.loads((folder.parent / "renorm.json").read_text())
    assert f"accuracy {figures['end']:.2f} % with batch norm after 1 epochs, {figures['start']:.2f} % before" in said
    net, card = read_model(folder)
    assert card["shortcut"]["norm"] == "batch" and card["epochs"] == 1
    stage = next(iter(ds.dense_stages(net).values()))
    assert all(isinstance(norm, torch.nn.BatchNorm2d) for norm in stage.shortcut.norms)
    assert main(["eval", str(folder)]) == 0
    assert f"accuracy {figures['end']:.2f} %" in capsys.readouterr().out


def test_without_epochs_the_weights_stay_and_statistics_are_those_of_the_images(trained, tmp_path):
    before, _ = read_model(trained)
    done = renorm(trained, "batch", TuneConfig(name="b"))
    assert done.tuned.start == done.tuned.end
    after, _ = read_model(tmp_path / "runs" / "b" / "stage-batch")
    state = after.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.state_dict().items())
    norms = [n for s in ds.dense_stages(after).values() for n in s.shortcut.norms]
    assert all(n.num_batches_tracked == 3 and n.running_mean.abs().max() > 0 for n in norms)  # 96 images by 32


def test_what_cannot_change_its_norm_is_refused(trained):
    for norm, name, fault in (("group", "b", "has norm=group already"), ("batch", "a", "exists already")):
        with pytest.raises(ds.DenseShortcutError, match=fault):
            renorm(trained, norm, TuneConfig(name=name))
    host = build_network(TrainConfig(aggregate="identity"), 10)
    with pytest.raises(ds.DenseShortcutError, match="differ in more than their norms"):
        take_weights(build_network(TrainConfig(), 10), host)
