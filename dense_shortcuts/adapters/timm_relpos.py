"""timm's ViT blocks with relative positions, which accept a single number of tokens that no probe would guess."""

from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor

from ..nn.residual_add import ResidualAdd
from .timm_positions import DenseSum


class DenseRelPosBlock(DenseSum, RelPosBlock):
    tokens = True

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, residual_add: ResidualAdd | None = None
    ) -> Tensor:
        branches = [
            lambda x: self.drop_path1(self.ls1(self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos))),
            lambda x: self.drop_path2(self.ls2(self.mlp(self.norm2(x)))),
        ]
        return self.add_branches(x, residual_add, *branches)


class DenseResPostRelPosBlock(DenseSum, ResPostRelPosBlock):
    tokens = True

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, residual_add: ResidualAdd | None = None
    ) -> Tensor:
        branches = [
            lambda x: self.drop_path1(self.norm1(self.attn(x, shared_rel_pos=shared_rel_pos))),
            lambda x: self.drop_path2(self.norm2(self.mlp(x))),
        ]
        return self.add_branches(x, residual_add, *branches)


BLOCKS = (DenseRelPosBlock, DenseResPostRelPosBlock)
