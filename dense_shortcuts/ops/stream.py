"""A row of blocks where no gradient is recorded, by the compiled kernels.

What all sums of the row need lies ready for them: its maps, the affine forms of their norms in one tensor, and for each
block a call with a row of numbers, in place of the collecting and wrapping that `joining.join` does anew for each sum.
On a CPU that is no small part of it, for between two convolutions a line of Python costs ten times what it does in a
loop. The calls find their maps by a table of addresses, so they serve for the next pass as well.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .compiled import KINDS, Call, LaidOut, address_of, behind, bits
from .forms import RUNNING
from .native import NO_NORM, mix
from .reference import accumulation_dtype

_X = 3  # the place of X_0 in the table of a call


class KnownNorm(NamedTuple):
    """A norm that a kernel computes from the map alone, or from its running statistics.

    groups is a number of groups, or RUNNING for batch norm; weight and bias are affine parameters, mean and var running
    statistics, each (C,) or None.
    """

    groups: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None

    def fits(self, channels: int) -> bool:
        """Whether it is one for maps of so many channels."""
        sizes = {t.shape[0] for t in self[2:] if t is not None}
        return sizes <= {channels} and (self.groups == RUNNING or channels % self.groups == 0)


class Stream(LaidOut):
    """The maps of a row of L blocks, (N, C, H, W) each and dense in memory, as they are finished.

    Args:
        x: X_0, or with `last` what X_0 = last(x) is made of.
        last: the last norm of a projection shortcut, by running statistics.
        norms: of each map X_0 .. X_{L-1}; None where no block sums it, or all None for maps summed as they stand.
        sources: the maps that each block sums, in order, one at least.
        weights: of each block, a row for each of these maps, (maps, C).
        direct: the last of these maps, which the block sums by itself (`..tiling`); the others are summed ahead.
        groups: for each block before which maps are summed ahead, the blocks that they are summed for.
    """

    def __init__(
        self,
        x: Tensor,
        last: KnownNorm | None,
        norms: Sequence[KnownNorm | None],
        sources: Sequence[Sequence[int]],
        weights: Sequence[Tensor],
        direct: Sequence[Sequence[int]],
        groups: Mapping[int, range],
    ) -> None:
        super().__init__(x)
        depth, (images, channels), self.dtype = len(sources), x.shape[:2], accumulation_dtype(x.dtype)
        self.norms, self.weights, self.direct, self.groups = norms, weights, direct, groups
        kinds = {norm.groups for norm in norms if norm is not None}
        self.normalised = len(kinds) > 0
        self.rows = 1 if kinds <= {RUNNING} else images
        # rate and shift of each map, and in the last place those of another norm at hand
        self.forms = x.new_empty((depth + 1, 2, self.rows, channels), dtype=self.dtype)
        size = self.rows * channels * self.forms.itemsize
        self.places = [(behind(2 * i * size), behind((2 * i + 1) * size)) for i in range(depth + 1)]
        # the table of all calls: X_0 .. X_L, a branch, a sum made ahead, and what serves for every pass, which is kept
        self.table, self.kept = array("q", [0, self.forms.data_ptr(), 0, *[0] * (depth + 3)]), list[Tensor]()
        self.branch, self.ahead = _X + depth + 1, _X + depth + 2
        self.kind = KINDS[x.dtype]
        # what is known of each block beforehand
        self.pairs = [self._pair(*given) for given in zip(sources, weights, strict=True)]
        self.own = [*map(self._form, norms, self.places), NO_NORM]
        self.enter = self._enter(last) if norms[0] is not None else None
        self.calls: list[Call | None] = [None] * depth
        if not self.normalised:
            self.forms[:, 0], self.forms[:, 1] = 1, 0
        self.begin(x)

    def _enter(self, last: KnownNorm | None) -> Call:
        inner = [0] if last is None else [1, *self._form(last, self.places[-1])]
        return Call("enter", self.dtype, [*self.words, _X, self.kind, *self.own[0], *inner])

    def begin(self, x: Tensor) -> None:
        """Start a pass with X_0, or what it is made of."""
        self.maps, self.storages = [x], [x.untyped_storage().data_ptr()]
        # the sums made ahead for the group of blocks under way, its first block, and how many groups there were
        self.partial: list[Tensor] = []
        self.start = self.begun = 0
        self.table[_X] = x.data_ptr()
        if self.enter is not None:
            self.enter(self.table)

    def end(self) -> None:
        """Let go of the maps after the last block."""
        self.maps, self.storages, self.partial = [], [], []

    def map(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map X_i, and rate and shift of its norm, (1 or N, C); None for none."""
        return (self.maps[i], *self.forms[i]) if self.normalised else (self.maps[i], None, None)

    def prepare(self, k: int, norm: KnownNorm | None, relu: bool) -> None:
        """Make ready for the sum of block l = k + 1, s(N(branch) + sum_i w_i * N(X_i)).

        Args:
            k: the block.
            norm: the branch's last norm where that is still to be applied, by running statistics.
            relu: whether s is ReLU, else there is none.
        """
        branch, direct = (self.branch, self.kind), [word for i in self.direct[k] for word in (_X + i, self.kind)]
        count, ahead = len(self.direct[k]), (self.ahead, self.kind) if k >= min(self.groups, default=k + 1) else ()
        if norm is None:
            terms = [1 + len(ahead) // 2, *branch, *ahead, 0, count, *direct, 0]
        else:
            terms = [len(ahead) // 2, *ahead, 1, *self._form(norm, self.places[-1]), count + 1, *branch, *direct, 1]
        end = [relu, _X + k + 1, self.kind, *self.own[k + 1]]
        self.calls[k] = Call("block", self.dtype, [*self.words, *terms, *self.pairs[k], *end])

    def sum(self, k: int, branch: Tensor, identity: Tensor, *, seen: bool) -> Tensor:
        """X_l of block l = k + 1, which is prepared; X_0 .. X_k are there.

        It is written over the branch where nobody else has that memory: no earlier map, nor the block's input.

        Args:
            k: the block.
            branch: the residual branch, one that the stream `takes`.
            identity: what the host would add.
            seen: whether somebody may have taken the branch.
        """
        if k in self.groups:
            self._sum_ahead(k)
        storage = branch.untyped_storage().data_ptr()
        shared = seen or storage in self.storages or storage == identity.untyped_storage().data_ptr()
        out = torch.empty_like(branch) if shared else branch
        call, table = self.calls[k], self.table
        assert call is not None
        table[_X + k + 1], table[self.branch] = out.data_ptr(), branch.data_ptr()
        if self.partial:
            table[self.ahead] = self.partial[k - self.start].data_ptr()
        call(table)
        if k + 1 < len(self.norms):  # no block sums X_L
            self.maps.append(out)
            self.storages.append(out.untyped_storage().data_ptr() if shared else storage)
        return out

    def _sum_ahead(self, k: int) -> None:
        """The sums of the maps X_0 .. X_k for the group of blocks that begins at block k."""
        weight = torch.stack([self.weights[block][: k + 1] for block in self.groups[k]])[:, :, None]
        self.partial = mix(self.maps, weight.to(self.dtype) * self.forms[: k + 1, 0])
        self.start, self.begun = k, self.begun + 1

    def _pair(self, sources: Sequence[int], weight: Tensor) -> list[int]:
        """The weights of the maps that a block sums, and where their rates and shifts are."""
        rates, shifts = ([self.places[i][side] for i in sources] for side in (0, 1))
        return [self.rows, 0, 0, len(sources), self._lasting(weight), *rates, *shifts, *self.places[-1]]

    def _form(self, norm: KnownNorm | None, places: tuple[int, int]) -> list[int]:
        """A norm, whose rate and shift go to these places."""
        if norm is None:
            return NO_NORM
        weight, bias, mean, var = map(self._lasting, norm[2:])
        return [norm.groups, bits(norm.eps), weight, bias, *places, mean, var]

    def _lasting(self, x: Tensor | None) -> int:
        """The place in the table of numbers that serve for every pass; that of 0 for none."""
        if x is None:
            return 0
        self.table.append(address_of(x, self.dtype, self.kept))
        return len(self.table) - 1
