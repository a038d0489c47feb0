"""timm's ResNet blocks, which are also those of its ResNeXt, Wide ResNet and SE-ResNet."""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from ..nn.block import Branch, DenseBlock
from ..nn.inner_shortcut import InnerShortcut
from .branches import widths_of_3x3


class DenseBasicBlock(DenseBlock, BasicBlock):
    def out_channels(self) -> int:
        return self.conv2.out_channels

    def branch(self, x: Tensor) -> Branch:
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.aa(x)

        return with_last_norm(self, self.conv2(x), self.bn2)

    def activation(self) -> nn.Module:
        return self.act2

    def conv_norms(self) -> list[tuple[str, str]]:
        return [("conv1", "bn1"), ("conv2", "bn2")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv2 if self.se is None else None


class DenseBottleneck(DenseBlock, Bottleneck):
    inner: InnerShortcut | None

    def out_channels(self) -> int:
        return self.conv3.out_channels

    def inner_widths(self) -> tuple[int, int] | None:
        return widths_of_3x3(self.conv2)

    def branch(self, x: Tensor) -> Branch:
        hidden = self.act1(self.bn1(self.conv1(x)))

        x = self.bn2(self.conv2(hidden))
        if self.inner is not None:
            x = self.inner(x, self.inner.feature(hidden))
        x = self.act2(self.drop_block(x))
        x = self.aa(x)

        return with_last_norm(self, self.conv3(x), self.bn3)

    def activation(self) -> nn.Module:
        return self.act3

    def conv_norms(self) -> list[tuple[str, str]]:
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv3 if self.se is None else None


def with_last_norm(block: Any, x: Tensor, norm: nn.Module) -> Branch:
    """The end of the branch: its last norm, then attention and drop path, which belong to the branch."""
    if block.se is None and block.drop_path is None:
        return x, norm
    x = norm(x)
    if block.se is not None:
        x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    return x, None


BLOCKS = (DenseBasicBlock, DenseBottleneck)
