"""What a block is to its stage: residual branch, last norm, projection shortcut, activation and layout."""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from ..errors import DenseShortcutError
from .hooks import observed

if TYPE_CHECKING:
    from .residual_add import ResidualAdd

Branch = tuple[Tensor, nn.Module | None]


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


class DenseBlock:
    """Mixin for a host's block that leaves its add to the stage. An adapter is the host's class with these methods.

    The block stays a module that is called, so that hooks on it fire and see the stage's feature maps X_l.

    Attributes:
        tokens: whether the channels are the last axis, as in (N, L, C) and (N, H, W, C); else they are the second.
        inner: the DS2 shortcut, or None.
    """

    tokens: bool = False
    inner: nn.Module | None

    def branch(self, x: Tensor) -> Branch:
        """F_l(x), everything before the add: a tensor and the norm still to be applied to it, if that comes last.

        Squeeze-excite and drop path are part of the branch; where there are any, no norm is left.
        """
        raise NotImplementedError

    def projects(self) -> bool:
        """Whether the host adds a projection of the block's input, so that a row of maps of one shape begins here."""
        return getattr(self, "downsample", None) is not None

    def is_residual(self) -> bool:
        """Whether the block adds a shortcut as it is set; some hosts have blocks of one class with and without."""
        return True

    def is_certain(self) -> bool:
        """Whether the block is residual beyond doubt; an add of two branches is not so by that alone."""
        return True

    def project(self, x: Tensor) -> Tensor:
        """What the host would add: the projection shortcut where there is one, else x."""
        downsample = getattr(self, "downsample", None)
        return x if downsample is None else downsample(x)

    def project_but_norm(self, x: Tensor) -> Branch:
        """`project` with its last layer, usually a norm, still to be applied: the stage may do so in a pass of its own.

        None is left where an adapter has a `project` of its own, or a hook asks that the projection be called.
        """
        downsample = getattr(self, "downsample", None)
        own = type(self).project is not DenseBlock.project
        if own or type(downsample) is not nn.Sequential or not len(downsample) or observed(downsample):
            return self.project(x), None
        *layers, last = downsample
        for layer in layers:
            x = layer(x)
        return x, last

    def activation(self) -> nn.Module | None:
        """What follows the add: s; None for nothing."""
        return None

    def out_channels(self) -> int:
        """Channels C of F_l and X_l."""
        raise NotImplementedError

    def inner_widths(self) -> tuple[int, int] | None:
        """For DS2: the width of H_1 and how many of its channels get a weight; None where DS2 does not apply."""
        return None

    def conv_norms(self) -> list[tuple[str, str]]:
        """Names in the block of each convolution in the branch and of the norm that follows it directly."""
        return []

    def last_conv(self) -> nn.Conv2d | None:
        """The convolution whose output, but for its norm, is the branch's in evaluation mode; None if there is more."""
        return None

    def map_of(self, result: Any) -> Tensor:
        """X_l among what the block gives back: the first tensor, where a host's block gives several."""
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first

    def _dense_layout(self) -> MapLayout:
        return MapLayout(self.tokens)

    def forward(self, x: Tensor, residual_add: "ResidualAdd | None" = None) -> Tensor:
        """X_l from X_{l-1}, where residual_add(branch, norm, identity, activation) is what the stage makes of them."""
        branch, norm = self.branch(x)
        identity, last = self.project_but_norm(x)
        return in_stage(residual_add)(branch, norm, identity, self.activation(), identity_norm=last)


def layout_of(block: Any) -> MapLayout:
    """How the maps of a plugged block are laid out."""
    layout: MapLayout = block._dense_layout()
    return layout


def map_of(block: Any, result: Any) -> Tensor:
    """X_l among what a plugged block gives back; of a traced block that is all."""
    found: Tensor = block.map_of(result) if isinstance(block, DenseBlock) else result
    return found


def in_stage(residual_add: "ResidualAdd | None") -> "ResidualAdd":
    """The stage's part in a block's forward pass.

    Raises:
        DenseShortcutError: there is none, for the block was called by itself.
    """
    if residual_add is None:
        raise DenseShortcutError(
            "a block of a dense stage was called by itself, without the stage's earlier maps: call the stage, or the "
            "callables that iterating over it gives."
        )
    return residual_add


def add_two_branches(
    residual_add: "ResidualAdd",
    first: Tensor,
    second: Tensor,
    total: Tensor,
    identity: Tensor,
    projected: Tensor | None,
) -> Tensor:
    """X_l of two branches in a row, attention and MLP.

    Args:
        total: identity + first, as the host adds them.
        identity: what the first branch is added to.
        projected: what the second one is added to where that is a projection of `total`, which holds the first too.
    """
    if projected is None:
        total, branch = total + second, first + second
    else:
        total, branch, identity = projected + second, second, projected
    if residual_add.keep_identity:
        return residual_add(total, None, identity, None, whole=True)
    return residual_add(branch, None, identity, None)


def widths_of_3x3(conv: nn.Conv2d) -> tuple[int, int] | None:
    """`inner_widths` of a plain bottleneck: DS2 applies where its 3x3 keeps the shape."""
    keeps = conv.stride == (1, 1) and conv.in_channels == conv.out_channels
    return (conv.in_channels, conv.in_channels) if keeps else None
