"""That dense shortcuts raise accuracy, by a real run of minutes: `make accuracy`, not part of the default tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import TWINS

from dense_shortcuts import recipes
from dense_shortcuts.experiments.train.config import read_yaml

DSNET = Path(sys.executable).with_name("dsnet")
RECIPE = recipes.find("cifar100-cpu")


@pytest.mark.accuracy
def test_dsnet_beats_its_resnet_twin_on_a_subset_of_cifar100(cifar100, tmp_path):
    """Nearest start and group norm, as the recipe has them."""
    config = read_yaml(RECIPE)
    assert (config.aggregate, config.norm, config.init) == ("stage", "group", "nearest")
    where = ["--recipe", RECIPE, "--data-dir", cifar100, "--output", tmp_path, "--name", "run"]
    command = [DSNET, "compare", *TWINS, *where]
    subprocess.run(command, check=True)
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    host, dense = table["networks"]
    assert (host["network"], dense["network"]) == ("identity", "stage-group-nearest")
    assert dense["test_top1"] > host["test_top1"] > 5, table["verdict"]  # a hundred classes: chance is 1 %
    assert table["paired"][0]["p_value"] < 0.05, table["verdict"]
