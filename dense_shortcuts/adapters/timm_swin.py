"""timm's Swin and SAM blocks, with maps (N, H, W, C): a trace cannot follow how they are split into windows."""

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer_sam import Block as SamBlock
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from ..nn.block import DenseBlock, in_stage
from ..nn.residual_add import ResidualAdd


class _DenseWindows(DenseBlock):
    """Two branches, attention and MLP; the second takes the sum of the first and the block's input."""

    tokens = True
    norm1: nn.LayerNorm

    def out_channels(self) -> int:
        return self.norm1.normalized_shape[-1]

    def attention(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mixed(self, x: Tensor) -> Tensor:
        """The MLP branch, for tokens (N, L, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor, residual_add: ResidualAdd | None = None) -> Tensor:
        residual_add = in_stage(residual_add)
        first = self.attention(x)

        hidden = x + first
        second = self.mixed(hidden.flatten(1, 2)).reshape(x.shape)

        if residual_add.keep_identity:
            return residual_add(hidden + second, None, x, self.activation(), whole=True)
        return residual_add(first + second, None, x, self.activation())


class DenseSwinBlock(_DenseWindows, SwinTransformerBlock):
    def attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self._attn(self.norm1(x)))

    def mixed(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x)))


class DenseSwinV2Block(_DenseWindows, SwinTransformerV2Block):
    def attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self._attn(x)))

    def mixed(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


class DenseSwinV2CrBlock(_DenseWindows, SwinTransformerV2CrBlock):
    def attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self._shifted_window_attn(x)))

    def mixed(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))

    def activation(self) -> nn.Module | None:
        return None if type(self.norm3) is nn.Identity else self.norm3


class DenseSamBlock(_DenseWindows, SamBlock):
    def attention(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]

        x, padded = self.norm1(x), None
        if self.window_size > 0:
            x, padded = window_partition(x, self.window_size)
        x = self.drop_path1(self.ls1(self.attn(x)))

        return x if padded is None else window_unpartition(x, self.window_size, (height, width), padded)

    def mixed(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


BLOCKS = (DenseSwinBlock, DenseSwinV2Block, DenseSwinV2CrBlock, DenseSamBlock)
