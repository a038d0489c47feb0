"""timm's blocks without norms. They multiply by a gain in place and discard the result, which a trace would drop."""

from timm.models.nfnet import NormFreeBlock
from torch import Tensor

from ..nn.block import DenseBlock, in_stage
from ..nn.residual_add import ResidualAdd


class DenseNormFreeBlock(DenseBlock, NormFreeBlock):
    def out_channels(self) -> int:
        return int(self.conv3.out_channels)

    def forward(self, x: Tensor, residual_add: ResidualAdd | None = None) -> Tensor:
        hidden = self.act1(x) * self.beta
        identity = x if self.downsample is None else self.downsample(hidden)

        out = self.conv2(self.act2(self.conv1(hidden)))
        if self.conv2b is not None:
            out = self.conv2b(self.act2b(out))
        if self.attn is not None:
            out = self.attn_gain * self.attn(out)

        out = self.conv3(self.act3(out))
        if self.attn_last is not None:
            out = self.attn_gain * self.attn_last(out)
        out = self.drop_path(out)
        if self.skipinit_gain is not None:
            out = out * self.skipinit_gain
        return in_stage(residual_add)(out * self.alpha, None, identity, None)


BLOCKS = (DenseNormFreeBlock,)
