"""The stage container: runs a stage's blocks, keeps their feature maps, and forms each block's dense shortcut."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from .shortcut import DenseShortcut, Term

class DenseStage(nn.Module):
    """A stage whose blocks see all earlier feature maps of the stage.

    It is the host's own nn.Sequential under another class (`DenseStage.adopt`): the blocks keep their names and hooks,
    and the child `shortcut` is all that is added. `stage[i]` is block i and `len(stage)` the number of blocks.
    """

    shortcut: DenseShortcut
    aggregate: str
    keep_identity: bool

    @classmethod
    def adopt(cls, stage: nn.Sequential, shortcut: DenseShortcut, *, aggregate: str, keep_identity: bool) -> None:
        """Turn `stage`, whose children are `adapters.block.DenseBlock`s, into a DenseStage in place."""
        stage.add_module("shortcut", shortcut)
        stage.__class__ = cls
        stage.aggregate = aggregate  # type: ignore[assignment]
        stage.keep_identity = keep_identity  # type: ignore[assignment]

    def release(self) -> None:
        """Undo `adopt` in place."""
        del self.shortcut, self.aggregate, self.keep_identity
        self.__class__ = nn.Sequential  # type: ignore[assignment]

    @property
    def blocks(self) -> list[nn.Module]:
        """The host's blocks in order."""
        return [module for name, module in self._modules.items() if name != "shortcut" and module is not None]

    def __len__(self) -> int:
        return len(self._modules) - 1

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    def __iter__(self) -> Iterator[Callable[[Any], Any]]:
        """The stage as callables to run one after the other, each of which may be checkpointed.

        A block alone cannot stand here, for it needs the earlier maps; timm's checkpoint_seq iterates over stages.
        """
        return (partial(self.step, k) for k in range(len(self)))

    def step(self, k: int, state: Any) -> Any:
        """Run block l = k + 1.

        Args:
            k: position of the block, from 0.
            state: the stage's input X_in (N, C_in, H, W) for the first block, else what the step before gave.

        Returns:
            (X_l, terms of X_0 .. X_l), or after the last block X_L alone, (N, C, H, W).
        """
        x, terms = (state, ()) if k == 0 else state
        last = k == len(self) - 1

        def join(branch: Tensor, identity: Tensor) -> Tensor:
            nonlocal terms
            if k == 0:
                terms = (self.shortcut.term(0, identity),)
            total = self.shortcut(k, branch + identity if self.keep_identity else branch, terms)
            if self.aggregate == "block" and not last:
                terms = (*terms, self.shortcut.term(k + 1, branch))
            return total

        x = self[k](x, join)
        if last:
            return x
        if self.aggregate != "block":
            terms = (*terms, self.shortcut.term(k + 1, x))
        return x, terms

    def forward(self, x: Tensor) -> Tensor:
        """X_L, (N, C, H', W'), from the stage's input (N, C_in, H, W)."""
        for step in self:
            x = step(x)
        return x

    def extra_repr(self) -> str:
        return f"aggregate={self.aggregate!r}, keep_identity={self.keep_identity}"
