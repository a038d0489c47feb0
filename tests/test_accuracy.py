"""What the README says of accuracy, run again on real CIFAR-100; kept out of the default run (`make accuracy`)."""

import json
import os
from pathlib import Path

import pytest

from dense_shortcuts.cli import main

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DENSE_SHORTCUTS_DATA", ROOT.parent / "shared" / "data")) / "cifar100"


@pytest.mark.accuracy
def test_dsnet_beats_its_twin_in_a_short_run_on_a_subset_of_cifar100(tmp_path, monkeypatch):
    if not DATA.is_dir():
        pytest.skip(f"no CIFAR-100 in {DATA}: set DENSE_SHORTCUTS_DATA")
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes" / "cifar100-cpu.yaml")
    assert main(["compare", "--recipe", recipe, "--data-dir", str(DATA), "--name", "run"]) == 0
    host, dense = json.loads((tmp_path / "runs" / "run" / "table.json").read_text())["networks"]
    assert (host["network"], dense["network"]) == ("identity", "stage-group")
    assert dense["test_top1"] > host["test_top1"]
