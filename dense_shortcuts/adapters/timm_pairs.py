"""timm's blocks that return two tensors, one of which is the feature map: MViTv2, EfficientViM, TNT."""

from typing import Any

import torch.nn.functional as F
from timm.models.efficientvim import EfficientViMBlock
from timm.models.mvitv2 import MultiScaleBlock
from timm.models.tnt import Block as TntBlock
from torch import Tensor, nn

from ..nn.block import DenseBlock, in_stage
from ..nn.residual_add import ResidualAdd
from .branches import add_two_branches
from .timm_positions import DenseSum


class DenseMultiScaleBlock(DenseBlock, MultiScaleBlock):
    """MViTv2: tokens (N, L, C), and the size of the map they represent."""

    tokens = True
    shortcut_proj_attn: nn.Module | None
    shortcut_pool_attn: nn.Module | None
    shortcut_proj_mlp: nn.Module | None

    def projects(self) -> bool:
        return any(m is not None for m in (self.shortcut_proj_attn, self.shortcut_pool_attn, self.shortcut_proj_mlp))

    def out_channels(self) -> int:
        return int(self.dim_out)

    def forward(self, x: Tensor, feat_size: Any, residual_add: ResidualAdd | None = None) -> Any:  # type: ignore[override]
        residual_add = in_stage(residual_add)
        hidden = self.norm1(x)
        identity = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(hidden)
        identity = self._shortcut_pool(identity, feat_size)
        first, feat_size = self.attn(hidden, feat_size)
        first = self.drop_path1(first)
        total = identity + first

        hidden = self.norm2(total)
        second = self.drop_path2(self.mlp(hidden))
        projected = None if self.shortcut_proj_mlp is None else self.shortcut_proj_mlp(hidden)
        return add_two_branches(residual_add, first, second, total, identity, projected), feat_size


class DenseEfficientViMBlock(DenseSum, EfficientViMBlock):
    """Maps (N, C, H, W) and the hidden state. A branch is a share of: its layers' output minus the sum so far."""

    norm: Any

    def out_channels(self) -> int:
        return int(self.alpha.shape[1])

    def forward(self, x: Tensor, residual_add: ResidualAdd | None = None) -> Any:
        shares = self.alpha.sigmoid().view(4, -1, 1, 1)
        states = []

        def mix(x: Tensor) -> Tensor:
            x, state = self.mixer(self.norm(x))
            states.append(state)
            return x

        def share(n: int, layers: Any, folded: bool = False) -> Any:
            return lambda x: layers(x) - x if folded else self.drop_path(shares[n] * (layers(x) - x))

        first, third = share(0, self.dwconv1, self.fused), share(2, self.dwconv2, self.fused)
        return self.add_branches(x, residual_add, first, share(1, mix), third, share(3, self.ffn)), states[0]


class DenseTntBlock(DenseSum, TntBlock):
    """TNT: pixel tokens, which keep their adds, and patch tokens (N, 1 + L, C), which are the feature map."""

    tokens = True

    def out_channels(self) -> int:
        return int(self.norm_out.weight.shape[0])

    def map_of(self, result: Any) -> Tensor:
        patches: Tensor = result[1]
        return patches

    def forward(self, pixels: Tensor, patches: Tensor, residual_add: ResidualAdd | None = None) -> Any:  # type: ignore[override]
        pixels = pixels + self.drop_path(self.attn_in(self.norm_in(pixels)))
        pixels = pixels + self.drop_path(self.mlp_in(self.norm_mlp_in(pixels)))

        def projected(patches: Tensor) -> Tensor:
            shape = (patches.shape[0], patches.shape[1] - 1, -1)
            if self.norm2_proj is None:
                inner = self.proj(self.norm1_proj(pixels).reshape(shape))
            else:
                inner = self.norm2_proj(self.proj(self.norm1_proj(pixels.reshape(shape))))
            return F.pad(inner, (0, 0, 1, 0))  # the class token gets no pixels

        branches = [
            projected,
            lambda x: self.drop_path(self.attn_out(self.norm_out(x))),
            lambda x: self.drop_path(self.mlp(self.norm_mlp(x))),
        ]
        return pixels, self.add_branches(patches, residual_add, *branches)


BLOCKS = (DenseMultiScaleBlock, DenseEfficientViMBlock, DenseTntBlock)
