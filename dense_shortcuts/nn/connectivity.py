"""Which earlier maps a block sums: all of them, the nearest few, those a power of two back, or an explicit list.

Blocks are numbered k = l - 1 from 0, so block k may sum the maps X_0 .. X_k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Sources = tuple[tuple[int, ...], ...]

PATTERNS: dict[str, Callable[[int], bool]] = {
    "all": lambda back: True,
    "powers": lambda back: back & (back - 1) == 0,  # 1, 2, 4, 8, ..: about log2(L) maps per block
}


class Segment(NamedTuple):
    """Residual blocks first .. stop - 1 of a container, whose maps share one shape, and the name of their shortcut.

    A stage of a ResNet is one segment. A container has several if other layers stand between its blocks, or the shape
    changes.
    """

    first: int
    stop: int
    shortcut: str


def sources(chosen: Sequence[bool], *, pattern: str = "all", window: int | None = None) -> Sources:
    """The maps that each block of a segment sums, in order; none for a block that is not chosen.

    Args:
        chosen: for each block, whether it has a dense shortcut.
        pattern: a name in PATTERNS, which selects the distances l - i; 1 is the nearest map.
        window: the largest distance; None for no limit.
    """
    fits = PATTERNS[pattern]
    reach = len(chosen) if window is None else window
    return tuple(
        tuple(i for i in range(k + 1) if k + 1 - i <= reach and fits(k + 1 - i)) if taken else ()
        for k, taken in enumerate(chosen)
    )


@dataclass(frozen=True)
class Sparse:
    """Stands in for a `Tiling` if blocks do not sum all earlier maps: each reads its own maps, without tiles."""

    sources: Sources

    @property
    def size(self) -> int:
        return len(self.sources)

    def begins(self, k: int) -> bool:
        return False

    def is_closed(self, i: int) -> bool:
        return False

    def direct(self, k: int) -> Sequence[int]:
        """The maps that block k sums directly."""
        return self.sources[k]

    def users(self, i: int) -> Sequence[int]:
        """The blocks that sum map i directly."""
        return [k for k, maps in enumerate(self.sources) if i in maps]
