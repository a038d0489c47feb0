"""timm's Gemma 4 blocks, which are given the rotary positions of their tokens."""

from timm.models.gemma4_vit import Gemma4Block
from torch import Tensor

from ..nn.residual_add import ResidualAdd
from .timm_positions import DenseSum


class DenseGemma4Block(DenseSum, Gemma4Block):
    tokens = True

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attn_mask: Tensor | None = None,
        residual_add: ResidualAdd | None = None,
    ) -> Tensor:
        branches = [
            lambda x: self.drop_path(self.norm2(self.attn(self.norm1(x), cos, sin, attn_mask=attn_mask))),
            lambda x: self.drop_path(self.norm4(self.mlp(self.norm3(x)))),
        ]
        return self.add_branches(x, residual_add, *branches)


BLOCKS = (DenseGemma4Block,)
