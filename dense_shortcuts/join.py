"""What a stage does at the end of a block: makes its map from the block's parts and the earlier maps."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from . import ops
from .errors import DenseShortcutError
from .hooks import has_hooks, observed, saves_elsewhere
from .norms import frozen_statistics, goes_by_batch, is_batch_norm, joins, known
from .shortcut import DenseShortcut, Memory, as_branch
from .watch import Repeat


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
        if (x := self._repeat(branch, identity, given)) is not None:
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
        end = None
        if x is None:
            self.memory = self.memory.leave_stream(self.k)
            addends = [identity] if self.keep_identity and not whole else []
            x = self._sum(branch, norm, identity, addends, relu, ends, backend, fused)
            end = self._end(branch, norm, relu) if ends and not addends else None
        self._record(given, given == (norm, activation, identity_norm) and not reshaped, end)
        if reshaped:
            x = from_map(x, form[0], host_form, form[1])
        elif activation is None and isinstance(x, Proxy):
            x = torch.positive(x)  # a node of the block's own: feature extractors take its last
        return x if relu or activation is None else activation(x)

    def _backend(self, branch: Tensor) -> str:
        """The back end for the block, chosen once a row: to choose takes longer than many a pass over a map."""
        if isinstance(branch, Proxy):
            return ops.choose(branch, self.shortcut.backend)
        chosen = self.memory.chosen
        if chosen is None or chosen[0] != branch.dtype:
            chosen = branch.dtype, ops.choose(branch, self.shortcut.backend)
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
        if rows is not None and rows.get(self.place.row, self) is not None and backend == "native":
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
        if is_grad_enabled() or is_compiling() or self.memory.rows is None:
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
        return self._sum_in(stream, branch, identity)

    def _sum_in(self, stream: ops.Stream, branch: Tensor, identity: Tensor) -> Tensor:
        self.entered = True
        own = self._is_own(branch, identity)
        return stream.sum(self.k, branch, branch if own else torch.empty_like(branch))

    def _repeat(self, branch: Tensor, identity: Tensor, given: tuple[Any, ...]) -> Tensor | None:
        """X_l in the way of an earlier pass, where the block gives the same as then; None where it does not."""
        k, memory, row = self.k, self.memory, self.place.row
        repeat = memory.repeat if k or memory.rows is None else memory.rows.get(row)
        if repeat is None:
            return None
        same = repeat.given[k] == given and repeat.run.takes(branch)
        trains = isinstance(repeat.run, ops.Plan)
        if not same or is_grad_enabled() != trains or (k == 0 and not self._begin_repeat(repeat, branch, identity, given)):
            self._leave_repeat()
            return None
        if self.memory.stream is not None:
            return self._sum_in(self.memory.stream, branch, identity)
        return self._sum_on_tape(branch, given[0])

    def _begin_repeat(self, repeat: Repeat, branch: Tensor, identity: Tensor, given: tuple[Any, ...]) -> bool:
        """Remember X_0 for a pass in the way of an earlier one; False where that does not serve."""
        run = repeat.run
        if self._backend(branch) != "native" or not repeat.holds() or not run.serves(identity):
            return False
        if isinstance(run, ops.Stream):
            run.begin(identity)
            self.memory = self.memory._replace(stream=run, repeat=repeat)
            return True
        if saves_elsewhere():
            return False
        term = self.shortcut.enter(0, identity, "native", given[2])
        assert term.scale is not None and term.shift is not None
        tape = ops.Tape(run, term.map, term.scale, term.shift, term.links)
        self.memory = self.memory._replace(terms=(term,), tape=tape, repeat=repeat)
        return True

    def _leave_repeat(self) -> None:
        """Go on without what earlier passes left, from the maps that are there."""
        tape, rows = self.memory.tape, self.memory.rows
        self.memory = self.memory._replace(tape=None, repeat=None)
        if rows is not None and self.k:
            rows.pop(self.place.row, None)
        if tape is not None:
            with frozen_statistics(self.shortcut):  # which have taken this step
                terms = [self.shortcut.enter(i, x, "native") for i, x in enumerate(tape.maps[1:], 1)]
            self.memory = self.memory._replace(terms=(*self.memory.terms, *terms))

    def _sum_on_tape(self, branch: Tensor, norm: nn.Module) -> Tensor:
        """X_l by the tape, with a step of the running statistics of the norms that it goes by."""
        k, tape, shortcut = self.k, self.memory.tape, self.shortcut
        assert tape is not None
        x = tape.sum(k, branch, shortcut.weight(k), *norm._parameters.values())
        self._move(norm, tape.plan.branches[k])
        if not self.place.last and is_batch_norm(own := shortcut.norm(k + 1)):
            self._move(own, tape.plan.forms[k + 1])
        self.entered = True
        return x

    def _move(self, norm: nn.Module, places: Sequence[int]) -> None:
        mean, var, counter = norm._buffers.values()
        counter.add_(1)
        self.memory.tape.move((mean, var), places[2:], norm.momentum)

    def _end(self, branch: Tensor, norm: nn.Module | None, relu: bool) -> ops.End | None:
        """How the block ends, where its sum may be made on a tape; None where it may not."""
        if norm is None or not is_grad_enabled() or not ops.is_eager(branch) or not (self.entered or self.place.last):
            return None
        like, affine = self.memory.terms[0].map, norm.weight is not None
        same = branch.stride() == like.stride() and branch.dtype == like.dtype and _is_dense(branch)
        taken = same and affine and goes_by_batch(norm, ops.accumulation_dtype(branch.dtype))
        return ops.End(norm.eps, relu) if taken and not saves_elsewhere() else None

    def _record(self, given: tuple[Any, ...], whole: bool, end: ops.End | None) -> None:
        """Note what the block gave, if that is all there is to it."""
        record, memory = self.memory.record, self.memory
        if record is not None:
            taken = whole and len(record) == self.k and (memory.stream is not None or end is not None)
            self.memory = memory._replace(record=(*record, (given, end)) if taken else None)

    def remember(self, x: Tensor) -> Memory:
        """What the stage keeps after the block, whose output is x."""
        if self.place.last:
            self._leave_row()
            return self.memory.begin()
        if self.entered:
            return self.memory
        x = as_map(x, self.place.tokens, self.place.volumes)
        term = self.shortcut.enter(self.k + 1, x, self._backend(x))
        return self.memory.add(term)

    def _leave_row(self) -> None:
        """Behind its last block, leave to other passes how the row was run."""
        memory, rows, row = self.memory, self.memory.rows, self.place.row
        if memory.stream is not None:
            memory.stream.end()
        if memory.tape is not None:
            memory.tape.end()
        if memory.record is not None and rows is not None:
            rows[row] = self._as_repeat()

    def _as_repeat(self) -> Repeat | None:
        memory, shortcut = self.memory, self.shortcut
        if len(memory.record) < shortcut.depth or type(shortcut) is not DenseShortcut:
            return None
        given, ends = zip(*memory.record, strict=True)
        if memory.stream is not None:
            return Repeat(memory.stream, given, memory.stream.read())
        term = memory.terms[0]
        plan = shortcut.plan(term.map, term.scale.shape[0], ends) if term.scale is not None else None
        if plan is None:
            return None
        affine = [t for norm, *_ in given for t in norm._parameters.values()]
        return Repeat(plan, given, [*shortcut.weights, *affine])

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


def as_map(x: Tensor, tokens: bool, volumes: bool = False) -> Tensor:
    """A view as a map (N, C, H, W), of tokens, whose channels are last, or of a map of any number of axes.

    (N, C) becomes (N, C, 1, 1), a sequence (N, C, L) becomes (N, C, 1, L), a volume (N, C, D, H, W) becomes
    (N, C, D H, W). What torch.fx records does not know how many axes it has: tokens are all put into one, as those of
    (N, L, C), and `volumes` says of others whether they are such.
    """
    recorded = isinstance(x, Proxy)
    if recorded and tokens:
        return x.movedim(-1, 1).flatten(2).unsqueeze(2)
    x = x.movedim(-1, 1) if tokens else x
    axes = (5 if volumes else 4) if recorded else x.ndim
    return {2: lambda: x[:, :, None, None], 3: lambda: x.unsqueeze(2), 4: lambda: x, 5: lambda: x.flatten(2, 3)}[axes]()


def is_map(x: Tensor, tokens: bool, volumes: bool) -> bool:
    """Whether x is (N, C, H, W) as it stands; see `as_map` for what torch.fx records."""
    return not tokens and (not volumes if isinstance(x, Proxy) else x.ndim == 4)


def from_map(x: Tensor, tokens: bool, like: Tensor, volumes: bool = False) -> Tensor:
    """A map in the form of `like`, one that `as_map` was given."""
    recorded = isinstance(like, Proxy)
    if recorded and tokens:
        return x.movedim(1, -1).reshape(like.shape)
    axes = (5 if volumes else 4) if recorded else like.ndim
    if axes == 5:
        first = 1 if tokens else 2
        x = x.unflatten(2, (like.shape[first], like.shape[first + 1]))
    elif axes < 4:
        x = x[:, :, 0, 0] if axes == 2 else x.squeeze(2)
    return x.movedim(1, -1) if tokens else x


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
