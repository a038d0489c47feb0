"""torchvision's ResNet blocks, which are also those of its ResNeXt and Wide ResNet."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..nn.block import Branch, DenseBlock
from ..nn.inner_shortcut import InnerShortcut
from .branches import widths_of_3x3


class DenseBasicBlock(DenseBlock, BasicBlock):
    def out_channels(self) -> int:
        return self.conv2.out_channels

    def branch(self, x: Tensor) -> Branch:
        x = self.relu(self.bn1(self.conv1(x)))

        return self.conv2(x), self.bn2

    def activation(self) -> nn.Module:
        return self.relu

    def conv_norms(self) -> list[tuple[str, str]]:
        return [("conv1", "bn1"), ("conv2", "bn2")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv2


class DenseBottleneck(DenseBlock, Bottleneck):
    inner: InnerShortcut | None

    def out_channels(self) -> int:
        return self.conv3.out_channels

    def inner_widths(self) -> tuple[int, int] | None:
        return widths_of_3x3(self.conv2)

    def branch(self, x: Tensor) -> Branch:
        hidden = self.relu(self.bn1(self.conv1(x)))

        x = self.bn2(self.conv2(hidden))
        if self.inner is not None:
            x = self.inner(x, self.inner.feature(hidden))
        x = self.relu(x)

        return self.conv3(x), self.bn3

    def activation(self) -> nn.Module:
        return self.relu

    def conv_norms(self) -> list[tuple[str, str]]:
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv3


BLOCKS = (DenseBasicBlock, DenseBottleneck)
