"""`dsnet prune`: what it says, leaves and trains on."""

import json
import signal

import pytest
import torch

import dense_shortcuts as ds
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.checkpoint import read_model


@pytest.mark.long
def test_the_command_leaves_a_checkpoint_that_builds_itself_and_trains_on(trained, tmp_path, capsys):
    assert main(["prune", str(trained), "--keep", "0.5"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "9 of 18 pairs kept" in said and "images/s before" in said
    left = tmp_path / "runs" / "a-keep-0.5"
    figures = json.loads((left / "prune.json").read_text())
    net, card = read_model(left / "stage-group")
    assert sum(len(maps) for each in card["sources"].values() for maps in each) == 9
    assert main(["eval", str(left / "stage-group")]) == 0
    assert f"accuracy {figures['tuned']['start']:.2f} %" in capsys.readouterr().out

    assert main(["prune", str(left / "stage-group"), "--keep", "1", "--epochs", "1", "--name", "on"]) == 0
    assert "9 of 9 pairs kept" in capsys.readouterr().out
    further, _ = read_model(tmp_path / "runs" / "on" / "stage-group")
    weights = [dict(ds.shortcut_parameters(model)) for model in (net, further)]
    assert weights[0].keys() == weights[1].keys()
    assert all(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert main(["prune", str(trained), "--keep", "0.5"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_interrupted_one_names_the_folder_that_it_leaves(trained, tmp_path, monkeypatch, capsys):

    def stop(*given):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("dense_shortcuts.experiments.train.tune.train_network", stop)
    assert main(["prune", str(trained), "--keep", "0.5", "--epochs", "1", "--name", "cut"]) == 130
    said = capsys.readouterr().err.strip()
    assert said == "dsnet: interrupted: runs/cut was not trained to its end: remove it, or take another --name."
    assert (tmp_path / "runs" / "cut" / "config.yaml").is_file()
