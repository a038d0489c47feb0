"""What every adapter is made of."""

from collections.abc import Callable

from torch import Tensor, nn

Join = Callable[[Tensor, nn.Module | None, Tensor, nn.Module], Tensor]
Branch = tuple[Tensor, nn.Module | None]


class DenseBlock:
    """Mixin for a host's block that leaves its add to the stage. An adapter is the host's class with these methods.

    The block stays a module that is called, so that hooks on it fire and see the stage's feature maps X_l.
    """

    downsample: nn.Module | None

    def branch(self, x: Tensor) -> Branch:
        """F_l(x), everything before the add: a tensor and the norm still to be applied to it, if that comes last.

        Squeeze-excite and drop path are part of the branch; where there are any, no norm is left.
        """
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """What the host would add: the projection shortcut where there is one, else x."""
        return x if self.downsample is None else self.downsample(x)

    def activation(self) -> nn.Module:
        """What follows the add: s."""
        raise NotImplementedError

    def out_channels(self) -> int:
        """Channels C of F_l and X_l."""
        raise NotImplementedError

    def inner_widths(self) -> tuple[int, int] | None:
        """For DS2: the width of H_1 and how many of its channels get a weight; None where DS2 does not apply."""
        return None

    def conv_norms(self) -> list[tuple[str, str]]:
        """Names in the block of each convolution in the branch and of the norm that follows it directly."""
        raise NotImplementedError

    def last_conv(self) -> nn.Conv2d | None:
        """The convolution whose output, but for its norm, is the branch's in evaluation mode; None if there is more."""
        raise NotImplementedError

    def forward(self, x: Tensor, join: Join) -> Tensor:
        """X_l from X_{l-1}, where join(branch, norm, identity, activation) is what the stage makes of them."""
        branch, norm = self.branch(x)
        return join(branch, norm, self.project(x), self.activation())


def widths_of_3x3(conv: nn.Conv2d) -> tuple[int, int] | None:
    """`inner_widths` of a plain bottleneck: DS2 applies where its 3x3 keeps the shape."""
    keeps = conv.stride == (1, 1) and conv.in_channels == conv.out_channels
    return (conv.in_channels, conv.in_channels) if keeps else None
