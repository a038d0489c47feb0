"""The stage container: runs a stage's blocks, keeps their feature maps, and forms each block's dense shortcut."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _current_graph_task_id
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from . import ops
from .adapters import has_tokens, has_volumes, map_of
from .errors import DenseShortcutError
from .hooks import has_hooks, observed
from .norms import frozen_statistics, joins, known
from .shortcut import DenseShortcut, Memory, as_branch
from .watch import Watch


class Row(NamedTuple):
    """Blocks first .. stop - 1 of a container, residual ones whose maps share a shape, and the name of their shortcut.

    A stage of a ResNet is one row. Where other layers stand between the blocks, or the shape changes in the middle,
    there are more.
    """

    first: int
    stop: int
    shortcut: str


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


class Prepared(NamedTuple):
    """What a pass over a stage, where no gradient is recorded, leaves to the next, which has less to find out then.

    Attributes:
        places: those of the blocks.
        streams: of rows, by name, that were run by one; None where another pass cannot go by it.
        watch: tells whether all this holds; None in the pass that works it out.
    """

    places: list[Place]
    streams: dict[str, ops.Stream | None]
    watch: Watch | None = None


class DenseStage(nn.Module):
    """A stage whose blocks see all earlier feature maps of the stage.

    It is the host's own container under another class (`DenseStage.adopt`): the blocks keep their names and hooks, and
    what is added are the shortcuts, `shortcut` for the first row of blocks. `stage[i]` is block i and `len(stage)` the
    number of blocks.
    """

    shortcut: DenseShortcut
    rows: tuple[Row, ...]
    aggregate: str
    keep_identity: bool
    fused: bool
    host_class: type[nn.Module]

    @classmethod
    def adopt(
        cls, stage: nn.Module, shortcuts: dict[Row, DenseShortcut], *, aggregate: str, keep_identity: bool
    ) -> None:
        """Turn `stage`, whose rows are made of `adapters.block.DenseBlock`s, into a DenseStage in place."""
        host_class = type(stage)
        stage.__class__ = cls
        assert isinstance(stage, cls)
        stage.host_class, stage.rows = host_class, tuple(shortcuts)
        stage.aggregate, stage.keep_identity, stage.fused = aggregate, keep_identity, False
        for row, shortcut in shortcuts.items():
            stage.add_module(row.shortcut, shortcut)

    def release(self) -> None:
        """Undo `adopt` in place."""
        for row in self.rows:
            delattr(self, row.shortcut)
        host_class = self.host_class
        del self.rows, self.aggregate, self.keep_identity, self.fused, self.host_class
        self.__dict__.pop("prepared", None)
        self.__class__ = host_class  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: all but what was prepared from these very modules."""
        return {name: value for name, value in self.__dict__.items() if name != "prepared"}

    @property
    def shortcuts(self) -> dict[Row, DenseShortcut]:
        """The dense shortcut of each row of blocks."""
        return {row: self._modules[row.shortcut] for row in self.rows}  # type: ignore[misc]

    @property
    def block_names(self) -> list[str]:
        """The names of the host's blocks in order."""
        added = {row.shortcut for row in self.rows}
        return [name for name, module in self._modules.items() if name not in added and module is not None]

    @property
    def blocks(self) -> list[nn.Module]:
        """The host's blocks in order."""
        return [self._modules[name] for name in self.block_names]  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._modules) - len(self.rows)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Step]": ...
    def __getitem__(self, index: int | slice) -> "nn.Module | list[Step]":
        """Block `index`; for a slice the steps of one pass, which host code runs one after the other."""
        return list(self)[index] if isinstance(index, slice) else self.blocks[index]

    def __iter__(self) -> "Iterator[Step]":
        """One pass over the stage as callables to run one after the other, each of which may be checkpointed.

        A block alone cannot stand here, for it needs the earlier maps; timm's checkpoint_seq iterates over stages.
        A later block's gradient reaches a map past the tensor that a step gave. To have the gradient of such a tensor
        itself, put a hook on the block or take the plain back end; those of parameters and inputs are whole.
        """
        memories = [Memory()] * (len(self) + 1)
        return (Step(self, n, place, memories) for n, place in enumerate(self.places()))

    def places(self) -> list[Place]:
        """The place of each block. Shortcuts may stand in what PEFT puts around them, which passes all on."""
        blocks = self.blocks
        places = [Place(block) for block in blocks]
        for row, shortcut in self.shortcuts.items():
            inside = range(row.first, row.stop)
            hooked = [has_hooks(blocks[n]) for n in inside]
            for k, n in enumerate(inside):
                block, last = blocks[n], n + 1 == row.stop
                seen = observed(block), hooked[k], not last and hooked[k + 1]
                places[n] = Place(block, shortcut, row.shortcut, k, last, *seen, has_tokens(block), has_volumes(block))
        return places

    def step(self, place: Place, x: Tensor, memory: Memory, *args: Any, **kwargs: Any) -> tuple[Any, Memory]:
        """Run the block at `place`.

        Args:
            place: one of `places`.
            x: the stage's input X_in for the first block, else the output of the one before.
            memory: what the step before gave; an empty one for the first.
            args, kwargs: what the host gives its blocks besides.

        Returns:
            what the block gives back, its map or a tuple with it, and what the stage keeps for the blocks to come.
        """
        if place.shortcut is None:
            return place.block(x, *args, **kwargs), memory.begin()
        if place.k:
            _check_follows(place.k, x, memory)
        join = _Join(self, place, place.shortcut, memory if place.k else memory.begin())
        if not _is_recomputing():
            return _run(place.block, join, x, args, kwargs)
        with frozen_statistics(place.block, place.shortcut):
            return _run(place.block, join, x, args, kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X_L, (N, C, H', W'), from the stage's input (N, C_in, H, W).

        A container of timm that keeps a switch for activation checkpointing to itself (RegNet's) is held to it.
        """
        if getattr(self, "grad_checkpointing", False):
            for step in self:
                x = checkpoint(step, x, *args, use_reentrant=False, **kwargs)
            return x
        quiet = not is_grad_enabled() and ops.is_eager(x)
        prepared = (self._taken() if quiet else None) or Prepared(self.places(), {})
        memory = Memory(streams=prepared.streams)
        for place in prepared.places:
            x, memory = self.step(place, x, memory, *args, **kwargs)
        if quiet:
            self._leave(prepared)
        return x

    def _taken(self) -> Prepared | None:
        """What the pass before has left, if all is as it was; taken away, so that no other thread has it too."""
        prepared: Prepared | None = self.__dict__.pop("prepared", None)
        return prepared if prepared is not None and prepared.watch is not None and prepared.watch.holds(self) else None

    def _leave(self, prepared: Prepared) -> None:
        """Leave to the next pass what this one has worked out."""
        watch, streams = prepared.watch, prepared.streams
        new = {row: stream for row, stream in streams.items() if stream is not None and not stream.read}
        if watch is None or new:
            if has_hooks(self):
                return
            whole = [stream for stream in streams.values() if stream is not None]
            given = [part for stream in whole for parts in stream.given for part in parts or ()]
            shortcuts = [module for shortcut in self.shortcuts.values() for module in shortcut.modules()]
            watch = Watch(self, [self, *shortcuts, *(part for part in given if isinstance(part, nn.Module))])
            for row, stream in new.items():
                covered = watch.covers(stream.seal()) and type(self._modules[row]) is DenseShortcut
                streams[row] = stream if covered and None not in stream.given else None
        self.__dict__["prepared"] = prepared._replace(watch=watch)  # nn.Module's own way of setting takes far longer

    def extra_repr(self) -> str:
        return f"aggregate={self.aggregate!r}, keep_identity={self.keep_identity}"


class Step:
    """Block n in one pass over a stage: x -> its output, where `memories[n]` is what the stage keeps before it.

    Run again, as a checkpoint does, it starts from the same memory.
    """

    def __init__(self, stage: DenseStage, n: int, place: Place, memories: list[Memory]) -> None:
        self.stage, self.n, self.place, self.memories = stage, n, place, memories

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, self.memories[self.n + 1] = self.stage.step(self.place, x, self.memories[self.n], *args, **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        """Never anything, for a host may use its block's own methods in place of a call, past the shortcuts.

        Raises:
            AttributeError: always; `getattr` with a default gives the default.
        """
        raise AttributeError(
            f"the blocks of a dense stage can only be called, and the host asks for {name}: unplug the network first."
        )


class _Join:
    """What a stage does at the end of block l = k + 1: makes X_l from the block's parts and the earlier maps."""

    def __init__(self, stage: DenseStage, place: Place, shortcut: DenseShortcut, memory: Memory) -> None:
        self.stage, self.place, self.shortcut, self.memory = stage, place, shortcut, memory
        # a block that is not chosen keeps what its host does
        self.keep_identity = stage.keep_identity or not shortcut.sources[place.k]
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
        if (x := self._again(branch, identity, given)) is not None:
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
        if x is not None and not reshaped and given == (norm, activation, identity_norm):
            self.memory.stream.given[self.k] = given
        if x is None:
            self.memory = self.memory.leave_stream(self.k)
            addends = [identity] if self.keep_identity and not whole else []
            x = self._sum(branch, norm, identity, addends, relu, ends, backend, fused)
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
        if self.stage.aggregate == "block" and not self.place.last:
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
        if is_grad_enabled() or is_compiling() or self.memory.streams is None:
            return False
        return not self.keep_identity and self.stage.aggregate != "block" and not has_hooks(self.shortcut)

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

    def _again(self, branch: Tensor, identity: Tensor, given: tuple[Any, ...]) -> Tensor | None:
        """X_l as the stream of an earlier pass is prepared to make it of what the block gives; None where it is not."""
        k, stream, streams = self.k, self.memory.stream, self.memory.streams
        if k == 0 and streams is not None:
            stream = streams.get(self.place.row)
        if stream is None or stream.given[k] != given or is_grad_enabled() or not stream.takes(branch):
            return None
        if k == 0:
            if self._backend(branch) != "native" or not stream.serves(identity):
                return None
            stream.begin(identity)
            self.memory = self.memory._replace(stream=stream)
        return self._sum_in(stream, branch, identity)

    def remember(self, x: Tensor) -> Memory:
        """What the stage keeps after the block, whose output is x."""
        if self.place.last:
            self._leave_stream()
            return self.memory.begin()
        if self.entered:
            return self.memory
        x = as_map(x, self.place.tokens, self.place.volumes)
        term = self.shortcut.enter(self.k + 1, x, self._backend(x))
        return self.memory.add(term)

    def _leave_stream(self) -> None:
        """Leave the stream that ran a whole row, if there is one, to the next pass."""
        stream, streams = self.memory.stream, self.memory.streams
        if stream is not None and streams is not None:
            stream.end()
            if streams.get(self.place.row, stream) is not None:
                streams[self.place.row] = stream

    def _joins_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the branch may be computed in the pass that adds the shortcuts.

        Not where the branch's output is itself a map to remember, nor where the host's own numbers are promised bit
        for bit, which the other order of additions would break.
        """
        exact = self.keep_identity or not self.shortcut.normalised
        return not exact and (self.stage.aggregate != "block" or self.place.last) and joins(norm) and not observed(norm)

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


def _run(block: nn.Module, join: _Join, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Memory]:
    """What the block gives back, and the memory behind it."""
    result = block(x, *args, join=join, **kwargs)
    given_on = result[0] if isinstance(result, tuple) else result
    return result, join.remember(map_of(block, result)).after(given_on)


def _check_follows(k: int, x: Tensor, memory: Memory) -> None:
    """That block l = k + 1 of a row is given what the block before it gave back.

    Raises:
        DenseShortcutError: it was changed in between, or the block before was left out.
    """
    if memory.finished() != k + 1:
        raise DenseShortcutError(
            "a block of a dense stage was run without those before it (a slice, or blocks left out at random), so it "
            "has no earlier maps: run all of them, or leave the stage out with plug_in(stages=..)."
        )
    if not _is_recomputing() and not memory.follows(x):
        raise DenseShortcutError(
            "the feature map is changed between two blocks of a dense stage, which are therefore no chain: leave the "
            "stage out with plug_in(stages=..), or plug_in(blocks=..)."
        )


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


def _is_recomputing() -> bool:
    """Whether this forward pass is run by a backward pass, as activation checkpointing does."""
    return not is_compiling() and _current_graph_task_id() != -1
