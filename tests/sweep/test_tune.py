"""Learning rates that a sweep chooses on validation images."""

from pathlib import Path

import pytest
from sweep.conftest import BASE

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.sweep.spec import read_sweep, tuning
from dense_shortcuts.experiments.train.config import read_yaml
from dense_shortcuts.experiments.train.loop import read_metrics

TUNED = f"""{BASE}
grid:
  - {{name: host, settings: {{aggregate: identity}}}}
  - {{name: DSNet, settings: {{norm: batch}}}}
seeds: [0, 1]
tune: {{lr: [1.0e-6, 0.05], validation: 30}}
"""


def test_each_row_takes_the_best_rate_on_validation_images_and_is_tested_on_the_others(capsys):
    Path("t.yaml").write_text(TUNED)
    assert main(["sweep", "t.yaml"]) == 0
    for row, label in (("host", "identity"), ("dsnet", "stage-batch")):
        scores = {}
        for rate in ("1e-06", "0.05"):
            tried = Path("runs/t/tune") / f"{row}-lr-{rate}" / "seed-0"
            assert read_yaml(tried / "config.yaml").validation == 30
            scores[float(rate)] = read_metrics(tried / label / "metrics.jsonl")[-1]["test_top1"]
        for seed in (0, 1):
            config = read_yaml(Path("runs/t") / row / f"seed-{seed}" / "config.yaml")
            assert config.validation is None
            assert scores[config.lr] == max(scores.values())
    table = Path("runs/t/table.md").read_text()
    assert "the best of 1e-06, 0.05 on 30 validation images" in table

    capsys.readouterr()
    assert main(["sweep", "t.yaml", "--status"]) == 0
    said = capsys.readouterr().out
    assert "DSNet, lr 0.05, seed 0: done" in said and "4 runs: 4 done" in said


def test_rates_are_tried_with_the_first_seed_alone():
    Path("t.yaml").write_text(TUNED)
    cells = tuning(read_sweep(Path("t.yaml"))).cells()
    assert [(cell.row, cell.seed) for cell in cells[:2]] == [("host, lr 1e-06", 0), ("host, lr 0.05", 0)]
    assert len(cells) == 4


@pytest.mark.parametrize(
    "tune", ["0.1", "{lr: [0.1, 0.2]}", "{lr: [0.1], validation: 9}", "{lr: [0, 1], validation: 9}", "{lr: [a, b]}"]
)
def test_another_form_is_refused(tune):
    Path("t.yaml").write_text(TUNED.replace("{lr: [1.0e-6, 0.05], validation: 30}", tune))
    with pytest.raises(DenseShortcutError, match=r"`tune:` of t.yaml must be of the form"):
        read_sweep(Path("t.yaml"))
