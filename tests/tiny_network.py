"""A tiny network, registered with timm as the commands need it."""

from collections import OrderedDict

import timm
from timm.models.resnet import BasicBlock
from torch import nn


@timm.models.register_model
def tiny_resnet(
    pretrained: bool = False, num_classes: int = 10, norm_layer: type[nn.Module] = nn.BatchNorm2d, **kwargs
) -> nn.Module:
    """A residual network of one stage with two blocks, eight channels wide."""
    layers = [
        ("conv1", nn.Conv2d(3, 8, 3, padding=1, bias=False)),
        ("bn1", norm_layer(8)),
        ("layer1", nn.Sequential(*(BasicBlock(8, 8, norm_layer=norm_layer) for _ in range(2)))),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(8, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))
