"""Finished feature maps as later sums use them, and the state that a stage carries from block to block."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops import functional
from .affine_form import affine_form, has_affine_form, needs_moments


class Feature(NamedTuple):
    """A map with its affine form, N(X) = scale * map + shift.

    map is (N, C, H, W); scale and shift are (1 or N, C), or None if there is no norm, or one that does not shift. links
    are those of the operator, two tensors for each later sum (`ops/autograd.py`); there are none on the plain path.
    """

    map: Tensor
    scale: Tensor | None
    shift: Tensor | None
    links: Sequence[Tensor] = ()


def make_feature(
    norm: nn.Module | None,
    x: Tensor,
    *,
    num_consumers: int,
    per_image: bool,
    backend: str,
    center: bool = True,
    inner_norm: nn.Module | None = None,
) -> Feature:
    """The feature of x, (N, C, H, W): from its moments if the norm has an affine form, else by calling the norm.

    With `inner_norm`, the feature is N(inner_norm(x)). That is affine in x too, and the moments of inner_norm(x) follow
    from those of x, so x is read once for both norms.
    """
    if norm is not None and not has_affine_form(norm):
        x, norm = norm(x), None
    stats = functional.feature_stats(
        x,
        statistics=needs_moments(norm) or needs_moments(inner_norm),
        num_consumers=num_consumers,
        per_image=per_image,
        backend=backend,
    )
    if inner_norm is None or norm is None:
        return as_feature(norm, x, stats, center)
    scale, shift = affine_form(inner_norm, stats.mean, stats.var, x)
    assert shift is not None
    moved = (scale * stats.mean + shift, scale.square() * stats.var) if needs_moments(norm) else (stats.mean, stats.var)
    outer = affine_form(norm, *moved, x, center=center)
    shift = outer[0] * shift if outer[1] is None else outer[0] * shift + outer[1]
    return Feature(x, outer[0] * scale, shift, stats.links)


def as_feature(norm: nn.Module | None, x: Tensor, stats: functional.MapStats, center: bool) -> Feature:
    """The feature of a map whose moments and links are known."""
    if norm is None:
        return Feature(x, None, None, stats.links)
    return Feature(x, *affine_form(norm, stats.mean, stats.var, x, center=center), stats.links)


class StageState(NamedTuple):
    """What a stage carries from block to block.

    Attributes:
        features: the maps X_0 .. X_{l-1}.
        partial_sums: in a deep stage, a partial sum (N, C, H, W) for each block of the current group (`tiling.py`).
        group_links: the links from each group of maps to the later groups of blocks.
        last: what the block before gave back, and the version that its memory had then.
        backend: that of the first block, for all: one alone may be compiled, where another would be chosen.
    """

    features: tuple[Feature, ...] = ()
    partial_sums: Any = None
    group_links: tuple[Any, ...] = ()
    last: tuple[Tensor, int] | None = None
    backend: str | None = None

    def add(self, feature: Feature) -> "StageState":
        return self.replace(features=(*self.features, feature))

    def replace(self, **changes: Any) -> "StageState":
        """As `_replace`, which torch.compile of PyTorch 2.9 cannot trace."""
        return StageState(**(self._asdict() | changes))

    def after(self, x: Tensor) -> "StageState":
        """This state after a block that returned x."""
        if type(x) is not Tensor or is_compiling():
            return self
        return self.replace(last=(x, -1 if x.is_inference() else x._version))

    def follows(self, x: Tensor) -> bool:
        """Best-effort check that x is the previous block's unmodified output."""
        if self.last is None:
            return True
        last, version = self.last
        if x is not last:
            if type(x) is not Tensor or x.is_meta or is_compiling():
                return True
            if x.data_ptr() != last.data_ptr() or x.shape != last.shape or x.stride() != last.stride():
                return False
        return version == -1 or x.is_inference() or x._version == version
