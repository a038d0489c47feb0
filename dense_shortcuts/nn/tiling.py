"""Which maps a block of a deep stage sums directly, and which are summed early, in partial sums for a group of blocks.

A stage of L blocks has L(L+1)/2 pairs of a block and an earlier map; block by block, as many maps are read. If blocks
are processed in groups of g, all maps that are finished when a group starts are read once for the whole group, which
writes g partial sums; within the group, a block reads only the maps finished since. With g near sqrt(L) the traffic
grows as L^1.5: a stage of 36 blocks reads and writes 251 maps instead of 666. The backward pass mirrors this.

Blocks are numbered k = l - 1 from 0, so block k sums the maps X_0 .. X_k.
"""

from dataclasses import dataclass

_WORTH = 0.8  # tiles must save a fifth of the traffic: they also cost launches and memory for g maps


@dataclass(frozen=True)
class Tiling:
    """A stage of `depth` blocks in groups of `size`."""

    depth: int
    size: int

    @classmethod
    def best(cls, depth: int) -> "Tiling":
        """The tiling with the least traffic; a single group if tiles save too little."""
        whole = cls(depth, depth)
        tiled = min((cls(depth, size) for size in range(1, depth + 1)), key=lambda tiling: tiling.traffic)
        return tiled if tiled.traffic < _WORTH * whole.traffic else whole

    @property
    def traffic(self) -> int:
        """Maps read, and partial sums written and read, in one forward pass over the stage."""
        direct = sum(len(self.direct(k)) for k in range(self.depth))
        partial = sum(k + 1 + 2 * len(self.blocks(k)) for k in range(self.depth) if self.begins(k))
        return direct + partial

    def begins(self, k: int) -> bool:
        """Whether block k is the first of a group that has partial sums."""
        return k > 0 and k % self.size == 0

    def blocks(self, k: int) -> range:
        """The blocks of the group that starts at block k."""
        return range(k, min(k + self.size, self.depth))

    def later_groups(self, k: int) -> list[range]:
        """The blocks of the group that starts at block k, and of each later group."""
        return [self.blocks(first) for first in range(k, self.depth, self.size)]

    def finished(self, k: int) -> range:
        """The maps finished when the group at block k starts that were not when the previous group started."""
        return range(0 if k == self.size else k - self.size + 1, k + 1)

    def direct(self, k: int) -> range:
        """The maps that block k sums directly."""
        first = k - k % self.size
        return range(first + 1 if first else 0, k + 1)

    def users(self, i: int) -> range:
        """The blocks that sum map i directly."""
        if i and i % self.size == 0:
            return range(0)
        return range(i, min(i - i % self.size + self.size, self.depth))

    def is_closed(self, i: int) -> bool:
        """Whether map i is in the partial sums of some group."""
        return -(-max(i, 1) // self.size) * self.size < self.depth
