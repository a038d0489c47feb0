"""What `dsnet bench --gpu` checks: the Triton passes, here in Triton's interpreter (tests/conftest.py), and its eye."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dense_shortcuts.experiments.bench.passes import (
    LAYOUTS,
    LENGTHS,
    ODD,
    PASSES,
    TOLERANCE,
    Case,
    cases,
    fault,
    faults,
)
from dense_shortcuts.ops.backends import reference

GPU = torch.cuda.is_available()
CASES = list(cases())


def test_the_cases_have_every_pass_in_every_dtype_layout_and_odd_size():
    for name in PASSES:
        mine = [case for case in CASES if case.name == name]
        assert {(case.dtype, case.layout) for case in mine} == {(d, layout) for d in TOLERANCE for layout in LAYOUTS}
        for layout in LAYOUTS:
            for shape in ODD:
                assert {c.rows for c in mine if (c.shape, c.layout) == (shape, layout)} == {1, shape[0]}
        assert name == "moments" or set(LENGTHS) <= {case.length for case in mine}
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("name", PASSES)
def test_triton_agrees_with_the_reference(name):
    kernels = pytest.importorskip("dense_shortcuts.ops.backends.triton", reason="triton is not installed")
    some = [case for case in CASES if case.name == name and (case.shape == ODD[0] or case.length == 9)]
    assert {case.dtype for case in some} == set(TOLERANCE)
    for case in some:
        assert fault(case, kernels, "cuda" if GPU else "cpu") is None, case


def changed(change: Callable[[Tensor], Tensor], place: int = -1) -> SimpleNamespace:
    """The reference with a change to one result of every pass."""

    def wrapped(name: str) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            found = getattr(reference, name)(*arguments)
            if isinstance(found, Tensor):
                return change(found)
            found = [*found]
            found[place] = change(found[place])
            return found

        return run

    return SimpleNamespace(**{name: wrapped(name) for name in PASSES})


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("place", [0, -1])
def test_a_back_end_that_is_wrong_is_found_out(name, dtype, place):
    case = Case(name, 3, ODD[0], dtype, torch.channels_last, 2)
    assert fault(case, changed(lambda x: x), "cpu") is None
    for change, told in (
        (lambda x: x + 0.1, "off by"),
        (lambda x: x * float("nan"), "off by nan"),
        (lambda x: x.to(torch.complex64), "not as the reference has it"),
        (lambda x: x[:1], "not as the reference has it"),
    ):
        assert told in fault(case, changed(change, place), "cpu")


def test_a_map_in_another_layout_is_a_fault():
    case = Case("mix", 3, ODD[0], torch.float32, torch.channels_last, 1)
    assert "strides" in fault(case, changed(lambda x: x.contiguous()), "cpu")


def test_a_pass_that_does_not_run_is_a_fault_and_the_others_go_on(monkeypatch):
    """Whatever a compiler throws."""
    monkeypatch.setattr("dense_shortcuts.experiments.bench.passes.cases", lambda: CASES[:2])

    def fails(*_: object) -> None:
        raise KeyError("no such\nregister")

    said: list[str] = []
    count, wrong = faults(SimpleNamespace(moments=fails), "cpu", said.append)
    assert count == len(said) == len(wrong) == 2
    assert wrong[0] == f"{CASES[0]}: KeyError: 'no such\\nregister'"
    assert str(CASES[0]) == "moments of 3 maps 2x5x3x7, float64, contiguous_format, 1 rows"
