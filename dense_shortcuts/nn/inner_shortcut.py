"""The weighted shortcut inside a bottleneck (DS2)."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .features import Feature, make_feature
from .norms import Norm, make_norm


class InnerShortcut(nn.Module):
    """v * N(H_1), added to the branch inside a bottleneck before its second activation (DS2).

    Args:
        channels: width of H_1.
        weighted: how many of its first channels pass a 3x3 and get a weight (all but Res2Net's last piece).
        norm, groups, center: N, see `make_norm`.
        start: initial value of v; with 0, DS2 starts as DS.
        backend: the back end, see `ops.choose`.

    Attributes:
        weight: v, (weighted,).
    """

    def __init__(
        self,
        channels: int,
        weighted: int,
        *,
        norm: Norm = "auto",
        groups: int | None = None,
        center: bool = True,
        start: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.start, self.backend, self.center = start, backend, center
        self.weight = nn.Parameter(torch.full((weighted,), start))
        self.norm = make_norm(norm, channels, groups, center=center)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset v to its initial value."""
        self.weight.fill_(self.start)

    def feature(self, hidden: Tensor) -> Feature:
        """The feature of H_1, (N, channels, H, W): the map with the affine form of its norm."""
        options: Any = {"num_consumers": 0, "per_image": False, "backend": self.backend, "center": self.center}
        return make_feature(self.norm, hidden, **options)

    def forward(self, branch: Tensor, feature: Feature, start: int = 0) -> Tensor:
        """branch + v * N(H_1), where the branch, (N, C, H, W), holds the channels of H_1 from `start` on."""
        part = slice(start, start + branch.shape[1])
        scales, bias = self.weight[None, None, part].to(ops.accumulation_dtype(branch.dtype)), None
        if feature.shift is not None:
            bias = scales[0] * feature.shift[:, part]
        if feature.scale is not None:
            scales = scales * feature.scale[:, part]
        return ops.dense_add([branch], [feature.map[:, part]], scales, bias, backend=self.backend)
