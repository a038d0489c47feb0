"""What is told of a call's memory."""

import torch
from torch import Tensor

from dense_shortcuts.experiments.profiling import peak_bytes

CPU = torch.device("cpu")


def test_memory_is_added_up_in_the_order_of_time_within_one_operation_too():
    def step() -> None:
        with torch.profiler.record_function("all"):
            for _ in range(3):
                torch.empty(1000)  # float32, and gone at once

    assert peak_bytes(step, [torch.empty(10)], CPU) == 4 * 1000 + 4 * 10


def test_compiled_code_holds_no_more_than_what_is_live_in_it():
    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x = x @ x
        return x

    compiled, x = torch.compile(chain), torch.eye(64)
    compiled(x)
    assert peak_bytes(lambda: compiled(x), [x], CPU) == 3 * 4 * 64 * 64  # x, and two products at a time
