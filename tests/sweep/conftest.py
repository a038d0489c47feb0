"""Sweeps of a second or two on the digits, whose costs are measured by a single step each."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from dense_shortcuts.experiments.sweep import costs

BASE = """base: {model: dsnet20, img_size: 8, crop_padding: 1, limit_train: 96, limit_test: 50, batch_size: 32,
  epochs: 2, warmup_epochs: 0, lr: 0.05, tracker: none}
"""
SWEEP = f"""{BASE}
grid:
  - {{name: host, settings: {{aggregate: identity}}, published: 12.3 (a source)}}
  - {{name: DSNet, settings: {{norm: batch}}}}
seeds: [0, 1]
"""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and device for the whole process; tests differ in them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "LEAST_SECONDS", 0.0)
    Path("s.yaml").write_text(SWEEP)
