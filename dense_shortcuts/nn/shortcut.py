"""The dense shortcut of a segment: one norm per earlier feature map, one weight per channel and pair (l, i)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import functional
from ..ops.affine import sum_coeffs
from .affine_form import has_affine_form, is_per_image, needs_moments
from .connectivity import Sources, Sparse
from .connectivity import sources as all_sources
from .features import Feature, StageState, as_feature, make_feature
from .norms import Norm, make_norm
from .tiling import Tiling
from .weighting import start_parameter, weigh


class DenseShortcut(nn.Module):
    """sum_{i<l} w_{l,i} * N(X_i) for every block l of a segment (Sec. 3 of the paper; `docs/paper-map.md`).

    Args:
        depth: number of blocks L.
        channels: width C of its feature maps.
        norm, groups, center: N, see `make_norm`.
        init: initial weights, see `start_weight`.
        weighted: False omits norm and weight, for the plain sum of the dense identity control.
        weighting: how weights are computed from parameters, see `weighting.py`.
        backend: the back end, see `ops.choose`.
        sources: the maps that each block sums (`connectivity.py`); None for all earlier ones.
        tokens: whether maps are tokens, (N, L, C) or (N, H, W, C) in the host; "layer" then normalises over C only.

    Attributes:
        weights: the parameters, one for each block that sums any map. With the paper's channel weighting, that of block
            l = k + 1 has a row for each map it sums: (l, C), row i for X_i, if it sums all of them.
        norms: one norm for each map that any block sums.
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        *,
        norm: Norm = "auto",
        groups: int | None = None,
        center: bool = True,
        init: str = "uniform",
        weighted: bool = True,
        weighting: str = "channel",
        backend: str = "auto",
        sources: Sources | None = None,
        tokens: bool = False,
    ) -> None:
        super().__init__()
        everything = all_sources([True] * depth)
        self.sources = everything if sources is None else sources
        self.depth, self.channels, self.init, self.center = depth, channels, init, center
        # attention weights depend on all maps that a block sums, so there can be no partial sums
        tiled = self.sources == everything and weighting != "attention"
        self.tiling: Tiling | Sparse = Tiling.best(depth) if tiled else Sparse(self.sources)
        self._direct = [list(self.tiling.direct(k)) for k in range(depth)]  # the maps that a block sums directly
        self._consumers = [list(self.tiling.users(i)) for i in range(depth)]  # the blocks that sum a map directly
        self.weighted, self.weighting, self.backend = weighted, weighting, backend
        self._weight_of = {k: n for n, k in enumerate(self.summing)}
        counts = [len(self.sources[k]) for k in self.summing] if weighted else []
        starts = [start_parameter(weighting, init, count, channels) for count in counts]
        self.weights = nn.ParameterList([nn.Parameter(w) for w in starts])
        used = sorted({i for maps in self.sources for i in maps}) if weighted else []
        norms = [make_norm(norm, channels, groups, tokens=tokens, center=center) for _ in used]
        self.norms = nn.ModuleList([n for n in norms if n is not None])
        self._norm_of = {i: n for n, i in enumerate(used)} if len(self.norms) else {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the weights to their initial values, for example after `to_empty` of a network on the meta device."""
        for weight, k in zip(self.weights, self.summing, strict=self.weighted):
            weight.copy_(start_parameter(self.weighting, self.init, len(self.sources[k]), self.channels))

    @property
    def summing(self) -> list[int]:
        """Positions of the blocks that sum any map."""
        return [k for k, maps in enumerate(self.sources) if maps]

    @property
    def normalised(self) -> bool:
        """Whether maps are normalised before they are summed."""
        return len(self.norms) > 0

    @property
    def pairs(self) -> int:
        """Number of pairs (l, i): L(L+1)/2 where every block sums all earlier maps."""
        return sum(map(len, self.sources))

    @property
    def tiled(self) -> bool:
        """Whether groups of blocks have partial sums, as in a deep stage."""
        return self.tiling.size < self.depth

    @property
    def per_image(self) -> bool:
        """Whether the coefficients differ from image to image."""
        return self.weighting == "attention" or is_per_image(next(iter(self.norms), None))  # all are of one kind

    def norm(self, i: int) -> nn.Module | None:
        """The norm of map X_i; None if no block sums it, or maps are summed without a norm."""
        return self.norms[self._norm_of[i]] if i in self._norm_of and len(self.norms) else None  # `fuse` takes all away

    def weight(self, k: int, features: Sequence[Feature] = ()) -> Tensor:
        """w of block l = k + 1 for the maps it sums: (maps, C), or (maps, N, C) if it depends on the maps."""
        parameter: Tensor = self.weights[self._weight_of[k]]
        if self.weighting == "channel":
            return parameter
        return weigh(self.weighting, parameter, self.channels, [feature.map for feature in features])

    def feature(self, i: int, x: Tensor, backend: str, inner_norm: nn.Module | None = None) -> Feature:
        """The feature of a map that the operator did not produce: X_0, or an unfused block's output, (N, C, H, W).

        With `inner_norm`, X_i is inner_norm(x); this requires `is_fusable(inner_norm)` and `fuses_norm(i)`.
        """
        options: Any = {"num_consumers": self._num_consumers(i), "per_image": self.per_image, "center": self.center}
        return make_feature(self.norm(i), x, inner_norm=inner_norm, backend=backend, **options)

    def fuses_norm(self, i: int) -> bool:
        """Whether the batch norm that produces X_i can be folded into N(X_i), without computing X_i itself."""
        norm = self.norm(i)
        return norm is not None and has_affine_form(norm) and self.weighting != "attention"  # which reads the maps

    def branch_feature(self, norm: nn.Module, branch: Tensor, backend: str) -> Feature:
        """A residual branch before its last norm (`is_fusable`), as one more feature of the sum."""
        return make_feature(norm, branch, num_consumers=1, per_image=self.per_image, backend=backend)

    def forward(
        self,
        k: int,
        addends: Sequence[Tensor],
        state: StageState,
        *,
        branch: Feature | None = None,
        relu: bool = False,
        finish: bool = False,
        overwrite: bool = False,
        backend: str = "plain",
    ) -> tuple[Tensor, Feature | None]:
        """addends + branch + sum_i w_{l,i} * N(X_i) for block l = k + 1.

        Args:
            k: position of the block in its segment, from 0.
            addends: the residual branch and anything else that is added unscaled, each (N, C, H, W).
            state: with the k + 1 earlier maps.
            branch: the residual branch before its last norm, instead of as an addend.
            relu: whether to apply ReLU in the same pass.
            finish: whether the result is X_l itself, so its moments may be computed in the same pass.
            overwrite: whether the sum may be written over its first tensor, a partial sum or the branch.
            backend: from `ops.choose`.

        Returns:
            the sum, (N, C, H, W), and its feature if `finish` was possible; else None, and `feature` makes it.
        """
        norm = self.norm(k + 1) if finish else None
        one_pass = finish and (norm is None or has_affine_form(norm))
        summed = [state.features[i] for i in self.sources[k]]
        direct = self.sources[k] if backend == "plain" else self._direct[k]
        features = [state.features[i] for i in direct]
        scales, bias = self._coeffs(k, summed, len(summed) - len(features))
        maps = [f.map for f in features]
        links = [() if backend == "plain" else self._link(f, i, k) for i, f in zip(direct, features, strict=True)]
        if branch is not None:
            assert scales is not None and branch.scale is not None and branch.shift is not None
            maps, links = [branch.map, *maps], [branch.links, *links]
            scales = torch.cat([branch.scale.expand(scales.shape[1], -1)[None], scales])
            bias = branch.shift if bias is None else bias + branch.shift
        if state.partial_sums is not None:
            addends = [*addends, state.partial_sums[k % self.tiling.size]]
        added = functional.add_features(
            addends,
            maps,
            links,
            scales,
            bias,
            relu=relu,
            statistics=one_pass and needs_moments(norm),
            num_consumers=self._num_consumers(k + 1) if one_pass else 0,
            per_image=self.per_image,
            backend=backend,
            overwrite=overwrite,
        )
        return added.map, as_feature(norm, added.map, added, self.center) if one_pass else None

    def _coeffs(self, k: int, summed: Sequence[Feature], first: int) -> tuple[Tensor | None, Tensor | None]:
        """a_i of block k for the maps it sums from `first` on, (maps, 1 or N, C), and b of all, (1 or N, C)."""
        weight = self.weight(k, summed) if self.weighted and summed else None
        if weight is not None and self.weighting != "attention":
            weight = weight[:, None]
        scales, shifts = [f.scale for f in summed if f.scale is not None], [f.shift for f in summed]
        return sum_coeffs(weight, scales, shifts, first)

    def _link(self, feature: Feature, i: int, k: int) -> Sequence[Tensor]:
        """The link of map X_i to the sum of block k."""
        n = 2 * self._consumers[i].index(k)
        return feature.links[n : n + 2]

    def _num_consumers(self, i: int) -> int:
        """Number of links to map i: one per block that sums it directly, and one for all groups that sum it early."""
        return len(self._consumers[i]) + self.tiling.is_closed(i)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, channels={self.channels}, pairs={self.pairs}, init={self.init!r}"
