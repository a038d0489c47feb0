"""The stage container: runs a stage's blocks, keeps their feature maps, and forms each block's dense shortcut."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import ops
from .norms import frozen_statistics, joins
from .shortcut import DenseShortcut, Memory, as_branch

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
    fused: bool

    @classmethod
    def adopt(cls, stage: nn.Sequential, shortcut: DenseShortcut, *, aggregate: str, keep_identity: bool) -> None:
        """Turn `stage`, whose children are `adapters.block.DenseBlock`s, into a DenseStage in place."""
        stage.add_module("shortcut", shortcut)
        stage.__class__ = cls  # type: ignore[assignment]
        stage.aggregate = aggregate  # type: ignore[assignment]
        stage.keep_identity = keep_identity  # type: ignore[assignment]
        stage.fused = False  # type: ignore[assignment]

    def release(self) -> None:
        """Undo `adopt` in place."""
        del self.shortcut, self.aggregate, self.keep_identity, self.fused
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
            (X_l, what the stage keeps for the blocks to come), or after the last block X_L alone, (N, C, H, W).
        """
        x, memory = (state, Memory()) if k == 0 else state
        block, last = self[k], k == len(self) - 1
        shortcut, entered = self.shortcut, False  # whether the memory has X_l already, from the pass that made it

        def join(branch: Tensor, norm: nn.Module | None, identity: Tensor, activation: nn.Module) -> Tensor:
            nonlocal memory, entered
            backend = ops.choose(branch, shortcut.backend)
            fused = backend != "plain"
            if k == 0:
                memory = memory.add(shortcut.enter(0, identity, backend))
            memory = shortcut.sum_ahead(k, memory, backend)
            later = memory

            before_norm, addends = None, [identity] if self.keep_identity else []
            if norm is not None and fused and self._joins_norm(norm, last):
                before_norm = as_branch(norm, branch, backend)
            else:
                branch = branch if norm is None else norm(branch)
                addends = [branch, *addends]
            if self.aggregate == "block" and not last:
                later, entered = memory.add(shortcut.enter(k + 1, branch, backend)), True

            relu = fused and type(activation) is nn.ReLU and not _observed(activation)
            finish = relu and not entered and not last and not self._map_is_observed(k)
            records = torch.is_grad_enabled() or torch.compiler.is_compiling()
            overwrite = fused and not records and not entered and self._is_own(branch, block, identity, memory)
            x, ahead = shortcut(
                k,
                addends,
                memory,
                branch=before_norm,
                norm=norm,
                relu=relu,
                finish=finish,
                overwrite=overwrite,
                backend=backend,
            )
            memory = later
            if ahead is not None:
                memory, entered = memory.add(ahead), True
            return x if relu else activation(x)

        with frozen_statistics(block, self.shortcut) if _is_recomputing() else contextlib.nullcontext():
            x = block(x, join)
            if last:
                return x
            if not entered:
                memory = memory.add(shortcut.enter(k + 1, x, ops.choose(x, shortcut.backend)))
        return x, memory

    def _joins_norm(self, norm: nn.Module, last: bool) -> bool:
        """Whether the last norm of the branch may be computed in the pass that adds the shortcuts.

        Not where the branch's output is itself a map to remember, nor where the host's own numbers are promised bit
        for bit, which the other order of additions would break.
        """
        exact = self.keep_identity or not self.shortcut.normalised
        return not exact and (self.aggregate != "block" or last) and joins(norm) and not _observed(norm)

    @staticmethod
    def _is_own(branch: Tensor, block: nn.Module, identity: Tensor, memory: Memory) -> bool:
        """Whether nobody but this block has the branch's memory: no hook may have seen it, and it is no other map's."""
        if _has_hooks(block):
            return False
        others = {term.map.untyped_storage().data_ptr() for term in memory.terms}
        return branch.untyped_storage().data_ptr() not in {*others, identity.untyped_storage().data_ptr()}

    def _map_is_observed(self, k: int) -> bool:
        """Whether a hook may take X_l, l = k + 1: on its block, or on the next one or a layer in it, as their input."""
        return torch.is_grad_enabled() and (_observed(self[k]) or _has_hooks(self[k + 1]))

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
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or any(_GLOBAL_HOOKS)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a hook may look at the output of the module or of one in it."""
    return _observed(module) or any(_has_hooks(child) for child in module._modules.values() if child is not None)


def _is_recomputing() -> bool:
    """Whether this forward pass is run by a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
