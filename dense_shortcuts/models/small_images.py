"""DenseNet and RDNet for 32x32 images, to compare with `dsnet50_cifar`: timm's networks with a 3x3 stem of stride 1.

With `pretrained=True` everything but the stem has timm's weights.
"""

from typing import Any

from timm.models import densenet, rdnet, register_model
from torch import nn


@register_model
def densenet121_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-121 for 32x32 images; its last maps are 4x4."""
    model: Any = densenet.densenet121(pretrained, **kwargs)
    model.features.conv0 = _stem(model.features.conv0, bias=False)
    model.features.pool0 = nn.Identity()
    return model


@register_model
def rdnet_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RDNet-T for 32x32 images; its last maps are 4x4."""
    model: Any = rdnet.rdnet_tiny(pretrained, **kwargs)
    model.stem[0] = _stem(model.stem[0], bias=True)
    return model


def _stem(before: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    """A 3x3 convolution of stride 1 to replace a stem's, initialised as both networks do."""
    stem = nn.Conv2d(before.in_channels, before.out_channels, 3, padding=1, bias=bias)
    nn.init.kaiming_normal_(stem.weight)
    if stem.bias is not None:
        nn.init.zeros_(stem.bias)
    return stem.to(before.weight)
