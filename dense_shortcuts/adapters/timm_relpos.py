"""timm's ViT blocks with relative positions, which are made for one number of tokens, so that no probe finds it."""

from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor

from ..nn.block import Join
from .timm_positions import DenseSum


class DenseRelPosBlock(DenseSum, RelPosBlock):
    tokens = True

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, join: Join | None = None
    ) -> Tensor:
        branches = [
            lambda x: self.drop_path1(self.ls1(self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos))),
            lambda x: self.drop_path2(self.ls2(self.mlp(self.norm2(x)))),
        ]
        return self.joined_branches(x, join, *branches)


class DenseResPostRelPosBlock(DenseSum, ResPostRelPosBlock):
    tokens = True

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, join: Join | None = None
    ) -> Tensor:
        branches = [
            lambda x: self.drop_path1(self.norm1(self.attn(x, shared_rel_pos=shared_rel_pos))),
            lambda x: self.drop_path2(self.norm2(self.mlp(x))),
        ]
        return self.joined_branches(x, join, *branches)


BLOCKS = (DenseRelPosBlock, DenseResPostRelPosBlock)
