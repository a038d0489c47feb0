"""What several adapters share: two branches in a row, and where DS2 applies."""

from torch import Tensor, nn

from ..nn.residual_add import ResidualAdd


def add_two_branches(
    residual_add: ResidualAdd,
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
