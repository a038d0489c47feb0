"""DenseNet and RDNet to compare DSNets with: timm's networks, for 32x32 images with a 3x3 stem of stride 1.

With `pretrained=True` everything but the stem of `densenet121_cifar` and `rdnet_tiny_cifar` has timm's weights.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import densenet, rdnet, register_model
from torch import nn


@register_model
def densenet121_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-121 for 32x32 images; its last maps are 4x4."""
    return _for_small_images(densenet.densenet121(pretrained, **kwargs))


@register_model
def densenet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-BC for 32x32 images (Huang et al., 2017), of any size; arguments as `densenet_imagenet`."""
    return _for_small_images(densenet_imagenet(**kwargs))


@register_model
def densenet_imagenet(
    pretrained: bool = False,
    *,
    channels: Sequence[int] = (12,),
    layers: Sequence[int] = (16, 16, 16),
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's DenseNet of any size, without weights.

    Args:
        channels: the growth rate; twice as many come from the stem.
        layers: layers of each block, each a 1x1 and a 3x3 convolution.
    """
    return densenet.DenseNet(growth_rate=channels[0], block_config=tuple(layers), **kwargs)


def densenet_of(parameters: int, layers: Sequence[int], name: str, num_classes: int) -> tuple[int, tuple[int, ...]]:
    """Growth rate and layers of a DenseNet with a given number of parameters, within 3 % if one has them.

    Args:
        layers: layers of each block; the last block's may change by two, since growth rates alone are coarse.
        name: `densenet_cifar` or `densenet_imagenet`.
    """
    make = {"densenet_cifar": densenet_cifar, "densenet_imagenet": densenet_imagenet}[name]

    def count(growth: int, layers: Sequence[int]) -> int:
        with torch.device("meta"):
            model = make(channels=(growth,), layers=layers, num_classes=num_classes)
        return sum(p.numel() for p in model.parameters())

    growth = 2
    while count(growth, layers) < parameters:
        growth *= 2
    growth = bisect.bisect_left(range(growth), parameters, lo=1, key=lambda rate: count(rate, layers))
    depths = [(*layers[:-1], layers[-1] + more) for more in range(-2, 3) if layers[-1] + more > 0]
    found = [(rate, depth) for rate in (growth - 1, growth, growth + 1) if rate > 0 for depth in depths]

    def fit(size: tuple[int, tuple[int, ...]]) -> tuple[int, float]:
        off = abs(count(*size) / parameters - 1)
        return (abs(size[1][-1] - layers[-1]) if off < 0.03 else 3), off

    return min(found, key=fit)


@register_model
def rdnet_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RDNet-T for 32x32 images; its last maps are 4x4."""
    model: Any = rdnet.rdnet_tiny(pretrained, **kwargs)
    model.stem[0] = _stem(model.stem[0], bias=True)
    return model


def _for_small_images(model: Any) -> nn.Module:
    """A DenseNet whose stem keeps the images' size."""
    model.features.conv0 = _stem(model.features.conv0, bias=False)
    model.features.pool0 = nn.Identity()
    return model


def _stem(before: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    """A 3x3 convolution of stride 1 to replace a stem's, initialised as both networks do."""
    stem = nn.Conv2d(before.in_channels, before.out_channels, 3, padding=1, bias=bias)
    nn.init.kaiming_normal_(stem.weight)
    if stem.bias is not None:
        nn.init.zeros_(stem.bias)
    return stem.to(before.weight)
