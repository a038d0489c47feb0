"""timm's DaViT and CoaT blocks, which add a positional encoding within the sum, where a trace does not see it."""

from typing import Any

import torch.nn.functional as F
from timm.models.coat import SerialBlock
from timm.models.davit import ChannelBlock, SpatialBlock, window_partition, window_reverse
from torch import Tensor, nn

from ..nn.block import DenseBlock, in_stage
from ..nn.residual_add import ResidualAdd


class DenseSum(DenseBlock):
    """Several branches, each of which takes the sum of the block's input and the previous branches.

    Attributes:
        branch_first: whether the host computes branch + sum. The first addend determines the sum's memory layout, which
            determines the order of additions in later convolutions.
    """

    branch_first: bool = False
    norm1: Any

    def out_channels(self) -> int:
        return int(self.norm1.weight.shape[0])

    def add_branches(self, x: Tensor, residual_add: ResidualAdd | None, *branches: Any) -> Tensor:
        """X_l of branches that each take the sum so far; the first one takes x."""
        residual_add, total, first = in_stage(residual_add), x, None
        for branch in branches:
            added = branch(total)
            total = added + total if self.branch_first else total + added
            first = added if first is None else first + added
        if residual_add.keep_identity:
            return residual_add(total, None, x, None, whole=True)
        assert first is not None
        return residual_add(first, None, x, None)


class _DenseDaViT(DenseSum):
    cpe1: Any
    cpe2: Any
    norm2: nn.Module
    mlp: Any
    drop_path2: nn.Module

    def attention(self, x: Tensor) -> Tensor:
        """The attention branch, as tokens (N, L, C), for a map (N, C, H, W)."""
        raise NotImplementedError

    def forward(self, x: Tensor, residual_add: ResidualAdd | None = None) -> Tensor:
        def position(encoding: Any) -> Any:
            return lambda x: encoding.act(encoding.proj(x))

        def as_map(tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).reshape(x.shape)

        branches = [position(self.cpe1), lambda x: as_map(self.attention(x)), position(self.cpe2)]
        if self.mlp is not None:
            branches.append(lambda x: as_map(self.drop_path2(self.mlp(self.norm2(x.flatten(2).transpose(1, 2))))))
        return self.add_branches(x, residual_add, *branches)


class DenseSpatialBlock(_DenseDaViT, SpatialBlock):
    def attention(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        rows, columns = self.window_size

        x = self.norm1(x.flatten(2).transpose(1, 2)).view(images, height, width, channels)
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        _, high, wide, _ = x.shape

        x = self.attn(window_partition(x, self.window_size).view(-1, rows * columns, channels))

        x = window_reverse(x.view(-1, rows, columns, channels), self.window_size, high, wide)
        return self.drop_path1(x[:, :height, :width].reshape(images, height * width, channels))


class DenseChannelBlock(_DenseDaViT, ChannelBlock):
    def attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.attn(self.norm1(x.flatten(2).transpose(1, 2))))


class DenseSerialBlock(DenseSum, SerialBlock):
    """CoaT: tokens (N, 1 + L, C); the first one, the class token, gets no position."""

    tokens = True

    def forward(self, x: Tensor, size: tuple[int, int], residual_add: ResidualAdd | None = None) -> Tensor:  # type: ignore[override]
        def position(x: Tensor) -> Tensor:
            images = x[:, 1:].transpose(1, 2).view(x.shape[0], x.shape[2], *size)
            return F.pad(self.cpe.proj(images).flatten(2).transpose(1, 2), (0, 0, 1, 0))

        branches = [
            position,
            lambda x: self.drop_path(self.factoratt_crpe(self.norm1(x), size)),
            lambda x: self.drop_path(self.mlp(self.norm2(x))),
        ]
        return self.add_branches(x, residual_add, *branches)


BLOCKS = (DenseSpatialBlock, DenseChannelBlock, DenseSerialBlock)
