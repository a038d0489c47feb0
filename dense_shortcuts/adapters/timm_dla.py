"""timm's DLA blocks, which may be given the shortcut that they add; their trees are in `containers.py`.

Their layers have the names and the order of torchvision's ResNet blocks.
"""

from typing import Any

from timm.models.dla import DlaBasic, DlaBottle2neck, DlaBottleneck
from torch import Tensor, nn

from ..nn.block import Branch, DenseBlock, in_stage
from ..nn.inner_shortcut import InnerShortcut
from ..nn.residual_add import ResidualAdd
from .timm_res2net import DenseBottle2neck
from .torchvision_resnet import DenseBasicBlock, DenseBottleneck


class _DenseDla(DenseBlock):
    relu: nn.Module

    def activation(self) -> nn.Module:
        return self.relu

    def forward(  # type: ignore[override]
        self, x: Tensor, shortcut: Tensor | None = None, children: Any = None, residual_add: ResidualAdd | None = None
    ) -> Tensor:
        branch, norm = self.branch(x)
        return in_stage(residual_add)(branch, norm, x if shortcut is None else shortcut, self.activation())


class DenseDlaBasic(_DenseDla, DlaBasic):
    out_channels = DenseBasicBlock.out_channels
    branch = DenseBasicBlock.branch
    conv_norms = DenseBasicBlock.conv_norms
    last_conv = DenseBasicBlock.last_conv


class DenseDlaBottleneck(_DenseDla, DlaBottleneck):
    inner: InnerShortcut | None
    out_channels = DenseBottleneck.out_channels
    inner_widths = DenseBottleneck.inner_widths
    branch = DenseBottleneck.branch
    conv_norms = DenseBottleneck.conv_norms
    last_conv = DenseBottleneck.last_conv


class DenseDlaBottle2neck(_DenseDla, DlaBottle2neck):
    inner: InnerShortcut | None
    multi_scale = DenseBottle2neck.multi_scale
    conv_norms = DenseBottle2neck.conv_norms

    def out_channels(self) -> int:
        return int(self.conv3.out_channels)

    def inner_widths(self) -> tuple[int, int] | None:
        """Widths of H_1 and of its pieces that pass a 3x3; None if the 3x3 changes their shape, which rules out DS2."""
        keeps = self.convs[0].stride == (1, 1)
        return (self.width * self.scale, self.width * len(self.convs)) if keeps else None

    def branch(self, x: Tensor) -> Branch:
        hidden = self.relu(self.bn1(self.conv1(x)))

        return self.conv3(self.multi_scale(hidden)), self.bn3

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv3


BLOCKS = (DenseDlaBasic, DenseDlaBottleneck, DenseDlaBottle2neck)
