"""The stage container: runs a stage's blocks, keeps their feature maps, and forms each block's dense shortcut."""

from collections.abc import Iterator
from typing import Any, overload

from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from ..errors import DenseShortcutError
from .affine_form import frozen_statistics
from .block import layout_of
from .connectivity import Segment
from .features import StageState
from .hooks import has_hooks, observed
from .residual_add import BlockContext, ResidualAdd
from .shortcut import DenseShortcut
from .steps import Step


class DenseStage(nn.Module):
    """A stage whose blocks see all earlier feature maps of the stage.

    It is the host's own container under another class (`DenseStage.adopt`): the blocks keep their names and hooks, and
    what is added are the shortcuts, `shortcut` for the first segment. `stage[i]` is block i and `len(stage)` the number
    of blocks.
    """

    shortcut: DenseShortcut
    segments: tuple[Segment, ...]
    aggregate: str
    keep_identity: bool
    fused: bool
    host_class: type[nn.Module]

    @classmethod
    def adopt(
        cls, stage: nn.Module, shortcuts: dict[Segment, DenseShortcut], *, aggregate: str, keep_identity: bool
    ) -> None:
        """Turn `stage`, whose segments are made of `block.DenseBlock`s, into a DenseStage in place."""
        host_class = type(stage)
        stage.__class__ = cls
        assert isinstance(stage, cls)
        stage.host_class, stage.segments = host_class, tuple(shortcuts)
        stage.aggregate, stage.keep_identity, stage.fused = aggregate, keep_identity, False
        for segment, shortcut in shortcuts.items():
            stage.add_module(segment.shortcut, shortcut)

    def release(self) -> None:
        """Undo `adopt` in place."""
        for segment in self.segments:
            delattr(self, segment.shortcut)
        host_class = self.host_class
        del self.segments, self.aggregate, self.keep_identity, self.fused, self.host_class
        self.__class__ = host_class  # type: ignore[assignment]

    @property
    def shortcuts(self) -> dict[Segment, DenseShortcut]:
        """The dense shortcut of each segment."""
        return {segment: self._modules[segment.shortcut] for segment in self.segments}  # type: ignore[misc]

    @property
    def block_names(self) -> list[str]:
        """The names of the host's blocks in order."""
        added = {segment.shortcut for segment in self.segments}
        return [name for name, module in self._modules.items() if name not in added and module is not None]

    @property
    def blocks(self) -> list[nn.Module]:
        """The host's blocks in order."""
        return [self._modules[name] for name in self.block_names]  # type: ignore[misc]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X_L, (N, C, H', W'), from the stage's input (N, C_in, H, W).

        A container of timm that keeps a switch for activation checkpointing to itself (RegNet's) is held to it.
        """
        if getattr(self, "grad_checkpointing", False):
            for step in self:
                x = checkpoint(step, x, *args, use_reentrant=False, **kwargs)
            return x
        state = StageState()
        for context in self.contexts():
            x, state = self.step(context, x, state, *args, **kwargs)
        return x

    def step(
        self, context: BlockContext, x: Tensor, state: StageState, *args: Any, **kwargs: Any
    ) -> tuple[Any, StageState]:
        """Run a block.

        Args:
            context: one of `contexts`.
            x: the stage's input X_in for the first block, else the output of the one before.
            state: what the step before gave; an empty one for the first.
            args, kwargs: what the host gives its blocks besides.

        Returns:
            what the block gives back, its map or a tuple with it, and what the stage keeps for the blocks to come.
        """
        if context.shortcut is None:
            return context.block(x, *args, **kwargs), StageState()
        recomputes = _is_recomputing()
        if context.k == 0:
            state = StageState()
        else:
            _check_follows(context.k, x, state, recomputes)
        add = ResidualAdd(context, state, self.aggregate, self.keep_identity)
        if not recomputes:
            return _run(context.block, add, x, args, kwargs)
        with frozen_statistics(context.block, context.shortcut):
            return _run(context.block, add, x, args, kwargs)

    def contexts(self) -> list[BlockContext]:
        """Where each block stands. Shortcuts may be wrapped by PEFT, whose wrappers pass all on."""
        blocks = self.blocks
        contexts = [BlockContext(block) for block in blocks]
        for segment, shortcut in self.shortcuts.items():
            inside = range(segment.first, segment.stop)
            hooked = [has_hooks(blocks[n]) for n in inside]
            for k, n in enumerate(inside):
                last = n + 1 == segment.stop
                seen = observed(blocks[n]), not last and hooked[k + 1]
                contexts[n] = BlockContext(blocks[n], shortcut, k, last, *seen, layout_of(blocks[n]))
        return contexts

    def __len__(self) -> int:
        return len(self._modules) - len(self.segments)

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
        states = [StageState()] * (len(self) + 1)
        return (Step(self, n, context, states) for n, context in enumerate(self.contexts()))

    def extra_repr(self) -> str:
        return f"aggregate={self.aggregate!r}, keep_identity={self.keep_identity}"


def _run(
    block: nn.Module, add: ResidualAdd, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, StageState]:
    """What the block gives back, and the state behind it."""
    result = block(x, *args, residual_add=add, **kwargs)
    return result, add.finish(block, result)


def _check_follows(k: int, x: Tensor, state: StageState, recomputes: bool) -> None:
    """That block l = k + 1 of a segment is given what the block before it gave back.

    Raises:
        DenseShortcutError: it was changed in between, or the block before was left out.
    """
    if len(state.features) != k + 1:
        raise DenseShortcutError(
            "a block of a dense stage was run without those before it (a slice, or blocks left out at random), so it "
            "has no earlier maps: run all of them, or leave the stage out with plug_in(stages=..)."
        )
    if not recomputes and not state.follows(x):
        raise DenseShortcutError(
            "the feature map is changed between two blocks of a dense stage, which are therefore no chain: leave the "
            "stage out with plug_in(stages=..), or plug_in(blocks=..)."
        )


def _is_recomputing() -> bool:
    """Whether this forward pass is run by a backward pass, as activation checkpointing does."""
    return not is_compiling() and _current_graph_task_id() != -1
