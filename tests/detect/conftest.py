"""Generated data sets that the detection tests share."""

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
