"""A row of blocks where no gradient is recorded, by the compiled kernels.

What all sums of the row need lies ready for them: its maps in one table, the affine forms of their norms in another. A
block then costs one call with a few numbers, in place of the collecting and wrapping that `joining.join` does anew for
each sum, which on a CPU is no small part of it.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .compiled import KINDS, Form, Map, Pairs, address_of, kernel, shape_of, threads
from .forms import NONE, RUNNING
from .reference import accumulation_dtype


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


class Stream:
    """The maps of a row of L blocks, (N, C, H, W) each and dense in memory, as they are finished.

    Args:
        x: X_0, or with `last` what X_0 = last(x) is made of.
        last: the last norm of a projection shortcut, by running statistics.
        norms: of each map X_0 .. X_{L-1}; None where no block sums it, or all None for maps summed as they stand.
        sources: the maps that each block sums, in order, one at least.
        weights: of each block, a row for each of these maps, (maps, C).
    """

    def __init__(
        self,
        x: Tensor,
        last: KnownNorm | None,
        norms: Sequence[KnownNorm | None],
        sources: Sequence[Sequence[int]],
        weights: Sequence[Tensor],
    ) -> None:
        depth, (images, channels), dtype = len(sources), x.shape[:2], accumulation_dtype(x.dtype)
        self.first, self.norms, self.sources = x, norms, sources
        self.weights = [w.to(dtype).contiguous() for w in weights]
        groups = {norm.groups for norm in norms if norm is not None}
        self.normalised = len(groups) > 0
        self.rows = 1 if groups <= {RUNNING} else images
        # rate and shift of each map, and in the last place those of another norm at hand
        self.forms = x.new_empty((depth + 1, 2, self.rows, channels), dtype=dtype)
        start, size = self.forms.data_ptr(), self.rows * channels * self.forms.itemsize
        self.places = [(start + 2 * i * size, start + (2 * i + 1) * size) for i in range(depth + 1)]
        self.rates, self.shifts = ((ctypes.c_void_p * depth)(*column[:-1]) for column in zip(*self.places, strict=True))
        self.table = (Map * (depth + 1))()  # the branch at hand, then the maps
        self.shape, self.kind = shape_of(x), KINDS[x.dtype]
        self.kernel, self.threads = kernel("block", x), threads(x)
        self.maps, self.storages, self.finished = [x] * depth, [0] * depth, 0
        self._keep(0, x)
        if self.normalised:
            self._enter(norms[0], last)
        else:
            self.forms[:, 0], self.forms[:, 1] = 1, 0

    def _enter(self, norm: KnownNorm | None, last: KnownNorm | None) -> None:
        if norm is not None:
            kept: list[Tensor] = []
            own, inner = self._form(norm, 0, kept), None if last is None else self._form(last, -1, kept)
            kernel("enter", self.first)(self.shape, self.table[1], own, inner, self.threads)

    def _keep(self, i: int, x: Tensor) -> None:
        if i < len(self.maps):  # no block sums X_L
            self.maps[i], self.storages[i] = x, x.untyped_storage().data_ptr()
            self.table[i + 1] = Map(x.data_ptr(), self.kind)
            self.finished = i + 1

    def map(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map X_i, and rate and shift of its norm, (1 or N, C); None for none."""
        return (self.maps[i], *self.forms[i]) if self.normalised else (self.maps[i], None, None)

    def takes(self, x: Tensor) -> bool:
        """Whether a branch is laid out as the maps are."""
        first = self.first
        return type(x) is Tensor and x.dtype == first.dtype and x.shape == first.shape and x.stride() == first.stride()

    def sum(self, k: int, branch: Tensor, norm: KnownNorm | None, relu: bool, out: Tensor) -> Tensor:
        """X_l of block l = k + 1, s(N(branch) + sum_i w_i * N(X_i)), written to `out`.

        Args:
            k: the block; X_0 .. X_k are there.
            branch: the residual branch, one that `takes`; `out` may be the same.
            norm: its last norm where that is still to be applied, by running statistics.
            relu: whether s is ReLU, else there is none.
        """
        joins = norm is not None
        own = self.norms[k + 1] if k + 1 < len(self.norms) else None
        maps, rates, shifts = self._tables(k)
        maps[0] = Map(branch.data_ptr(), self.kind)
        first, size, count = ctypes.addressof(maps), ctypes.sizeof(Map), len(self.sources[k])
        pairs = Pairs(
            *(first, count + 1, True) if joins else (first + size, count, False),
            *(self.weights[k].data_ptr(), count, ctypes.addressof(rates), ctypes.addressof(shifts)),
            *(self.places[-1] if joins else (None, None)),
            self.rows,
        )
        kept: list[Tensor] = []
        theirs, ours = self._form(norm, -1, kept), self._form(own, k + 1, kept)
        addends = (None, 0) if joins else (first, 1)
        self.kernel(
            self.shape, *addends, theirs if joins else None, pairs, relu, out.data_ptr(), self.kind, ours, self.threads
        )
        self._keep(k + 1, out)
        return out

    def _tables(self, k: int) -> tuple["ctypes.Array[Any]", "ctypes.Array[Any]", "ctypes.Array[Any]"]:
        """Room for a branch with the maps that block k sums, and where their rates and shifts are."""
        sources = self.sources[k]
        if len(sources) == k + 1:  # all that there are
            return self.table, self.rates, self.shifts
        chosen = ([column[i] for i in sources] for column in (self.rates, self.shifts))
        maps = (Map * (len(sources) + 1))(Map(), *(self.table[i + 1] for i in sources))
        rates, shifts = ((ctypes.c_void_p * len(sources))(*column) for column in chosen)
        return maps, rates, shifts

    def _form(self, norm: KnownNorm | None, place: int, kept: list[Tensor]) -> Form:
        """A norm, whose form goes to its place; what it refers to is kept."""
        if norm is None:
            return Form(NONE)
        weight, bias, mean, var = (address_of(t, self.forms.dtype, kept) for t in norm[2:])
        return Form(norm.groups, norm.eps, weight, bias, *self.places[place], mean, var)
