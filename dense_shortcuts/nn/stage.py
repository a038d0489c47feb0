"""The stage container: runs its blocks, keeps their feature maps, and adds each block's dense shortcut."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import DenseShortcutError
from .block import layout_of
from .connectivity import Segment
from .features import StageState
from .hooks import has_hooks, observed
from .recompute import frozen_statistics, is_recomputing
from .residual_add import BlockContext, ResidualAdd
from .shortcut import DenseShortcut
from .steps import Step


class DenseStage(nn.Module):
    """A stage whose blocks see all earlier feature maps of the stage.

    It is the host's own container with another class (`DenseStage.adopt`): blocks keep their names and hooks, and only
    the shortcuts are added, `shortcut` being the first segment's. `stage[i]` is block i and `len(stage)` the number of
    blocks.
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
        """Turn `stage`, whose blocks are plugged already, into a DenseStage in place."""
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

        Some containers of timm (RegNet's) have their own switch for activation checkpointing, which is honoured.
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
            x, state: what the previous step returned; the stage's input X_in and an empty state for the first.
            args, kwargs: what else the host passes to its blocks.

        Returns:
            the block's output, a map or a tuple with one, and the state for the next block.
        """
        if context.shortcut is None:
            return context.block(x, *args, **kwargs), StageState()
        recomputes = is_recomputing()
        state = StageState() if context.k == 0 else state
        _check_follows(context.k, x, state, recomputes)
        add = ResidualAdd(self, context, state)
        with frozen_statistics(context.block, context.shortcut) if recomputes else nullcontext():
            result = context.block(x, *args, residual_add=add, **kwargs)
            return result, add.finish(context.block, result)

    def contexts(self) -> list[BlockContext]:
        """Where each block stands. Shortcuts may be wrapped by PEFT, whose wrappers forward every attribute."""
        blocks = self.blocks
        contexts = [BlockContext(block) for block in blocks]
        for segment, shortcut in self.shortcuts.items():
            inside = range(segment.first, segment.stop)
            hooked = [has_hooks(blocks[n]) for n in inside]
            for k, n in enumerate(inside):
                last = n + 1 == segment.stop
                seen = observed(blocks[n]), hooked[k], not last and hooked[k + 1]
                contexts[n] = BlockContext(blocks[n], shortcut, k, last, *seen, layout_of(blocks[n]))
        return contexts

    def __len__(self) -> int:
        return len(self._modules) - len(self.segments)

    def __getitem__(self, index: int | slice) -> Any:
        """Block `index`; for a slice, the steps of one pass, for host code that runs them in sequence."""
        return list(self)[index] if isinstance(index, slice) else self.blocks[index]

    def __iter__(self) -> "Iterator[Step]":
        """One pass over the stage as callables to run in sequence, each of which may be checkpointed.

        Plain blocks would not do, because they need the earlier maps; timm's checkpoint_seq iterates over stages.
        Gradients of later sums bypass the tensors that steps return. For the whole gradient of such a tensor, hook its
        block or choose the plain back end; gradients of parameters and inputs are always whole.
        """
        states = [StageState()] * (len(self) + 1)
        return (Step(self, n, context, states) for n, context in enumerate(self.contexts()))

    def extra_repr(self) -> str:
        return f"aggregate={self.aggregate!r}, keep_identity={self.keep_identity}"


def _check_follows(k: int, x: Tensor, state: StageState, recomputes: bool) -> None:
    """Check that block l = k + 1 of a segment is given the previous block's output.

    Raises:
        DenseShortcutError: the map was changed in between, or the previous block was skipped.
    """
    if k and len(state.features) != k + 1:
        raise DenseShortcutError(
            "a block of a dense stage was run without those before it (a slice, or blocks dropped at random), so it "
            "has no earlier maps: run all blocks, or leave the stage out with plug_in(stages=..)."
        )
    if not recomputes and not state.follows(x):
        raise DenseShortcutError(
            "the feature map is changed between two blocks of a dense stage, so they do not form a chain: leave the "
            "stage out with plug_in(stages=..) or plug_in(blocks=..)."
        )
