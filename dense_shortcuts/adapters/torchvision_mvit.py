"""torchvision's MViT blocks for videos: tokens (N, 1 + T H W, C), and the size (T, H, W) of their volume."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.video.mvit import MultiscaleBlock

from ..nn.block import DenseBlock, in_stage
from ..nn.residual_add import ResidualAdd
from .branches import add_two_branches


class DenseMultiscaleBlock(DenseBlock, MultiscaleBlock):
    """Two branches, attention and MLP; what either is added to may be a projection."""

    tokens = True
    pool_skip: nn.Module | None

    @property
    def project(self) -> nn.Module | None:  # type: ignore[override]
        """The host's layer of this name; it replaces the adapter's method, which this forward pass does not use."""
        return self._modules.get("project")

    def projects(self) -> bool:
        return self.project is not None or self.pool_skip is not None

    def out_channels(self) -> int:
        return int(self.mlp[-2].out_features)

    def forward(self, x: Tensor, thw: Any, residual_add: ResidualAdd | None = None) -> Any:  # type: ignore[override]
        residual_add = in_stage(residual_add)
        hidden = self._normalised(self.norm1, x)
        first, new = self.attn(hidden, thw)
        first = self.stochastic_depth(first)
        projection = self.project
        identity = x if projection is None or not self.proj_after_attn else projection(hidden)
        identity = identity if self.pool_skip is None else self.pool_skip(identity, thw)[0]
        total = identity + first

        hidden = self._normalised(self.norm2, total)
        projected = None if projection is None or self.proj_after_attn else projection(hidden)
        second = self.stochastic_depth(self.mlp(hidden))
        return add_two_branches(residual_add, first, second, total, identity, projected), new

    def _normalised(self, norm: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = norm(x.transpose(1, 2)).transpose(1, 2) if self.needs_transposal else norm(x)
        return found


BLOCKS = (DenseMultiscaleBlock,)
