"""A row of blocks where no gradient is recorded, by the compiled kernels.

What all sums of the row need lies ready for them: its maps, and the affine forms of their norms in one tensor. A block
then costs one call with a row of numbers, in place of the collecting and wrapping that `joining.join` does anew for
each sum, which on a CPU is no small part of it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .compiled import KINDS, address_of, bits, call, shape_words
from .forms import NONE, RUNNING
from .native import mix
from .reference import accumulation_dtype

_NO_NORM = [NONE, *[0] * 7]


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
        depth, (images, channels), dtype = len(sources), x.shape[:2], accumulation_dtype(x.dtype)
        self.first, self.norms, self.weights, self.direct, self.groups = x, norms, weights, direct, groups
        kinds = {norm.groups for norm in norms if norm is not None}
        self.normalised = len(kinds) > 0
        self.rows = 1 if kinds <= {RUNNING} else images
        # rate and shift of each map, and in the last place those of another norm at hand
        self.forms = x.new_empty((depth + 1, 2, self.rows, channels), dtype=dtype)
        start, size = self.forms.data_ptr(), self.rows * channels * self.forms.itemsize
        self.places = [(start + 2 * i * size, start + (2 * i + 1) * size) for i in range(depth + 1)]
        self.shape, self.kind = shape_words(x), KINDS[x.dtype]
        self.maps, self.storages = [x], [x.untyped_storage().data_ptr()]
        # the sums made ahead for the group of blocks under way, its first block, and how many groups there were
        self.partial: list[Tensor] = []
        self.start = self.begun = 0
        self.kept: list[Tensor] = []
        # what is known of each block beforehand, made in one go: between convolutions every line of Python costs more
        self.pairs = [self._pair(*given) for given in zip(sources, weights, strict=True)]
        self.own = [self._form(norm, i, self.kept) for i, norm in enumerate(norms)] + [_NO_NORM]
        if self.normalised:
            self._enter(norms[0], last)
        else:
            self.forms[:, 0], self.forms[:, 1] = 1, 0

    def _enter(self, norm: KnownNorm | None, last: KnownNorm | None) -> None:
        if norm is not None:
            inner = [0] if last is None else [1, *self._form(last, -1, self.kept)]
            words = [*self.shape, self.first.data_ptr(), self.kind, *self.own[0], *inner]
            call("enter", self.forms.dtype, words)

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
        if k in self.groups:
            self._sum_ahead(k)
        direct = self.direct[k]
        kept: list[Tensor] = []
        maps = [word for i in direct for word in (self.maps[i].data_ptr(), self.kind)]
        given = branch.data_ptr(), self.kind
        ahead = [self.partial[k - self.start].data_ptr(), self.kind] if self.partial else []
        if norm is None:
            terms = [1 + len(ahead) // 2, *given, *ahead, 0, len(direct), *maps, 0]
        else:
            terms = [len(ahead) // 2, *ahead, 1, *self._form(norm, -1, kept), len(direct) + 1, *given, *maps, 1]
        end = [relu, out.data_ptr(), self.kind, *self.own[k + 1]]
        call("block", self.forms.dtype, [*self.shape, *terms, *self.pairs[k], *end])
        if k + 1 < len(self.norms):  # no block sums X_L
            self.maps.append(out)
            self.storages.append(out.untyped_storage().data_ptr())
        return out

    def _sum_ahead(self, k: int) -> None:
        """The sums of the maps X_0 .. X_k for the group of blocks that begins at block k."""
        weight = torch.stack([self.weights[block][: k + 1] for block in self.groups[k]])[:, :, None]
        self.partial = mix(self.maps, weight.to(self.forms.dtype) * self.forms[: k + 1, 0])
        self.start, self.begun = k, self.begun + 1

    def _pair(self, sources: Sequence[int], weight: Tensor) -> list[int]:
        """The weights of the maps that a block sums, and where their rates and shifts are."""
        rates, shifts = ([self.places[i][side] for i in sources] for side in (0, 1))
        address = address_of(weight, self.forms.dtype, self.kept)
        return [self.rows, 0, 0, len(sources), address, *rates, *shifts, *self.places[-1]]

    def _form(self, norm: KnownNorm | None, place: int, kept: list[Tensor]) -> list[int]:
        """A norm, whose form goes to its place; what it refers to is kept."""
        if norm is None:
            return _NO_NORM
        weight, bias, mean, var = (address_of(t, self.forms.dtype, kept) for t in norm[2:])
        return [norm.groups, bits(norm.eps), weight, bias, *self.places[place], mean, var]
