"""timm's LowFormer blocks: residual layers in sequence, each of which contains its own add."""

from typing import Any

from timm.models.lowformer import LowFormerBlock, ResidualBlock
from torch import Tensor

from ..nn.residual_add import ResidualAdd
from .timm_positions import DenseSum


class DenseLowFormerBlock(DenseSum, LowFormerBlock):
    branch_first = True

    def out_channels(self) -> int:
        return int(self.local.main.point_conv.conv.out_channels)

    def forward(self, x: Tensor, residual_add: ResidualAdd | None = None) -> Tensor:
        layers = [layer for layer in (self.attn, self.mlp, self.local) if isinstance(layer, ResidualBlock)]
        return self.add_branches(x, residual_add, *map(_branch, layers))


def _branch(layer: Any) -> Any:
    return lambda x: layer.drop_path(layer.main(x))


BLOCKS = (DenseLowFormerBlock,)
