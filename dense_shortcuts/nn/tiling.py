"""Which maps a block of a deep stage sums by itself, and which are summed ahead for a group of blocks at once.

A stage of L blocks has L(L+1)/2 pairs of a block and an earlier map. Read pair by pair, its maps are read that often.
Cut into groups of g blocks, all maps that are finished when a group begins are read once for the whole group, which
writes g partial sums; within the group a block reads only the maps finished since. With g near sqrt(L) the traffic
grows as L^1.5: a stage of 36 blocks reads and writes 251 maps instead of 666. Backwards it is the same mirrored.

Blocks are counted by k = l - 1 from 0, so block k sums the maps X_0 .. X_k.
"""

from dataclasses import dataclass

_WORTH = 0.8  # tiles must save a fifth of the traffic, for they also cost launches and g maps of memory


@dataclass(frozen=True)
class Tiling:
    """A stage of `depth` blocks in groups of `size`."""

    depth: int
    size: int

    @classmethod
    def best(cls, depth: int) -> "Tiling":
        """The tiling with the least traffic: one group where that is as good."""
        whole = cls(depth, depth)
        tiled = min((cls(depth, size) for size in range(1, depth + 1)), key=lambda tiling: tiling.traffic)
        return tiled if tiled.traffic < _WORTH * whole.traffic else whole

    @property
    def traffic(self) -> int:
        """Maps read and partial sums written and read in one forward pass over the stage."""
        direct = sum(len(self.direct(k)) for k in range(self.depth))
        ahead = sum(k + 1 + 2 * len(self.blocks(k)) for k in range(self.depth) if self.begins(k))
        return direct + ahead

    def begins(self, k: int) -> bool:
        """Whether block k is the first of a group that has sums made ahead."""
        return k > 0 and k % self.size == 0

    def blocks(self, k: int) -> range:
        """The blocks of the group that begins at block k."""
        return range(k, min(k + self.size, self.depth))

    def later_groups(self, k: int) -> list[range]:
        """The blocks of the group that begins at block k, and of each one after it."""
        return [self.blocks(first) for first in range(k, self.depth, self.size)]

    def finished(self, k: int) -> range:
        """The maps finished when the group at block k begins, without those finished when the group before it began."""
        return range(0 if k == self.size else k - self.size + 1, k + 1)

    def direct(self, k: int) -> range:
        """The maps that block k sums by itself."""
        first = k - k % self.size
        return range(first + 1 if first else 0, k + 1)

    def users(self, i: int) -> range:
        """The blocks that sum map i by themselves."""
        if i and i % self.size == 0:
            return range(0)
        return range(i, min(i - i % self.size + self.size, self.depth))

    def is_closed(self, i: int) -> bool:
        """Whether some group has map i among those summed ahead."""
        return -(-max(i, 1) // self.size) * self.size < self.depth
