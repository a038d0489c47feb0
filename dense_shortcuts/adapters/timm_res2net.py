"""timm's Res2Net block."""

import torch
from timm.models.res2net import Bottle2neck
from torch import Tensor, nn

from ..nn.block import Branch, DenseBlock
from ..nn.inner_shortcut import InnerShortcut
from .timm_resnet import with_last_norm


class DenseBottle2neck(DenseBlock, Bottle2neck):
    inner: InnerShortcut | None

    def out_channels(self) -> int:
        return self.conv3.out_channels

    def inner_widths(self) -> tuple[int, int] | None:
        """Widths of H_1 and of its pieces that pass a 3x3; None if the 3x3 changes their shape, which rules out DS2."""
        width = self.convs[0].in_channels
        return (width * self.scale, width * self.num_scales) if self.convs[0].stride == (1, 1) else None

    def branch(self, x: Tensor) -> Branch:
        hidden = self.relu(self.bn1(self.conv1(x)))

        x = self.drop_block(self.multi_scale(hidden))

        return with_last_norm(self, self.conv3(x), self.bn3)

    def multi_scale(self, hidden: Tensor) -> Tensor:
        """The 3x3 of a bottleneck, split into pieces, each of which also takes the result of the previous piece."""
        pieces = torch.split(hidden, self.width, 1)
        feature = self.inner.feature(hidden) if self.inner is not None else None
        outputs: list[Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            piece = pieces[i] if i == 0 or self.is_first else outputs[-1] + pieces[i]
            piece = bn(conv(piece))
            if self.inner is not None:
                piece = self.inner(piece, feature, i * self.width)
            outputs.append(self.relu(piece))
        if self.scale > 1:
            outputs.append(pieces[-1] if self.pool is None else self.pool(pieces[-1]))
        return torch.cat(outputs, 1)

    def activation(self) -> nn.Module:
        return self.relu

    def conv_norms(self) -> list[tuple[str, str]]:
        pieces = [(f"convs.{i}", f"bns.{i}") for i in range(len(self.convs))]
        return [("conv1", "bn1"), *pieces, ("conv3", "bn3")]

    def last_conv(self) -> nn.Conv2d | None:
        return self.conv3 if self.se is None else None


BLOCKS = (DenseBottle2neck,)
