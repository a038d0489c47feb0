"""The DSNet and DS2Net families: timm networks, plugged in, and registered with timm under similar names."""

import fnmatch
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..surgery.plug import plug_in
from .cifar import cifar_resnet

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100's training images

_OPTIONS = [name for name, p in inspect.signature(plug_in).parameters.items() if p.kind is p.KEYWORD_ONLY]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    } | kwargs


def _cifar_cfg(pool_size: int) -> dict[str, Any]:
    return _cfg(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(pool_size, pool_size),
        crop_pct=1.0,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    )


_IMAGENET = [
    "dsnet18",
    "dsnet34",
    "dsnet26",
    "dsnet50",
    "dsnet101",
    "dsnet152",
    "dsnext50_32x4d",
    "dsnext101_32x8d",
    "wide_dsnet50_2",
    "se_dsnet50",
    "ds2net50",
    "ds2net101",
    "ds2net152",
    "ds2res2net50",
]
_CIFAR = ["dsnet20", "dsnet32", "dsnet56", "dsnet110", "dsnet29"]

default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in _IMAGENET} | {name: _cifar_cfg(8) for name in _CIFAR} | {"dsnet50_cifar": _cifar_cfg(4)}
)


def list_models(
    pattern: str = "",
    *,
    features_only: bool | None = None,
    output_stride: bool | None = None,
    inner: bool | None = None,
) -> list[str]:
    """Names of the registered networks that have (True) or lack (False) an ability; None does not filter.

    Args:
        pattern: a wildcard such as "dsnet*".
        features_only: `timm.create_model(name, features_only=True)`.
        output_stride: dilation instead of stride, with `output_stride=8 | 16`.
        inner: DS2, shortcuts inside the bottlenecks.
    """
    wanted = {"features_only": features_only, "output_stride": output_stride, "inner": inner}
    return [
        name
        for name in default_cfgs
        if fnmatch.fnmatch(name, pattern or "*")
        and all(value is None or _abilities(name)[what] == value for what, value in wanted.items())
    ]


def _abilities(name: str) -> dict[str, bool]:
    cifar = default_cfgs[name].default.input_size == (3, 32, 32)
    return {"features_only": True, "output_stride": not cifar, "inner": name.startswith("ds2")}


def _plugged(host: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    """The host network, plugged in; keywords of `plug_in` are passed to it, the rest to the host."""
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    return plug_in(host(**kwargs), **options)


def _create(name: str, pretrained: bool, host: Callable[..., nn.Module] = ResNet, **kwargs: Any) -> nn.Module:
    """A registered network. Its branches start at full strength, since dense shortcuts train worse beside branches that
    start at zero, which is timm's default for ResNets (docs/ablations.md)."""
    stages = len(kwargs["layers"])
    return build_model_with_cfg(
        partial(_plugged, host),
        name,
        pretrained,
        feature_cfg={"out_indices": tuple(range(stages + 1))},
        **{"zero_init_last": False} | kwargs,
    )


@register_model
def dsnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-18: ResNet-18 with dense shortcuts."""
    return _create("dsnet18", pretrained, **dict(block=BasicBlock, layers=(2, 2, 2, 2)) | kwargs)


@register_model
def dsnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-34: ResNet-34 with dense shortcuts."""
    return _create("dsnet34", pretrained, **dict(block=BasicBlock, layers=(3, 4, 6, 3)) | kwargs)


@register_model
def dsnet26(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-26: ResNet-26 (bottlenecks) with dense shortcuts."""
    return _create("dsnet26", pretrained, **dict(block=Bottleneck, layers=(2, 2, 2, 2)) | kwargs)


@register_model
def dsnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-50: ResNet-50 with dense shortcuts."""
    return _create("dsnet50", pretrained, **dict(block=Bottleneck, layers=(3, 4, 6, 3)) | kwargs)


@register_model
def dsnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-101: ResNet-101 with dense shortcuts."""
    return _create("dsnet101", pretrained, **dict(block=Bottleneck, layers=(3, 4, 23, 3)) | kwargs)


@register_model
def dsnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-152: ResNet-152 with dense shortcuts."""
    return _create("dsnet152", pretrained, **dict(block=Bottleneck, layers=(3, 8, 36, 3)) | kwargs)


@register_model
def dsnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNeXt-50 32x4d: ResNeXt-50 32x4d with dense shortcuts."""
    host = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create("dsnext50_32x4d", pretrained, **host | kwargs)


@register_model
def dsnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNeXt-101 32x8d: ResNeXt-101 32x8d with dense shortcuts."""
    host = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create("dsnext101_32x8d", pretrained, **host | kwargs)


@register_model
def wide_dsnet50_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide DSNet-50-2: Wide ResNet-50-2 with dense shortcuts."""
    host = dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create("wide_dsnet50_2", pretrained, **host | kwargs)


@register_model
def se_dsnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-DSNet-50: SE-ResNet-50 with dense shortcuts; squeeze-excite stays in the residual branch."""
    host = dict(block=Bottleneck, layers=(3, 4, 6, 3), block_args=dict(attn_layer="se"))
    return _create("se_dsnet50", pretrained, **host | kwargs)


@register_model
def ds2net50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS2Net-50: DSNet-50 with a weighted shortcut inside each bottleneck as well."""
    return _create("ds2net50", pretrained, **dict(block=Bottleneck, layers=(3, 4, 6, 3), inner=True) | kwargs)


@register_model
def ds2net101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS2Net-101: DSNet-101 with a weighted shortcut inside each bottleneck as well."""
    return _create("ds2net101", pretrained, **dict(block=Bottleneck, layers=(3, 4, 23, 3), inner=True) | kwargs)


@register_model
def ds2net152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS2Net-152: DSNet-152 with a weighted shortcut inside each bottleneck as well."""
    return _create("ds2net152", pretrained, **dict(block=Bottleneck, layers=(3, 8, 36, 3), inner=True) | kwargs)


@register_model
def ds2res2net50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DS2Res2Net-50: Res2Net-50 26w 4s with dense shortcuts and weighted ones around each 3x3."""
    host = dict(block=Bottle2neck, layers=(3, 4, 6, 3), base_width=26, block_args=dict(scale=4), inner=True)
    return _create("ds2res2net50", pretrained, **host | kwargs)


@register_model
def dsnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-20 for 32x32 images: three stages of 3 blocks with 16, 32 and 64 channels."""
    return _create("dsnet20", pretrained, cifar_resnet, **dict(block=BasicBlock, layers=(3, 3, 3)) | kwargs)


@register_model
def dsnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-32 for 32x32 images: three stages of 5 blocks with 16, 32 and 64 channels."""
    return _create("dsnet32", pretrained, cifar_resnet, **dict(block=BasicBlock, layers=(5, 5, 5)) | kwargs)


@register_model
def dsnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-56 for 32x32 images: three stages of 9 blocks with 16, 32 and 64 channels."""
    return _create("dsnet56", pretrained, cifar_resnet, **dict(block=BasicBlock, layers=(9, 9, 9)) | kwargs)


@register_model
def dsnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-110 for 32x32 images: three stages of 18 blocks with 16, 32 and 64 channels."""
    return _create("dsnet110", pretrained, cifar_resnet, **dict(block=BasicBlock, layers=(18, 18, 18)) | kwargs)


@register_model
def dsnet29(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-29 for 32x32 images: three stages of 3 bottlenecks, 64, 128 and 256 channels (9n + 2, as ResNet-164)."""
    return _create("dsnet29", pretrained, cifar_resnet, **dict(block=Bottleneck, layers=(3, 3, 3)) | kwargs)


@register_model
def dsnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DSNet-50 for 32x32 images: ResNet-50's stages after a 3x3 stem without pooling."""
    host = dict(block=Bottleneck, layers=(3, 4, 6, 3), channels=(64, 128, 256, 512))
    return _create("dsnet50_cifar", pretrained, cifar_resnet, **host | kwargs)
