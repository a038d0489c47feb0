"""Tokens, sequences and volumes in the form of feature maps, (N, C, H, W), and back."""

from torch import Tensor
from torch.fx import Proxy


def as_map(x: Tensor, tokens: bool, volumes: bool = False) -> Tensor:
    """A view as a map (N, C, H, W), of tokens, whose channels are last, or of a map of any number of axes.

    (N, C) becomes (N, C, 1, 1), a sequence (N, C, L) becomes (N, C, 1, L), a volume (N, C, D, H, W) becomes
    (N, C, D H, W). What torch.fx records does not know how many axes it has: tokens are all put into one, as those of
    (N, L, C), and `volumes` says of others whether they are such.
    """
    recorded = isinstance(x, Proxy)
    if recorded and tokens:
        return x.movedim(-1, 1).flatten(2).unsqueeze(2)
    x = x.movedim(-1, 1) if tokens else x
    axes = (5 if volumes else 4) if recorded else x.ndim
    return {2: lambda: x[:, :, None, None], 3: lambda: x.unsqueeze(2), 4: lambda: x, 5: lambda: x.flatten(2, 3)}[axes]()


def is_map(x: Tensor, tokens: bool, volumes: bool) -> bool:
    """Whether x is (N, C, H, W) as it stands; see `as_map` for what torch.fx records."""
    return not tokens and (not volumes if isinstance(x, Proxy) else x.ndim == 4)


def from_map(x: Tensor, tokens: bool, like: Tensor, volumes: bool = False) -> Tensor:
    """A map in the form of `like`, one that `as_map` was given."""
    recorded = isinstance(like, Proxy)
    if recorded and tokens:
        return x.movedim(1, -1).reshape(like.shape)
    axes = (5 if volumes else 4) if recorded else like.ndim
    if axes == 5:
        first = 1 if tokens else 2
        x = x.unflatten(2, (like.shape[first], like.shape[first + 1]))
    elif axes < 4:
        x = x[:, :, 0, 0] if axes == 2 else x.squeeze(2)
    return x.movedim(1, -1) if tokens else x
