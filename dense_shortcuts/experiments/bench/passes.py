"""The five passes of a back end beside the reference's, case by case: `dsnet bench --gpu` holds Triton's to them."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.backends import reference
from .measure import reason

PASSES = ("moments", "join", "pull", "mix", "dots")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Of the largest value: of float32 sums of a few thousand terms; in half precision one unit in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Nothing that a tile divides, in one tile and in several; one pixel, one channel.
ODD = ((2, 5, 3, 7), (3, 70, 25, 17), (1, 1, 1, 1), (2, 3, 40, 17), (2, 33, 1, 1), (3, 1, 4, 5), (2, 16, 1, 9))
REAL = ((32, 256, 56, 56), (32, 2048, 7, 7))  # maps of a ResNet
LENGTHS = (1, 2, 9, 33, 65)  # of lists of maps: on both sides of what a launch takes


class Case(NamedTuple):
    """A pass over so many maps, with (1 or N, C) numbers for each."""

    name: str
    length: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: torch.memory_format
    rows: int

    def __str__(self) -> str:
        kind = f"{self.dtype}, {self.layout}".replace("torch.", "")
        return f"{self.name} of {self.length} maps {'x'.join(map(str, self.shape))}, {kind}, {self.rows} rows"


def cases() -> Iterator[Case]:
    """Every pass at every odd size in float32, and at two in the other dtypes, by 1 row and N; real sizes; long lists.

    Not every dtype at every size: each case compiles a kernel.
    """
    for name, dtype, layout in product(PASSES, TOLERANCE, LAYOUTS):
        for shape in ODD if dtype == torch.float32 else ODD[:2]:
            yield from (Case(name, 3, shape, dtype, layout, rows) for rows in sorted({1, shape[0]}))
    for name, shape, rows in product(PASSES, REAL, (1, REAL[0][0])):
        yield Case(name, 5, shape, torch.bfloat16, torch.channels_last, rows)
    for name, count in product(PASSES[1:], LENGTHS):
        yield Case(name, count, (2, 24, 6, 6), torch.bfloat16, torch.channels_last, 2)


def faults(backend: Any, device: str, tell: Callable[[str], Any]) -> tuple[int, list[str]]:
    """Number of cases, and a line for each in which a back end differs from the reference.

    Args:
        backend: a module with the five passes.
        device: where its maps are.
        tell: takes a line about what is done.
    """
    found, every = [], list(cases())
    for number, case in enumerate(every, 1):
        tell(f"{number} of {len(every)}: {case}")
        try:
            wrong = fault(case, backend, device)
        except Exception as error:  # of any kind: a kernel that does not compile is a finding, and the others go on
            wrong = reason(error)
        if wrong is not None:
            found.append(f"{case}: {wrong}")
    return len(every), found


def fault(case: Case, backend: Any, device: str) -> str | None:
    """How a back end's results differ from the reference's, in shape, dtype, layout or numbers; None where in none."""
    torch.manual_seed(0)
    xs = torch.randn(case.length, *case.shape, device=device)
    maps = [x.to(case.dtype).contiguous(memory_format=case.layout) for x in xs]
    ours, theirs = call(case, backend, maps), call(case, reference, maps)
    if case.name == "join":
        theirs = [theirs[0], *reference.moments(ours[0])]  # those of the map as it is stored
    strides = maps[-1 if case.name == "mix" else 0].stride()
    for a, b in zip(ours, theirs, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype) or (a.shape == case.shape and a.stride() != strides):
            return f"{tuple(a.shape)} in {a.dtype} with strides {a.stride()}, not as the reference has it"
        bound = TOLERANCE[b.dtype] * max(1.0, b.abs().max().item())
        off = (a.double() - b.double()).abs().max().item()
        if not off <= bound:  # NaN is a fault too
            return f"off by {off:.1e}, where {bound:.1e} is allowed"
    return None


def call(case: Case, backend: Any, maps: list[Tensor]) -> list[Tensor]:
    """What a pass gives for these maps, with numbers that depend on nothing but the case."""
    rows, channels, wide = case.rows, case.shape[1], reference.accumulation_dtype(case.dtype)
    numbers = torch.linspace(-1, 1, (case.length + 2) * rows * channels, dtype=wide, device=maps[0].device).sin_()
    first, second, *rest = numbers.view(-1, rows, channels)
    scales, half = torch.stack(rest), case.length // 2
    match case.name:
        case "moments":
            return [*backend.moments(maps[0])]
        case "join":
            return [*backend.join(maps[:1], maps[1:], scales[1:], first, True, True)]
        case "pull":
            later = maps[:half], rest[:half]
            return [*backend.pull(maps[0], maps[-1], first, second, *later, maps[half:], rows, True)]
        case "mix":
            return [*backend.mix(maps, torch.stack([scales, -2 * scales, scales + 1]))]
        case "dots":
            return [backend.dots(maps[:3], maps, rows)]
    raise ValueError(case.name)
