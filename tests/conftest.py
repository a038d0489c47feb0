"""Settings that every test shares."""

import importlib.util
import os

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
def one_thread_and_a_seed():
    """The tests' work is tiny: threads cost more than they give, and sums must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
