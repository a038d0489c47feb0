"""The baseline: dense shortcuts as public code has them, a batch norm and a depthwise 1x1 convolution for each pair.

Written from the equations in docs/paper-map.md; nothing of it is used outside the benchmark.
"""

from collections.abc import Sequence
from typing import Any

import timm
from timm.models.resnet import Bottleneck
from torch import Tensor, nn


class PublicPair(nn.Sequential):
    """w_{l,i} * N(X_i) for one pair; w starts at `start`."""

    def __init__(self, channels: int, start: float) -> None:
        weighting = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        nn.init.constant_(weighting.weight, start)
        super().__init__(nn.BatchNorm2d(channels, affine=False), weighting)


class PublicStage(nn.Module):
    """A stage of timm's bottlenecks with X_l = s(F_l(X_{l-1}) + sum_{i<l} w_{l,i} * N(X_i)), pair by pair.

    Args:
        blocks: the host's blocks, which become its own.

    Attributes:
        pairs: pairs[l - 1][i] is the pair (l, i); w starts at 1 for the nearest map, else at 0.
    """

    def __init__(self, blocks: Sequence[Bottleneck]) -> None:
        super().__init__()
        channels = blocks[0].conv3.out_channels
        self.blocks = nn.ModuleList(blocks)
        self.pairs = nn.ModuleList(
            nn.ModuleList(PublicPair(channels, float(i == k)) for i in range(k + 1)) for k in range(len(blocks))
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.blocks[0]
        maps = [x if first.downsample is None else first.downsample(x)]
        for block, pairs in zip(self.blocks, self.pairs, strict=True):
            y = residual_branch(block, x)
            for pair, earlier in zip(pairs, maps, strict=True):  # type: ignore[call-overload]
                y = y + pair(earlier)
            x = block.act3(y)  # type: ignore[operator]
            maps.append(x)
        return x


def residual_branch(block: Any, x: Tensor) -> Tensor:
    """F_l(x) of timm's bottleneck without extras."""
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.act2(block.bn2(block.conv2(x)))
    return block.bn3(block.conv3(x))


def public_dsnet(host: str) -> nn.Module:
    """The public form of a DSNet on timm's ResNet of that name."""
    network: Any = timm.create_model(host)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(network, name, PublicStage(list(getattr(network, name))))
    return network
