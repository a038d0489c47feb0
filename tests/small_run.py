"""A finished comparison on a few digits, for tests of what looks into runs."""

import contextlib
import os
from pathlib import Path

from accelerate.state import AcceleratorState

from dense_shortcuts.cli import main

TWINS = ["--networks", "host", "dsnet", "--seeds", "0"]  # of `dsnet compare`: two networks, once
SETTINGS = [
    *("--data=digits", "--model=dsnet20", "--img-size=8", "--crop-padding=1", "--limit-train=96", "--limit-test=50"),
    *("--batch-size=32", "--epochs=2", "--lr=0.05"),
]


def small_run(folder: Path, name: str = "small") -> Path:
    """Train a DSNet-20 and its twin for two epochs of three steps; gives the run's folder, runs/`name` in `folder`."""
    # Accelerate keeps precision and device for the whole process; other tests differ in them.
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.chdir(folder), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        assert main(["compare", *TWINS, *SETTINGS, "--name", name]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "runs" / name
