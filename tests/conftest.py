"""Settings that every test shares."""

import importlib.util
import os

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

    import dense_shortcuts.ops.triton
    import dense_shortcuts.ops.triton_forms  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
