"""What a stage keeps from block to block."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import ops
from .watch import Repeat


class Term(NamedTuple):
    """A map as sums use it: N(X) = scale * map + shift, the statistics taken once.

    map is (N, C, H, W); scale and shift are (1 or N, C), or None where the map is used as it stands. links are those of
    the fused operator, two tensors for each later user in turn (`ops/fused.py`); none on the plain path.
    """

    map: Tensor
    scale: Tensor | None
    shift: Tensor | None
    links: tuple[Tensor, ...] = ()


class Memory(NamedTuple):
    """What a stage keeps from block to block: its maps X_0 .. X_{l-1} and, in a deep stage, the sums made ahead.

    partial has a sum (N, C, H, W) for each block of the group under way, closed the links from each group of maps to
    the later groups of blocks (`tiling.py`). Where every block runs `once` and in order, a stream or, in training, a
    tape may keep the maps in place of terms. rows is how earlier passes ran rows, by name, and None where that is of no
    use (`repeat.py`); repeat is what of it this row is run by, record what each block gave, for passes to come. last is
    what the block before gave back, and the version that its memory had then. chosen is the back end that was chosen
    for the row, and the dtype that it was chosen for.
    """

    terms: tuple[Term, ...] = ()
    partial: tuple[Tensor, ...] = ()
    closed: tuple[list[Tensor], ...] = ()
    stream: ops.Stream | None = None
    tape: ops.Tape | None = None
    once: bool = False
    rows: dict[str, Repeat | None] | None = None
    repeat: Repeat | None = None
    record: tuple[tuple[Any, ops.End | None], ...] | None = None
    last: tuple[Tensor, int] | None = None
    chosen: tuple[torch.dtype, str] | None = None

    def add(self, term: Term) -> "Memory":
        return self._replace(terms=(*self.terms, term))

    def begin(self) -> "Memory":
        """What a row of blocks begins with."""
        return Memory(once=self.once, rows=self.rows)

    @property
    def shape(self) -> torch.Size:
        """That of the maps, which all have the same."""
        return self.terms[0].map.shape if self.stream is None else self.stream.shape

    def finished(self) -> int:
        """Number of maps."""
        return len(self.terms) if self.stream is None else len(self.stream.maps)

    def after(self, x: Tensor) -> "Memory":
        """The same behind a block that gave back x."""
        if type(x) is not Tensor or is_compiling():
            return self
        return self._replace(last=(x, -1 if x.is_inference() else x._version))

    def follows(self, x: Tensor) -> bool:
        """Whether x is what the block before gave back, as far as can be seen."""
        if self.last is None:
            return True
        last, version = self.last
        if x is not last:
            if not ops.is_eager(x):
                return True
            if x.data_ptr() != last.data_ptr() or x.shape != last.shape or x.stride() != last.stride():
                return False
        return version == -1 or x.is_inference() or x._version == version

    def storages(self) -> list[int]:
        """Where the storages of the terms' maps are."""
        return [term.map.untyped_storage().data_ptr() for term in self.terms]

    def leave_stream(self, k: int) -> "Memory":
        """The same with X_0 .. X_k as terms, and with the sums that the stream made ahead."""
        if self.stream is None:
            return self
        closed: tuple[list[Tensor], ...] = ([],) * self.stream.begun  # there are no links without gradients
        terms = tuple(Term(*self.stream.map(i)) for i in range(k + 1))
        return self._replace(terms=terms, partial=tuple(self.stream.partial), closed=closed, stream=None)
