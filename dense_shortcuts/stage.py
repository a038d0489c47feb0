"""The stage container: runs a stage's blocks, keeps their feature maps, and forms each block's dense shortcut."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import ops
from .shortcut import DenseShortcut

_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


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
        stage.__class__ = cls  # type: ignore[assignment]
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
        block, last = self[k], k == len(self) - 1
        ahead = None  # the Term of X_l, where it came out of the same pass as X_l

        def join(branch: Tensor, identity: Tensor, activation: nn.Module) -> Tensor:
            nonlocal terms, ahead
            if k == 0:
                terms = (self.shortcut.enter(0, identity),)
            earlier = terms
            if self.aggregate == "block" and not last:
                terms = (*terms, self.shortcut.enter(k + 1, branch))
            fused = ops.choose(branch, self.shortcut.backend) != "plain"
            relu = fused and type(activation) is nn.ReLU and not _observed(activation)
            finish = relu and self.aggregate != "block" and not last and not self._map_is_observed(k)
            branch = branch + identity if self.keep_identity else branch
            x, ahead = self.shortcut(k, branch, earlier, relu, finish)
            return x if relu else activation(x)

        x = block(x, join)
        if last:
            return x
        if self.aggregate != "block":
            terms = (*terms, self.shortcut.enter(k + 1, x) if ahead is None else ahead)
        return x, terms

    def _map_is_observed(self, k: int) -> bool:
        """Whether a hook may take X_l, l = k + 1: on its block, or on the next one or a layer in it, as their input."""
        return _observed(self[k]) or any(_observed(module) for module in self[k + 1].modules())

    def forward(self, x: Tensor) -> Tensor:
        """X_L, (N, C, H', W'), from the stage's input (N, C_in, H, W)."""
        for step in self:
            x = step(x)
        return x

    def extra_repr(self) -> str:
        return f"aggregate={self.aggregate!r}, keep_identity={self.keep_identity}"


def _observed(module: nn.Module) -> bool:
    """Whether a hook may look at the module's output or its gradient.

    Such an output must be a tensor to which all later gradients come; where X_l and its statistics are made in one pass
    they do not all come to X_l (`ops/fused.py`).
    """
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or any(_GLOBAL_HOOKS)
