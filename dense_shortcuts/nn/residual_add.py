"""The add at the end of a block: computes its map X_l from the block's parts and the earlier maps."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import ops
from ..errors import DenseShortcutError
from .affine_form import is_fusable
from .block import DenseBlock, MapLayout, map_of
from .features import StageState
from .group_sums import start_group
from .hooks import observed
from .shortcut import DenseShortcut


class BlockContext(NamedTuple):
    """Where a block stands in one pass over a stage.

    Attributes:
        block, layout: the block, and how its maps are laid out.
        shortcut: the shortcut of its segment; None for a block in no segment.
        k, last: its position in the segment, and whether it is the last there.
        observed: whether a hook may observe its output.
        hooked, next_hooked: whether a hook may observe the block, or the next one, or a layer in it.
    """

    block: nn.Module
    shortcut: DenseShortcut | None = None
    k: int = 0
    last: bool = False
    observed: bool = False
    hooked: bool = False
    next_hooked: bool = False
    layout: MapLayout = MapLayout()


class ResidualAdd:
    """The add at the end of block l = k + 1: computes X_l from the block's parts and the earlier maps."""

    def __init__(self, stage: Any, context: BlockContext, state: StageState) -> None:
        assert context.shortcut is not None
        self.context, self.shortcut, self.state = context, context.shortcut, state
        self.k = operator.index(context.k)  # a constant for torch.compile, even if a block is compiled alone
        # a block that is not chosen keeps the host's shortcut
        self.keep_identity = stage.keep_identity or not self.shortcut.sources[self.k]
        self.keeps_branch = stage.aggregate == "block" and not context.last

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
        """X_l, in the layout of `branch`.

        Args:
            branch, norm: the residual branch, and its last norm if that is still to be applied.
            identity, identity_norm: the host's shortcut, and its last norm if that is still to be applied.
            activation: s, or None.
            whole: whether `branch` already includes the identity.
        """
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
        seen = isinstance(branch, Proxy) or (isinstance(activation, nn.Module) and observed(activation))
        relu = fused and ops.is_relu(activation) and not seen  # in a traced graph it stays a node, as in the host's
        addends = [identity] if self.keep_identity and not whole else []
        x = self._sum(branch, norm, addends, relu, fused and (relu or activation is None), backend)

        if reshaped:
            x = layout.from_map(x, like)
        if activation is not None and not relu:
            return activation(x)
        return torch.positive(x) if isinstance(x, Proxy) else x  # a node in the block's scope, for feature extractors

    def finish(self, block: nn.Module, result: Any) -> StageState:
        """The state of the stage after the block, which returned `result`."""
        if self.context.last:
            return StageState()
        if len(self.state.features) < self.k + 2:  # the pass that made X_l has not added it to the state
            x = self.context.layout.as_map(map_of(block, result))
            self.state = self.state.add(self.shortcut.feature(self.k + 1, x, self._backend(x)))
        return self.state.after(result[0] if isinstance(result, tuple) else result)

    def _backend(self, x: Tensor) -> str:
        """The back end for the block. A traced graph chooses as it runs, if its parameters are where kernels run."""
        shortcut, backend = self.shortcut, self.state.backend
        if isinstance(x, Proxy):
            like = next(self.context.block.parameters(), torch.empty(1))
            return "plain" if ops.choose(like, shortcut.backend) == "plain" else shortcut.backend
        if backend is None:
            backend = ops.choose(x, shortcut.backend, tiled=shortcut.tiled)
            self.state = self.state.replace(backend=backend)
        return backend

    def _check_shape(self, branch: Tensor) -> None:
        """Raises DenseShortcutError if the branch and the earlier maps differ in shape or number of channels."""
        shape, channels = self.state.features[0].map.shape, self.shortcut.channels
        if not isinstance(branch, Proxy) and (branch.shape != shape or shape[1] != channels):
            raise DenseShortcutError(
                f"a branch of shape {tuple(branch.shape)} cannot be added to maps of shape {tuple(shape)} in a stage "
                f"plugged in for {channels} channels: leave it out with plug_in(stages=..) or plug_in(blocks=..)."
            )

    def _sum(self, branch: Tensor, norm: Any, addends: list[Tensor], relu: bool, ends: bool, backend: str) -> Tensor:
        """The sum of branch, addends and earlier maps, with `norm` fused; X_l itself if the block `ends` with it."""
        shortcut, k, last, fused = self.shortcut, self.k, self.context.last, bool(self.shortcut.sources[self.k])
        state = later = start_group(shortcut, k, self.state, backend) if shortcut.tiled else self.state
        if self.keeps_branch:
            later = state.add(shortcut.feature(k + 1, branch, backend))
        x, feature = shortcut(
            k,
            [branch, *addends] if norm is None else addends,
            state,
            branch=None if norm is None else shortcut.branch_feature(norm, branch, backend),
            relu=relu,
            finish=ends and not self.keeps_branch and not last and not self._is_observed(),
            overwrite=norm is not None and backend == "native" and self._is_own(branch),
            backend=backend if fused else "plain",
        )
        self.state = later if feature is None else later.add(feature)
        return x

    def _fuses_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the branch may be computed in the pass that adds the shortcuts.

        Not if the branch's output is itself a map to keep, nor if outputs must match the host bit for bit: fusing the
        norm reorders floating-point additions.
        """
        exact = self.keep_identity or not self.shortcut.normalised
        return not exact and not self.keeps_branch and is_fusable(norm) and not observed(norm)

    def _fuses_identity_norm(self, norm: nn.Module) -> bool:
        """Whether the last norm of the projection can be folded into N(X_0); X_0 itself is then never computed."""
        taken = self.k == 0 and not self.keep_identity and self.shortcut.fuses_norm(0)
        return taken and is_fusable(norm) and not observed(norm)

    def _is_own(self, branch: Tensor) -> bool:
        """Whether only this block can hold the branch, so the sum may be written over it, as the host's add is.

        True of what a plain convolution returned to the block. It saves two per cent of ResNet-50's inference on a CPU.
        """
        recorded = is_grad_enabled() or is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
        block, real = self.context.block, type(branch) is Tensor and branch.is_cpu
        if recorded or not real or self.context.hooked or not isinstance(block, DenseBlock):
            return False
        return type(block.last_conv()) is nn.Conv2d

    def _is_observed(self) -> bool:
        """Whether a hook may observe or replace X_l: a hook on this block, or with gradients on, in the next block.

        A map whose moments were computed in the same pass does not receive its whole gradient.
        """
        return self.context.observed or ((is_grad_enabled() or is_compiling()) and self.context.next_hooked)
