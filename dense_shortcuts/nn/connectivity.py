"""Which earlier maps a block sums: all of them, the last few, those a power of two back, or a list of its own.

Blocks are counted by k = l - 1 from 0, so block k may sum the maps X_0 .. X_k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Sources = tuple[tuple[int, ...], ...]

PATTERNS: dict[str, Callable[[int], bool]] = {
    "all": lambda back: True,
    "powers": lambda back: back & (back - 1) == 0,  # 1, 2, 4, 8, ..: about log2 L maps a block
}


class Segment(NamedTuple):
    """Blocks first .. stop - 1 of a container, residual ones whose maps share a shape, and the name of their shortcut.

    A stage of a ResNet is one segment. Where other layers stand between the blocks, or the shape changes in the middle,
    there are more.
    """

    first: int
    stop: int
    shortcut: str


def sources(chosen: Sequence[bool], *, pattern: str = "all", window: int | None = None) -> Sources:
    """The maps that each block of a stage sums, in order; none for a block that is not chosen.

    Args:
        chosen: for each block whether it has a dense shortcut.
        pattern: a name in PATTERNS; it says which distances l - i count, 1 being the nearest map.
        window: the largest distance; None is no limit.
    """
    fits = PATTERNS[pattern]
    reach = len(chosen) if window is None else window
    return tuple(
        tuple(i for i in range(k + 1) if k + 1 - i <= reach and fits(k + 1 - i)) if taken else ()
        for k, taken in enumerate(chosen)
    )


@dataclass(frozen=True)
class Sparse:
    """The reading plan of a stage whose blocks do not sum all earlier maps: each reads its own, nothing is tiled."""

    sources: Sources

    @property
    def size(self) -> int:
        return len(self.sources)

    def begins(self, k: int) -> bool:
        return False

    def is_closed(self, i: int) -> bool:
        return False

    def direct(self, k: int) -> Sequence[int]:
        """The maps that block k sums by itself."""
        return self.sources[k]

    def users(self, i: int) -> Sequence[int]:
        """The blocks that sum map i by themselves."""
        return [k for k, maps in enumerate(self.sources) if i in maps]
