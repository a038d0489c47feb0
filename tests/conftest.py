"""Settings that every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """The tests' work is tiny: threads cost more than they give, and sums must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
