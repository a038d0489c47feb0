"""What a stage does at the end of a block: makes its map from the block's parts and the earlier maps."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from .. import ops
from ..adapters import map_of
from ..errors import DenseShortcutError
from .hooks import has_hooks, observed
from .layout import as_map, from_map, is_map
from .norms import joins, known
from .repeat import as_repeat, begin, end_of, leave, sum_on_tape
from .shortcut import DenseShortcut, as_branch
from .stage_state import Memory


class Place(NamedTuple):
    """Where a block stands in one pass over a stage, and what of it a pass asks for more than once.

    Attributes:
        block: the block.
        shortcut: that of its row; None for a block in no row.
        row: its name.
        k: its position in the row.
        last: whether it is the last one there.
        observed: whether a hook may look at its output.
        hooked: whether one may look at that of any layer in it.
        next_hooked: the same of the block after it in the row.
        tokens, volumes: the form of its maps, see `as_map`.
    """

    block: nn.Module
    shortcut: DenseShortcut | None = None
    row: str = ""
    k: int = 0
    last: bool = False
    observed: bool = False
    hooked: bool = False
    next_hooked: bool = False
    tokens: bool = False
    volumes: bool = False


class Join:
    """What a stage does at the end of block l = k + 1: makes X_l from the block's parts and the earlier maps."""

    def __init__(
        self, place: Place, shortcut: DenseShortcut, memory: Memory, aggregate: str, keep_identity: bool
    ) -> None:
        self.place, self.shortcut, self.memory, self.aggregate = place, shortcut, memory, aggregate
        # a block that is not chosen keeps what its host does
        self.keep_identity = keep_identity or not shortcut.sources[place.k]
        self.entered = False  # whether the memory has X_l already, from the pass that made it

    @property
    def k(self) -> int:
        """The block's position in its row, a constant to torch.compile also where that compiles a block alone."""
        return operator.index(self.place.k)

    def __call__(
        self,
        branch: Tensor,
        norm: nn.Module | None,
        identity: Tensor,
        activation: Callable[[Tensor], Tensor] | None,
        *,
        whole: bool = False,
        identity_norm: nn.Module | None = None,
    ) -> Tensor:
        given = norm, activation, identity_norm
        if self.memory.rows is not None and (x := self._repeat(branch, identity, *given)) is not None:
            return x
        backend = self._backend(branch)
        # without maps there is nothing to sum in one pass
        fused = backend != "plain" and bool(self.shortcut.sources[self.k])
        if identity_norm is not None and not (fused and self._joins_identity_norm(identity_norm)):
            identity, identity_norm = identity_norm(identity), None
        form, host_form = (self.place.tokens, self.place.volumes), branch
        reshaped = not is_map(branch, *form)
        if reshaped:
            branch, identity = (as_map(x, *form) for x in (branch, identity))
        if self.k == 0:
            self._begin(identity, identity_norm, backend)
        self._check_shape(branch)
        norm_joins = norm is not None and fused and self._joins_norm(norm)
        if norm is not None and not norm_joins:
            branch, norm = norm(branch), None
        relu = fused and ops.is_relu(activation) and not (isinstance(activation, nn.Module) and observed(activation))
        ends = relu or activation is None
        x = self._stream(branch, norm, identity, relu) if self.memory.stream is not None and ends else None
        if x is None:
            self.memory = self.memory.leave_stream(self.k)
            addends = [identity] if self.keep_identity and not whole else []
            x = self._sum(branch, norm, identity, addends, relu, ends, backend, fused)
        if self.memory.record is not None:
            whole_sum = ends and not reshaped and not self.keep_identity and self.aggregate != "block"
            self._record(given, branch, relu, whole_sum and given == (norm, activation, identity_norm))
        if reshaped:
            x = from_map(x, form[0], host_form, form[1])
        elif activation is None and isinstance(x, Proxy):
            x = torch.positive(x)  # a node of the block's own: feature extractors take its last
        return x if relu or activation is None else activation(x)

    def _backend(self, branch: Tensor) -> str:
        """The back end for the block, chosen once a row: to choose takes longer than many a pass over a map."""
        shortcut = self.shortcut
        if isinstance(branch, Proxy):
            return ops.choose(branch, shortcut.backend)
        chosen = self.memory.chosen
        if chosen is None or chosen[0] != branch.dtype:
            chosen = branch.dtype, ops.choose(branch, shortcut.backend, tiled=shortcut.tiled)
            self.memory = self.memory._replace(chosen=chosen)
        return chosen[1]

    def _check_shape(self, branch: Tensor) -> None:
        """That a branch may be added to the maps, which the kernels rely on.

        Raises:
            DenseShortcutError: the shapes or the number of channels differ.
        """
        if isinstance(branch, Proxy):
            return
        shape, channels = self.memory.shape, self.shortcut.channels
        if branch.shape != shape or shape[1] != channels:
            raise DenseShortcutError(
                f"a branch of shape {tuple(branch.shape)} meets maps of shape {tuple(shape)} in a stage plugged in "
                f"for {channels} channels: leave the stage out with plug_in(stages=..), or plug_in(blocks=..)."
            )

    def _begin(self, identity: Tensor, identity_norm: nn.Module | None, backend: str) -> None:
        """Remember X_0, in a stream where the row may be run by one."""
        rows = self.memory.rows
        if rows is not None and backend == "native" and rows.get(self.place.row, self) is not None:
            self.memory = self.memory._replace(record=())
        if backend == "native" and self._may_stream():
            self.memory = self.memory._replace(stream=self.shortcut.stream(identity, identity_norm))
        if self.memory.stream is None:
            self.memory = self.memory.add(self.shortcut.enter(0, identity, backend, identity_norm))

    def _sum(
        self,
        branch: Tensor,
        norm: nn.Module | None,
        identity: Tensor,
        addends: list[Tensor],
        relu: bool,
        ends: bool,
        backend: str,
        fused: bool,
    ) -> Tensor:
        """The sum of the branch, whose norm joins it or is None, and what else is added; X_l if the block `ends` so."""
        shortcut, k = self.shortcut, self.k
        memory = later = shortcut.sum_ahead(k, self.memory, backend)
        if self.aggregate == "block" and not self.place.last:
            later, self.entered = memory.add(shortcut.enter(k + 1, branch, backend)), True
        finish = fused and ends and not self.entered and not self.place.last and not self._is_observed()
        records = is_grad_enabled() or is_compiling()
        x, ahead = shortcut(
            k,
            [branch, *addends] if norm is None else addends,
            memory,
            branch=None if norm is None else as_branch(norm, branch, backend),
            norm=norm,
            relu=relu,
            finish=finish,
            overwrite=fused and not records and not self.entered and self._is_own(branch, identity),
            backend=backend if fused else "plain",
        )
        if ahead is not None:
            later, self.entered = later.add(ahead), True
        self.memory = later
        return x

    def _may_stream(self) -> bool:
        """Whether the row may be run in place (`ops/stream.py`), without the shortcut's own call."""
        if is_grad_enabled() or is_compiling() or not self.memory.once:
            return False
        return not self.keep_identity and self.aggregate != "block" and not has_hooks(self.shortcut)

    def _stream(self, branch: Tensor, norm: nn.Module | None, identity: Tensor, relu: bool) -> Tensor | None:
        """X_l by the stream; None where it does not take the block."""
        stream = self.memory.stream
        assert stream is not None
        if is_grad_enabled() or self.keep_identity or is_compiling() or self.place.observed:
            return None
        found = None if norm is None else known(norm)
        fits = norm is None or (found is not None and found.fits(stream.shape[1]))
        if not fits or not stream.takes(branch):
            return None
        stream.prepare(self.k, found, relu)
        self.entered = True
        return stream.sum(self.k, branch, identity, seen=self.place.hooked)

    def _repeat(
        self, branch: Tensor, identity: Tensor, norm: nn.Module | None, activation: Any, identity_norm: nn.Module | None
    ) -> Tensor | None:
        """X_l in the way of an earlier pass; None where that does not serve."""
        k, memory = self.place.k, self.memory
        assert memory.rows is not None
        repeat = memory.repeat if k else memory.rows.get(self.place.row)
        if repeat is None:
            return None
        served = repeat.serves(k, branch, (norm, activation, identity_norm))
        if k == 0:
            begun = begin(repeat, memory, self.shortcut, identity, identity_norm) if served else None
            if begun is None:
                return None
            self.memory = memory = begun
        elif not served:
            self.memory = leave(memory, self.shortcut, self.place.row)
            return None
        if memory.stream is not None:
            return memory.stream.sum(k, branch, identity, seen=False)
        assert memory.tape is not None
        return sum_on_tape(repeat, memory.tape, k, self.shortcut, branch, norm)

    def _record(self, given: tuple[Any, ...], branch: Tensor, relu: bool, repeats: bool) -> None:
        """Note what the block gave, if its sum may be made of nothing else another time; else give up on the row."""
        memory, end = self.memory, None
        assert memory.record is not None
        if memory.stream is None and memory.terms:
            end = end_of(branch, given[0], relu, memory.terms[0].map)
            repeats = repeats and end is not None and (self.entered or self.place.last)
        self.memory = memory._replace(record=(*memory.record, (given, end)) if repeats else None)

    def remember(self, block: nn.Module, result: Any) -> Memory:
        """What the stage keeps after the block, which gave back `result`."""
        if self.place.last:
            self._leave_row()
            return self.memory.begin()
        if self.memory.repeat is not None:
            return self.memory
        if not self.entered:
            x = as_map(map_of(block, result), self.place.tokens, self.place.volumes)
            self.memory = self.memory.add(self.shortcut.enter(self.k + 1, x, self._backend(x)))
        return self.memory.after(result[0] if isinstance(result, tuple) else result)

    def _leave_row(self) -> None:
        """Behind its last block, leave to other passes how the row was run."""
        memory = self.memory
        if memory.rows is not None and memory.record is not None:
            memory.rows[self.place.row] = as_repeat(memory, self.shortcut)
        if memory.stream is not None:
            memory.stream.end()

    def _joins_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the branch may be computed in the pass that adds the shortcuts.

        Not where the branch's output is itself a map to remember, nor where the host's own numbers are promised bit
        for bit, which the other order of additions would break.
        """
        exact = self.keep_identity or not self.shortcut.normalised
        return not exact and (self.aggregate != "block" or self.place.last) and joins(norm) and not observed(norm)

    def _joins_identity_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the projection may become part of N(X_0), so that X_0 itself is never made."""
        taken = self.k == 0 and not self.keep_identity and self.shortcut.takes_norm(0)
        return taken and joins(norm) and not observed(norm)

    def _is_own(self, branch: Tensor, identity: Tensor) -> bool:
        """Whether nobody but this block has the branch's memory: no hook may have seen it, and it is no other map's."""
        if self.place.hooked:
            return False
        own = branch.untyped_storage().data_ptr()
        return own != identity.untyped_storage().data_ptr() and own not in self.memory.storages()

    def _is_observed(self) -> bool:
        """Whether somebody may take X_l or give another one in its place.

        A hook on its block may do both; where gradients are recorded, one on the next block, or on a layer in it, which
        is given X_l, may do the first.
        """
        return self.place.observed or (is_grad_enabled() and self.place.next_hooked)
