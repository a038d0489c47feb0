"""The host that is widened to another row's cost, with measurements that are made up; and one measured for real."""

import json
from pathlib import Path

import pytest
import timm
from sweep.conftest import BASE

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.sweep import costs
from dense_shortcuts.experiments.sweep.spec import read_sweep
from dense_shortcuts.experiments.train.measure import parameters
from dense_shortcuts.experiments.train.network import build_network

BIGGER = f"""{BASE}
grid:
  - {{name: DSNet}}
  - {{name: bigger, settings: {{aggregate: identity}}, same_budget_as: DSNet}}
seeds: [0]
"""


@pytest.fixture
def bigger():
    Path("b.yaml").write_text(BIGGER)
    return read_sweep(Path("b.yaml"))


def made_up(speed_of_target: float, bytes_of_target: float):
    """Costs that follow from the width alone: 1600 / width images/s and width MB."""

    def measure(configs, num_classes):
        host, target = configs
        width = sum(host.channels) / 7
        assert not target.channels
        return [
            {"train_images_per_second": 1600 / width, "peak_bytes": width},
            {"train_images_per_second": speed_of_target, "peak_bytes": bytes_of_target},
        ]

    return measure


@pytest.mark.parametrize(
    ("speed", "memory", "channels"),
    [
        (100.0, 16.0, [16, 32, 64]),  # costs what the host does
        (99.0, 16.0, [16, 34, 68]),  # the first width with at least its time: 118 / 7
        (80.0, 16.0, [20, 40, 80]),
        (99.0, 22.0, [22, 44, 88]),  # and at least its memory
    ],
)
def test_the_narrowest_host_with_at_least_the_time_and_the_memory(
    speed, memory, channels, bigger, monkeypatch, tmp_path
):
    monkeypatch.setattr(costs, "costs", made_up(speed, memory))
    expected = next(c for c in widths() if 1600 / (sum(c) / 7) <= speed and sum(c) / 7 >= memory)
    settled = costs.with_budgets(bigger, tmp_path, 10)
    assert settled.rows[1].config.channels == expected == tuple(channels)
    assert settled.rows[0] == bigger.rows[0]
    kept = json.loads((tmp_path / costs.BUDGET).read_text())["bigger"]
    assert kept["channels"] == list(expected) and {"channels", "cost", "goal"} == set(kept["tried"][0])


def widths() -> list[tuple[int, ...]]:
    return [tuple(c * k // 32 * 2 for c in (16, 32, 64)) for k in range(16, 33)]


def test_a_width_that_was_settled_is_not_measured_again(bigger, monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "costs", made_up(80.0, 16.0))
    first = costs.with_budgets(bigger, tmp_path, 10)
    monkeypatch.setattr(costs, "costs", made_up(70.0, 16.0))
    assert costs.with_budgets(bigger, tmp_path, 10) == first


def test_a_host_that_stays_cheaper_is_told(bigger, monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "costs", made_up(10.0, 16.0))
    with pytest.raises(DenseShortcutError, match="'bigger' stays cheaper than 'DSNet' at 2 times its width"):
        costs.with_budgets(bigger, tmp_path, 10)


def test_stage_widths_are_the_hosts_own_and_only_resnets_have_them():
    assert costs.stage_channels(timm.create_model("resnet50"), "x") == [64, 128, 256, 512]
    assert costs.stage_channels(timm.create_model("dsnet20"), "x") == [16, 32, 64]
    with pytest.raises(DenseShortcutError, match="no ResNet of timm's"):
        costs.stage_channels(timm.create_model("densenet121"), "x")


def test_measured_costs_are_of_each_rows_own_network(bigger):
    dense, host = costs.costs([row.config for row in bigger.rows], 10)
    for cost, row in zip((dense, host), bigger.rows, strict=True):
        assert cost["parameters"] == parameters(build_network(row.config, 10))
        assert cost["train_images_per_second"] > 0
    assert dense["multiply_adds"] > host["multiply_adds"] and dense["peak_bytes"] > host["peak_bytes"]


def test_channels_and_layers_reach_the_host_and_come_back_from_its_card():
    config = read_sweep(Path("s.yaml"), ["channels=[8, 16, 24]", "layers=[1, 2, 1]"]).rows[0].config
    model = build_network(config, 10)
    assert [len(model.layer1), len(model.layer2), len(model.layer3)] == [1, 2, 1]
    assert costs.stage_channels(model, "x") == [8, 16, 24]
    with pytest.raises(DenseShortcutError, match="densenet121 cannot be built with channels as given"):
        build_network(read_sweep(Path("s.yaml"), ["channels=[8, 16]", "model=densenet121"]).rows[0].config, 10)
