"""The stage container: runs a stage's blocks, keeps their feature maps, and forms each block's dense shortcut."""

from collections.abc import Iterator
from typing import Any, NamedTuple, overload

from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..adapters import has_tokens, has_volumes
from ..errors import DenseShortcutError
from .hooks import has_hooks, observed
from .norms import frozen_statistics
from .residual_add import Join, Place
from .shortcut import DenseShortcut
from .stage_state import Memory
from .watch import Repeat, Watch


class Row(NamedTuple):
    """Blocks first .. stop - 1 of a container, residual ones whose maps share a shape, and the name of their shortcut.

    A stage of a ResNet is one row. Where other layers stand between the blocks, or the shape changes in the middle,
    there are more.
    """

    first: int
    stop: int
    shortcut: str


class Prepared(NamedTuple):
    """What a pass over a stage leaves to the next, which has less to find out then.

    Attributes:
        places: those of the blocks.
        rows: how rows were run, by name; None where another pass cannot do the same.
        watch: tells whether all this holds; None in the pass that works it out.
    """

    places: list[Place]
    rows: dict[str, Repeat | None]
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
        self.__dict__.pop("_prepared", None)
        self.__class__ = host_class  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: all but what was prepared from these very modules."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

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
        memory = memory if place.k else memory.begin()
        repeats = memory.repeat is not None  # then nobody comes between two blocks, nor is this run a second time
        recomputes = not repeats and _is_recomputing()
        if place.k and not repeats:
            _check_follows(place.k, x, memory, recomputes)
        join = Join(place, place.shortcut, memory, self.aggregate, self.keep_identity)
        if not recomputes:
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
        # on a GPU there are kernels enough to hide behind; norms that are frozen for a second run are not as they are
        repeats = ops.is_eager(x) and x.is_cpu and not _is_recomputing()
        prepared = (self._taken() if repeats else None) or Prepared(self.places(), {})
        memory = Memory(once=True, rows=prepared.rows if repeats else None)
        for place in prepared.places:
            x, memory = self.step(place, x, memory, *args, **kwargs)
        if repeats:
            self._leave(prepared)
        return x

    def _taken(self) -> Prepared | None:
        """What the pass before has left, if all is as it was; taken away, so that no other thread has it too."""
        prepared: Prepared | None = self.__dict__.pop("_prepared", None)
        return prepared if prepared is not None and prepared.watch is not None and prepared.watch.holds(self) else None

    def _leave(self, prepared: Prepared) -> None:
        """Leave to the next pass what this one has worked out."""
        rows = prepared.rows
        new = {row: repeat for row, repeat in rows.items() if repeat is not None and not repeat.watched}
        if prepared.watch is None or new:
            if has_hooks(self):
                return
            shortcuts = [module for shortcut in self.shortcuts.values() for module in shortcut.modules()]
            ends = [module for repeat in rows.values() if repeat is not None for module in repeat.modules()]
            watch = Watch(self, [*shortcuts, *ends])
            if not watch.is_lasting():
                return
            rows |= {row: repeat if repeat.put_under(watch) else None for row, repeat in new.items()}
            prepared = prepared._replace(watch=watch)
        self.__dict__["_prepared"] = prepared  # nn.Module's own way of setting takes far longer

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


def _run(block: nn.Module, join: Join, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Memory]:
    """What the block gives back, and the memory behind it."""
    result = block(x, *args, join=join, **kwargs)
    return result, join.remember(block, result)


def _check_follows(k: int, x: Tensor, memory: Memory, recomputes: bool) -> None:
    """That block l = k + 1 of a row is given what the block before it gave back.

    Raises:
        DenseShortcutError: it was changed in between, or the block before was left out.
    """
    if memory.finished() != k + 1:
        raise DenseShortcutError(
            "a block of a dense stage was run without those before it (a slice, or blocks left out at random), so it "
            "has no earlier maps: run all of them, or leave the stage out with plug_in(stages=..)."
        )
    if not recomputes and not memory.follows(x):
        raise DenseShortcutError(
            "the feature map is changed between two blocks of a dense stage, which are therefore no chain: leave the "
            "stage out with plug_in(stages=..), or plug_in(blocks=..)."
        )


def _is_recomputing() -> bool:
    """Whether this forward pass is run by a backward pass, as activation checkpointing does."""
    return not is_compiling() and _current_graph_task_id() != -1
