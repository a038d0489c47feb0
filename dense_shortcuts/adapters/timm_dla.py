"""timm's DLA blocks, which may be handed the shortcut that they add; their trees are in `containers.py`."""

from typing import Any

from timm.models.dla import DlaBasic, DlaBottle2neck, DlaBottleneck
from torch import Tensor, nn

from ..shortcut import InnerShortcut
from .block import Branch, DenseBlock, Join, joined, widths_of_3x3
from .timm_res2net import DenseBottle2neck


class _DenseDla(DenseBlock):
    relu: nn.Module

    def activation(self) -> nn.Module:
        return self.relu

    def forward(  # type: ignore[override]
        self, x: Tensor, shortcut: Tensor | None = None, children: Any = None, join: Join | None = None
    ) -> Tensor:
        branch, norm = self.branch(x)
        return joined(join)(branch, norm, x if shortcut is None else shortcut, self.activation())


class DenseDlaBasic(_DenseDla, DlaBasic):
    def out_channels(self) -> int:
        return int(self.conv2.out_channels)

    def branch(self, x: Tensor) -> Branch:
        x = self.relu(self.bn1(self.conv1(x)))

        return self.conv2(x), self.bn2

    def conv_norms(self) -> list[tuple[str, str]]:
        return [("conv1", "bn1"), ("conv2", "bn2")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv2


class DenseDlaBottleneck(_DenseDla, DlaBottleneck):
    inner: InnerShortcut | None

    def out_channels(self) -> int:
        return int(self.conv3.out_channels)

    def inner_widths(self) -> tuple[int, int] | None:
        return widths_of_3x3(self.conv2)

    def branch(self, x: Tensor) -> Branch:
        hidden = self.relu(self.bn1(self.conv1(x)))

        x = self.bn2(self.conv2(hidden))
        if self.inner is not None:
            x = self.inner(x, self.inner.enter(hidden))
        x = self.relu(x)

        return self.conv3(x), self.bn3

    def conv_norms(self) -> list[tuple[str, str]]:
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv3


class DenseDlaBottle2neck(_DenseDla, DlaBottle2neck):
    inner: InnerShortcut | None
    multi_scale = DenseBottle2neck.multi_scale
    conv_norms = DenseBottle2neck.conv_norms

    def out_channels(self) -> int:
        return int(self.conv3.out_channels)

    def inner_widths(self) -> tuple[int, int] | None:
        """Width of H_1 and of its pieces that pass a 3x3, where the 3x3 keeps their shape, so that DS2 applies."""
        keeps = self.convs[0].stride == (1, 1)
        return (self.width * self.scale, self.width * len(self.convs)) if keeps else None

    def branch(self, x: Tensor) -> Branch:
        hidden = self.relu(self.bn1(self.conv1(x)))

        return self.conv3(self.multi_scale(hidden)), self.bn3

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv3


BLOCKS = (DenseDlaBasic, DenseDlaBottleneck, DenseDlaBottle2neck)
