"""How the weights of a dense shortcut are computed from its parameters: as in the paper, and as in related methods.

| weighting | parameter of a block that sums m maps | weight of map i |
| --- | --- | --- |
| channel (the paper) | (m, C) | the parameter |
| softmax | (m, C) | softmax over the maps, for each channel |
| gate | (m, 1) | sigmoid of the parameter, one gate per pair |
| attention | (C,), a query q | softmax over the maps of q . k_i / sqrt(C), for each image |

k_i is the map's mean over its positions, divided by its root mean square over the channels.

With `pattern="powers"`, "gate" is SkipResNet's form: a gated sum of the maps 1, 2, 4, .. back. "attention" follows
attention residuals: a softmax over depth with one learned query per block, and pooled maps as keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DenseShortcutError

INITS = ("nearest", "uniform", "ones", "zeros", "random")
WEIGHTINGS = ("channel", "softmax", "gate", "attention")

_FAR = 4.0  # logit of the nearest map against the rest: 98 % of a softmax over two maps; gates of 98 % and 2 %


def start_weight(init: str, maps: int, channels: int) -> Tensor:
    """Initial values of w_{l,0} .. w_{l,l-1}, (maps, channels).

    "random" is uniform between -1 and 1, as PyTorch initialises the depthwise 1x1 convolutions of public code.

    Raises:
        DenseShortcutError: unknown name.
    """
    weight = torch.zeros(maps, channels)
    if init == "nearest":
        weight[-1] = 1.0
    elif init == "uniform":
        weight.fill_(1.0 / maps)
    elif init == "ones":
        weight.fill_(1.0)
    elif init == "random":
        weight.uniform_(-1, 1)
    elif init != "zeros":
        raise DenseShortcutError(f"unknown init {init!r}: choose one of {', '.join(INITS)}.")
    return weight


def start_parameter(weighting: str, init: str, maps: int, channels: int) -> Tensor:
    """The initial parameter of a block that sums `maps` maps.

    Raises:
        DenseShortcutError: unknown name, or an `init` that the weighting does not support.
    """
    if weighting == "channel":
        return start_weight(init, maps, channels)
    if weighting not in WEIGHTINGS:
        raise DenseShortcutError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}.")
    if init not in _STARTS[weighting]:
        raise DenseShortcutError(
            f"weighting={weighting!r} does not support init={init!r}: choose one of {', '.join(_STARTS[weighting])}."
        )
    if weighting == "attention":
        return torch.zeros(channels)
    if weighting == "gate":
        return _FAR * (2 * start_weight(init, maps, 1) - 1)
    return _FAR * start_weight("nearest" if init == "nearest" else "zeros", maps, channels)


_STARTS = {"softmax": ("nearest", "uniform"), "gate": ("nearest", "ones", "zeros"), "attention": ("uniform",)}


def weigh(weighting: str, parameter: Tensor, channels: int, maps: Sequence[Tensor]) -> Tensor:
    """The weights of a block for the maps it sums: (maps, C), or (maps, N, C) for attention.

    Args:
        weighting: a name in WEIGHTINGS.
        parameter: the parameter of the block.
        channels: C.
        maps: the maps, each (N, C, H, W); only attention reads them.
    """
    if weighting == "channel":
        return parameter
    if weighting == "softmax":
        return parameter.softmax(0)
    if weighting == "gate":
        return parameter.sigmoid().expand(-1, channels)
    keys = torch.stack([_key(x) for x in maps])
    scores = (keys * parameter.to(keys.dtype)).sum(-1, keepdim=True) * channels**-0.5
    return scores.softmax(0).expand(-1, -1, channels)


def _key(x: Tensor) -> Tensor:
    """A map's mean over positions, scaled to root mean square 1 over channels, (N, C), in float32 or better."""
    pooled = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return pooled * torch.rsqrt(pooled.square().mean(1, keepdim=True) + 1e-6)
