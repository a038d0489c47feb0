"""Builds the norms N of the equations, by name.

The modules are PyTorch's own (GroupNorm, BatchNorm2d, InstanceNorm2d with affine=False), so they print, save, move and
convert to SyncBatchNorm as usual; `affine_form.py` computes their affine forms.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import DenseShortcutError

NormFactory = Callable[[int], nn.Module]
Norm = str | NormFactory | None

NORMS = ("auto", "group", "batch", "layer", "instance", "none")


def default_groups(channels: int) -> int:
    """32 groups as in Group Normalization (Wu and He, 2018); fewer in narrow stages, to keep four channels a group."""
    limit = min(32, max(1, channels // 4))
    return next(g for g in range(limit, 0, -1) if channels % g == 0)


class TokenNorm(nn.LayerNorm):
    """Layer norm of each token over its channels, for tokens laid out as maps, (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TokenRMSNorm(nn.RMSNorm):
    """Each token divided by its root mean square over the channels, for tokens laid out as maps, (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(
    norm: Norm, channels: int, groups: int | None = None, *, tokens: bool = False, center: bool = True
) -> nn.Module | None:
    """A new norm for maps of `channels` channels, or None if maps are summed without a norm.

    "layer" normalises each image as a whole, as group norm with one group, which is usual for feature maps; for tokens
    it normalises the channels of each token, which is usual there. "auto" is "layer" for tokens and "batch" for feature
    maps. "none" means None, which `timm.create_model` does not pass on. Without `center`, tokens get a norm of another
    class. The others are only read, for groups, eps and running statistics, and `affine_form` leaves out the mean.

    Raises:
        DenseShortcutError: unknown name, or a group count that does not divide the channels.
    """
    if groups is not None and norm not in ("auto", "group"):
        raise DenseShortcutError(f"groups={groups} requires norm='group', not norm={norm!r}: leave groups out.")
    if norm == "auto":
        norm = "group" if groups is not None else "layer" if tokens else "batch"
    if norm is None or norm == "none":
        return None
    if norm == "layer" and tokens:
        cls = TokenNorm if center else TokenRMSNorm
        return cls(channels, eps=1e-5, elementwise_affine=False)
    if norm == "group":
        groups = default_groups(channels) if groups is None else groups
        if groups < 1 or channels % groups:
            raise DenseShortcutError(
                f"{groups} groups do not divide the {channels} channels of a stage: choose a divisor of {channels}."
            )
        return nn.GroupNorm(groups, channels, affine=False)
    if norm == "layer":
        return nn.GroupNorm(1, channels, affine=False)
    if norm == "batch":
        return nn.BatchNorm2d(channels, affine=False)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=False)
    if callable(norm):
        module = norm(channels)
        if not isinstance(module, nn.Module):
            raise DenseShortcutError(
                f"the norm factory returned {type(module).__name__}: it must take a channel count and return a module."
            )
        return module
    raise DenseShortcutError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}, or a factory.")
