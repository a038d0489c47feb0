"""Tokens, sequences and volumes in the form of feature maps, (N, C, H, W), and back."""

from typing import NamedTuple

from torch import Tensor
from torch.fx import Proxy


class MapLayout(NamedTuple):
    """How a block's maps are laid out.

    Attributes:
        tokens: whether the channels are the last axis, as in (N, L, C) and (N, H, W, C); else they are the second.
        volumes: whether there are three axes of positions; needed where torch.fx records, which does not know shapes.
    """

    tokens: bool = False
    volumes: bool = False

    def is_map(self, x: Tensor) -> bool:
        """Whether x is (N, C, H, W) as it stands."""
        return not self.tokens and self._axes(x) == 4

    def as_map(self, x: Tensor) -> Tensor:
        """A view as a map (N, C, H, W).

        (N, C) becomes (N, C, 1, 1), a sequence (N, C, L) becomes (N, C, 1, L), a volume (N, C, D, H, W) becomes
        (N, C, D H, W). Recorded tokens are all put into one axis, as those of (N, L, C).
        """
        if self.tokens and isinstance(x, Proxy):
            return x.movedim(-1, 1).flatten(2).unsqueeze(2)
        x = x.movedim(-1, 1) if self.tokens else x
        axes = self._axes(x)
        if axes == 2:
            return x[:, :, None, None]
        return x if axes == 4 else x.unsqueeze(2) if axes == 3 else x.flatten(2, 3)

    def from_map(self, x: Tensor, like: Tensor) -> Tensor:
        """A map in the form of `like`, one that `as_map` was given."""
        if self.tokens and isinstance(like, Proxy):
            return x.movedim(1, -1).reshape(like.shape)
        axes = self._axes(like)
        if axes == 5:
            first = 1 if self.tokens else 2
            x = x.unflatten(2, (like.shape[first], like.shape[first + 1]))
        elif axes < 4:
            x = x[:, :, 0, 0] if axes == 2 else x.squeeze(2)
        return x.movedim(1, -1) if self.tokens else x

    def _axes(self, x: Tensor) -> int:
        return (5 if self.volumes else 4) if isinstance(x, Proxy) else x.ndim
