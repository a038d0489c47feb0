"""The shortcut weights' summary against the weights themselves, through training, files and the command."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.explain.shortcuts import course, grid, read_shortcuts
from dense_shortcuts.experiments.train.checkpoint import read_model
from dense_shortcuts.experiments.weight_log import SHORTCUTS, read_record, record, start_summary, weight_summary


def test_the_summary_has_mean_and_spread_of_every_pair(tiny_dsnet):
    model = tiny_dsnet()
    found = weight_summary(model)["stages"]
    assert list(found) == ["layer1", "layer2", "layer3"]
    for name, rows in found.items():
        weights = ds.dense_stages(model)[name].shortcut.weights
        assert [len(row) for row in rows["mean_abs"]] == list(range(1, len(weights) + 1))
        for k, weight in enumerate(weights):
            for i in range(k + 1):
                channels = weight[i].detach().double().numpy()
                assert rows["mean_abs"][k][i] == pytest.approx(np.abs(channels).mean(), rel=1e-5)
                assert rows["spread"][k][i] == pytest.approx(channels.std(), rel=1e-5)


def test_inner_weights_are_summed_up_by_block_and_controls_without_weights_left_out():
    model = ds.models.dsnet.dsnet29(inner=True)
    with torch.no_grad():
        model.layer2[1].inner.weight[0] = -64.0
    inner = weight_summary(model)["inner"]
    assert len(inner) == 9 - 2  # the 3x3 of a block that changes the resolution has none
    assert inner["layer2.1"] == {"mean_abs": 2.0, "spread": pytest.approx(np.std([-64] + [0] * 31), rel=1e-5)}
    assert weight_summary(ds.models.dsnet.dsnet20(aggregate="dense_identity")) == {"stages": {}, "inner": {}}


@pytest.mark.parametrize(
    "options",
    [
        *({"init": init} for init in ("nearest", "uniform", "ones", "zeros")),
        {"weighting": "softmax"},
        {"weighting": "gate", "pattern": "powers"},
        {"window": 2},
    ],
)
def test_the_start_is_that_of_a_new_network(options):
    model = ds.models.dsnet.dsnet56(**options)
    assert start_summary(model)["stages"] == weight_summary(model)["stages"]


def test_each_row_of_a_container_has_its_own_place(tmp_path):
    model = ds.plug_in(timm.create_model("convit_tiny", depth=4, local_up_to_layer=2, embed_dim=8, num_heads=2))
    found = weight_summary(model)["stages"]
    assert [(name, len(rows["spread"])) for name, rows in found.items()] == [("blocks", 2), ("blocks.shortcut2", 2)]
    assert found == start_summary(model)["stages"]
    second = timm.create_model("convit_tiny", depth=4, local_up_to_layer=2, embed_dim=8, num_heads=2)
    record(tmp_path / SHORTCUTS, 1, ds.plug_in(second, blocks=r"blocks\.3"))
    assert list(read_record(tmp_path / SHORTCUTS)[0]["stages"]) == ["blocks.shortcut2"]


def test_a_pair_that_is_not_summed_has_no_number(tiny_dsnet):
    rows = weight_summary(tiny_dsnet(window=1))["stages"]["layer2"]["mean_abs"]
    assert [[value is None for value in row] for row in rows] == [[False], [True, False], [True, True, False]]
    assert weight_summary(tiny_dsnet(weighting="attention", init="uniform"))["stages"] == {}


def test_an_epoch_trained_twice_counts_once_and_a_cut_line_is_left_out(tiny_dsnet, tmp_path):
    model, path = tiny_dsnet(), tmp_path / SHORTCUTS
    for epoch in (1, 2, 3):
        record(path, epoch, model)
    with torch.no_grad():
        model.layer1.shortcut.weights[0].fill_(9.0)
    record(path, 2, model)  # resumed from the state after epoch 1
    with path.open("a") as file:
        file.write('{"epoch": 3, "sta')
    rows = read_record(path)
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["stages"]["layer1"]["mean_abs"][0] == [9.0]
    path.write_text("{\n" + path.read_text())
    with pytest.raises(DenseShortcutError, match="line 1 of"):
        read_record(path)


def test_a_host_leaves_no_record(tiny_host, tmp_path):
    record(tmp_path / SHORTCUTS, 1, tiny_host())
    assert not (tmp_path / SHORTCUTS).exists() and read_record(tmp_path / SHORTCUTS) == []


def test_training_records_each_epoch_and_the_command_draws_it(trained, tmp_path, capsys):
    assert main(["shortcuts", str(trained), "--output", str(tmp_path / "out" / "map.png")]) == 0
    told = capsys.readouterr().out
    assert told.count("3 blocks, 6 pairs") == 3 and "layer3" in told
    model, _ = read_model(trained)
    report = json.loads((tmp_path / "out" / "map.json").read_text())
    assert list(report["stages"]) == ["layer1", "layer2", "layer3"]
    for name, stage in report["stages"].items():
        weights = [w.detach() for w in ds.dense_stages(model)[name].shortcut.weights]
        assert stage["mean_abs"][2] == pytest.approx(weights[2].abs().mean(1).tolist(), rel=1e-5)
        assert stage["start"] == [[1.0], [0.5, 0.5], pytest.approx([1 / 3] * 3, abs=1e-6)]
        assert (
            stage["change"][2][0] == pytest.approx(stage["mean_abs"][2][0] - 1 / 3, abs=2e-6) and stage["change"][2][0]
        )
        assert [row["epoch"] for row in stage["history"]] == [1, 2]
        assert stage["history"][-1]["mean_abs"] == stage["mean_abs"] != stage["history"][0]["mean_abs"]
    with Image.open(tmp_path / "out" / "map.png") as picture:
        assert picture.size == (1440, 960)


def test_the_course_is_the_mean_by_distance_from_the_start_on(trained):
    stage = read_shortcuts(str(trained)).stages[0]
    found = course(stage)
    assert [found[1][0], found[2][0], found[3][0]] == [
        (0, pytest.approx(mean, abs=1e-5)) for mean in (11 / 18, 5 / 12, 1 / 3)
    ]
    rows = stage.history[1][1]
    assert found[2][2] == (2, pytest.approx((rows[1][0] + rows[2][1]) / 2))
    assert np.isnan(grid(rows)[0, 1]) and grid(rows)[2, 1] == rows[2][1]


def test_networks_without_shortcut_weights_and_wrong_outputs_are_refused(capsys, tmp_path):
    assert main(["shortcuts", "resnet18", "--output", str(tmp_path / "a.png")]) == 2
    assert "resnet18 has no shortcut weights to look at" in capsys.readouterr().err
    assert main(["shortcuts", "dsnet20", "--output", str(tmp_path / "a.jpg")]) == 2
    assert list(tmp_path.iterdir()) == []
