"""timm's VoVNet blocks, which pass a list of maps to their layers; the first of a stage adds no shortcut."""

from timm.models.vovnet import OsaBlock
from torch import Tensor

from ..nn.block import Branch, DenseBlock


class DenseOsaBlock(DenseBlock, OsaBlock):
    def is_residual(self) -> bool:
        return bool(self.residual)

    def out_channels(self) -> int:
        return int(self.conv_concat.conv.out_channels)

    def branch(self, x: Tensor) -> Branch:
        maps = [x]
        if self.conv_reduction is not None:
            x = self.conv_reduction(x)

        x = self.conv_concat(self.conv_mid(x, maps))

        if self.attn is not None:
            x = self.attn(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x, None


BLOCKS = (DenseOsaBlock,)
