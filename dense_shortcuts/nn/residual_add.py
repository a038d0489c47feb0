"""What a stage does at the end of a block: makes its map from the block's parts and the earlier maps."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx import Proxy

from .. import ops
from ..errors import DenseShortcutError
from .affine_form import is_fusable
from .block import MapLayout, map_of
from .features import StageState
from .group_sums import start_group
from .hooks import observed
from .shortcut import DenseShortcut


class BlockContext(NamedTuple):
    """Where a block stands in one pass over a stage.

    Attributes:
        block: the block.
        shortcut: that of its segment; None for a block in no segment.
        k: its position in the segment.
        last: whether it is the last one there.
        observed: whether a hook may look at its output.
        next_hooked: whether one may look at that of a layer in the block after it.
        layout: how its maps are laid out.
    """

    block: nn.Module
    shortcut: DenseShortcut | None = None
    k: int = 0
    last: bool = False
    observed: bool = False
    next_hooked: bool = False
    layout: MapLayout = MapLayout()


class ResidualAdd:
    """What a stage does at the end of block l = k + 1: makes X_l from the block's parts and the earlier maps."""

    def __init__(self, context: BlockContext, state: StageState, aggregate: str, keep_identity: bool) -> None:
        assert context.shortcut is not None
        self.context, self.shortcut, self.state, self.aggregate = context, context.shortcut, state, aggregate
        self.k = operator.index(context.k)  # a constant to torch.compile also where that compiles a block alone
        # a block that is not chosen keeps what its host does
        self.keep_identity = keep_identity or not self.shortcut.sources[self.k]
        self.finished = False  # whether the state has X_l already, from the pass that made it

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
        """X_l; see `block.Join`."""
        layout, like = self.context.layout, branch
        backend = self._backend(branch)
        fused = backend != "plain" and bool(self.shortcut.sources[self.k])  # without maps there is nothing to fuse
        if identity_norm is not None and not (fused and self._fuses_identity_norm(identity_norm)):
            identity, identity_norm = identity_norm(identity), None
        reshaped = not layout.is_map(branch)
        if reshaped:
            branch, identity = layout.as_map(branch), layout.as_map(identity)
        if self.k == 0:
            self.state = self.state.add(self.shortcut.feature(0, identity, backend, identity_norm))
        self._check_shape(branch)

        if norm is not None and not (fused and self._fuses_norm(norm)):
            branch, norm = norm(branch), None
        relu = fused and ops.is_relu(activation) and not (isinstance(activation, nn.Module) and observed(activation))
        addends = [identity] if self.keep_identity and not whole else []
        x = self._sum(branch, norm, addends, relu, fused and (relu or activation is None), backend)

        if reshaped:
            x = layout.from_map(x, like)
        if activation is not None and not relu:
            return activation(x)
        return torch.positive(x) if isinstance(x, Proxy) else x  # a node of the block's own, which extractors look for

    def finish(self, block: nn.Module, result: Any) -> StageState:
        """What the stage keeps after the block, which gave back `result`."""
        if self.context.last:
            return StageState()
        if not self.finished:
            x = self.context.layout.as_map(map_of(block, result))
            self.state = self.state.add(self.shortcut.feature(self.k + 1, x, self._backend(x)))
        return self.state.after(result[0] if isinstance(result, tuple) else result)

    def _backend(self, x: Tensor) -> str:
        """The back end for the block. A traced graph chooses as it runs, if its parameters are where kernels run."""
        shortcut = self.shortcut
        if not isinstance(x, Proxy):
            return ops.choose(x, shortcut.backend, tiled=shortcut.tiled)
        like = next(self.context.block.parameters(), torch.empty(1))
        return "plain" if ops.choose(like, shortcut.backend) == "plain" else shortcut.backend

    def _check_shape(self, branch: Tensor) -> None:
        """Raises DenseShortcutError where the branch cannot be added to the maps: another shape or width."""
        if isinstance(branch, Proxy):
            return
        shape, channels = self.state.features[0].map.shape, self.shortcut.channels
        if branch.shape != shape or shape[1] != channels:
            raise DenseShortcutError(
                f"a branch of shape {tuple(branch.shape)} meets maps of shape {tuple(shape)} in a stage plugged in "
                f"for {channels} channels: leave the stage out with plug_in(stages=..), or plug_in(blocks=..)."
            )

    def _sum(self, branch: Tensor, norm: Any, addends: list[Tensor], relu: bool, ends: bool, backend: str) -> Tensor:
        """The sum of the branch, whose norm is fused or None, and what else is added; X_l where the block `ends` so."""
        shortcut, k, last, fused = self.shortcut, self.k, self.context.last, bool(self.shortcut.sources[self.k])
        state = later = start_group(shortcut, k, self.state, backend) if shortcut.tiled else self.state
        if self.aggregate == "block" and not last:
            later, self.finished = state.add(shortcut.feature(k + 1, branch, backend)), True
        x, feature = shortcut(
            k,
            [branch, *addends] if norm is None else addends,
            state,
            branch=None if norm is None else shortcut.branch_feature(norm, branch, backend),
            relu=relu,
            finish=ends and not self.finished and not last and not self._is_observed(),
            backend=backend if fused else "plain",
        )
        if feature is not None:
            later, self.finished = later.add(feature), True
        self.state = later
        return x

    def _fuses_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the branch may be computed in the pass that adds the shortcuts.

        Not where the branch's output is itself a map to keep, nor where outputs must match the host bit for bit: fusing
        the norm reorders floating-point additions.
        """
        exact = self.keep_identity or not self.shortcut.normalised
        kept = self.aggregate == "block" and not self.context.last
        return not exact and not kept and is_fusable(norm) and not observed(norm)

    def _fuses_identity_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the projection may become part of N(X_0), so that X_0 itself is never made."""
        taken = self.k == 0 and not self.keep_identity and self.shortcut.fuses_norm(0)
        return taken and is_fusable(norm) and not observed(norm)

    def _is_observed(self) -> bool:
        """Whether a hook may see or replace X_l: one on its block, or with gradients one in the next block.

        The gradient of a map whose moments were taken in the same pass does not all come to the map itself.
        """
        return self.context.observed or ((is_grad_enabled() or is_compiling()) and self.context.next_hooked)
