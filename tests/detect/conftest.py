"""Generated data sets that the detection tests share."""

import os
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from detect_helpers import write_set


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and device for the whole process; tests differ in them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def clean_set(tmp_path_factory) -> Path:
    """Eight training and six validation images with three boxes and masks each."""
    return write_set(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="session")
def faulty_set(tmp_path_factory) -> Path:
    """The same with every fault that is reported, in both splits."""
    return write_set(tmp_path_factory.mktemp("faulty"), faults=True)


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The folder of the real BCCD images."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("DENSE_SHORTCUTS_DATA", default)) / "bccd"
    if not folder.is_dir():
        pytest.skip(f"no BCCD in {folder}: set DENSE_SHORTCUTS_DATA to a folder that holds bccd/")
    return folder.resolve()
