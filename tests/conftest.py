"""Settings that every test shares."""

import importlib.util
import os
import sysconfig
from pathlib import Path

# The tests' work is tiny: threads cost more than they give, and sums must not depend on their number. Set before torch
# is imported, and for all processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from ci_skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 (hooks)

# Without a GPU the Triton kernels run in Triton's interpreter. Triton asks for it as it is first imported, which timm
# does, and as a kernel is defined; nothing else is to run in it.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401 (which Triton loads at the first launch)

    import dense_shortcuts.ops.backends.triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

# As in an active environment: commands that the program prints then name `dsnet` without its path.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)  # a command may have set another number
    torch.manual_seed(0)


def real_data(name: str) -> Path:
    """The folder of a real data set; without it the test is skipped."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DENSE_SHORTCUTS_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is no folder: set DENSE_SHORTCUTS_DATA to one that holds {name}/")
    return folder.resolve()


@pytest.fixture(scope="session")
def cifar100() -> Path:
    """The real CIFAR-100 parquet files."""
    return real_data("cifar100")


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The real BCCD images."""
    return real_data("bccd")
