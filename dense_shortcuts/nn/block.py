"""The parts of a block that its stage uses: branch, last norm, projection shortcut, activation and layout."""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from ..errors import DenseShortcutError
from .hooks import observed

if TYPE_CHECKING:
    from .residual_add import ResidualAdd

Branch = tuple[Tensor, nn.Module | None]


class MapLayout(NamedTuple):
    """How the maps of a block are laid out.

    Attributes:
        tokens: whether channels are the last axis, as in (N, L, C) and (N, H, W, C); otherwise they are the second.
        volumes: whether there are three spatial axes; needed while torch.fx traces, where shapes are unknown.
    """

    tokens: bool = False
    volumes: bool = False

    def is_map(self, x: Tensor) -> bool:
        """Whether x already is (N, C, H, W)."""
        return not self.tokens and self._axes(x) == 4

    def as_map(self, x: Tensor) -> Tensor:
        """x viewed as a map (N, C, H, W).

        (N, C) becomes (N, C, 1, 1), a sequence (N, C, L) becomes (N, C, 1, L), a volume (N, C, D, H, W) becomes
        (N, C, D H, W). While torch.fx traces, tokens of any shape are flattened to one axis.
        """
        if self.tokens and isinstance(x, Proxy):
            return x.movedim(-1, 1).flatten(2).unsqueeze(2)
        x = x.movedim(-1, 1) if self.tokens else x
        axes = self._axes(x)
        wide = x.unsqueeze(-1) if axes == 2 else x
        return wide.unsqueeze(2) if axes < 4 else x if axes == 4 else x.flatten(2, 3)

    def from_map(self, x: Tensor, like: Tensor) -> Tensor:
        """The map x in the layout of `like`, an input of `as_map`."""
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

    The block is still called as a module, so its hooks run and see the stage's feature maps X_l.

    Attributes:
        tokens: whether channels are the last axis, as in (N, L, C) and (N, H, W, C); otherwise they are the second.
        inner: the DS2 shortcut, or None.
    """

    tokens: bool = False
    inner: nn.Module | None

    def branch(self, x: Tensor) -> Branch:
        """F_l(x), everything before the add: a tensor, and the last norm if it is still to be applied, else None.

        Squeeze-excite and drop path are part of the branch; in a branch with either, the norm is None.
        """
        raise NotImplementedError

    def projects(self) -> bool:
        """Whether the host projects the block's input; a new segment then starts here, as maps change shape."""
        return getattr(self, "downsample", None) is not None

    def is_residual(self) -> bool:
        """Whether the block adds a shortcut in its configuration; some classes have both kinds of blocks."""
        return True

    def is_certain(self) -> bool:
        """Whether the block is certainly residual; an add of two branches alone does not prove it."""
        return True

    def project(self, x: Tensor) -> Tensor:
        """The host's shortcut: the projection of x if there is one, else x."""
        downsample = getattr(self, "downsample", None)
        return x if downsample is None else downsample(x)

    def project_but_norm(self, x: Tensor) -> Branch:
        """`project` without its last layer, usually a norm, and that layer, which the stage may fuse.

        The layer is None if an adapter overrides `project`, or a hook needs the projection to be called.
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
        """s, the activation after the add; None for none."""
        return None

    def out_channels(self) -> int:
        """Channels C of F_l and X_l."""
        raise NotImplementedError

    def inner_widths(self) -> tuple[int, int] | None:
        """For DS2: the width of H_1 and how many of its channels get a weight; None where DS2 does not apply."""
        return None

    def conv_norms(self) -> list[tuple[str, str]]:
        """Names, within the block, of each convolution of the branch and of the norm directly after it."""
        return []

    def last_conv(self) -> nn.Conv2d | None:
        """The convolution that ends the branch in evaluation mode, apart from its norm; None if more follows."""
        return None

    def map_of(self, result: Any) -> Tensor:
        """X_l in the block's output: the first tensor, if the host's block returns several."""
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first

    def _dense_layout(self) -> MapLayout:
        return MapLayout(self.tokens)

    def forward(self, x: Tensor, residual_add: "ResidualAdd | None" = None) -> Tensor:
        """X_l from X_{l-1}; the stage passes residual_add(branch, norm, identity, activation) for the add."""
        branch, norm = self.branch(x)
        identity, last = self.project_but_norm(x)
        return in_stage(residual_add)(branch, norm, identity, self.activation(), identity_norm=last)


def layout_of(block: Any) -> MapLayout:
    """The layout of a plugged block's maps."""
    layout: MapLayout = block._dense_layout()
    return layout


def map_of(block: Any, result: Any) -> Tensor:
    """X_l in the output of a plugged block; a traced block returns nothing else."""
    found: Tensor = block.map_of(result) if isinstance(block, DenseBlock) else result
    return found


def in_stage(residual_add: "ResidualAdd | None") -> "ResidualAdd":
    """`residual_add`, checked.

    Raises:
        DenseShortcutError: it is None, because the block was called by itself.
    """
    if residual_add is None:
        raise DenseShortcutError(
            "a block of a dense stage was called by itself, without the stage's earlier maps: call the stage, or "
            "iterate over it and call each step."
        )
    return residual_add
