"""timm's Swin blocks, whose maps are (N, H, W, C): a trace cannot follow the windows they are cut into."""

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from .block import DenseBlock, Join, joined


class _DenseSwin(DenseBlock):
    """Two branches, attention and MLP; the second takes the first one's sum with the block's input."""

    tokens = True
    norm1: nn.LayerNorm

    def out_channels(self) -> int:
        return self.norm1.normalized_shape[-1]

    def attention(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mixed(self, x: Tensor) -> Tensor:
        """The MLP's branch for tokens (N, L, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor, join: Join | None = None) -> Tensor:
        join = joined(join)
        first = self.attention(x)

        hidden = x + first
        second = self.mixed(hidden.flatten(1, 2)).reshape(x.shape)

        if join.keep_identity:
            return join(hidden + second, None, x, None, whole=True)
        return join(first + second, None, x, None)


class DenseSwinBlock(_DenseSwin, SwinTransformerBlock):
    def attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self._attn(self.norm1(x)))

    def mixed(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x)))


class DenseSwinV2Block(_DenseSwin, SwinTransformerV2Block):
    def attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self._attn(x)))

    def mixed(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


BLOCKS = (DenseSwinBlock, DenseSwinV2Block)
