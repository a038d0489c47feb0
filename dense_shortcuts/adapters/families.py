"""The adapters of timm's and torchvision's blocks, registered when this file is imported."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import (
    register_adapter,
    timm_dla,
    timm_nfnet,
    timm_positions,
    timm_relpos,
    timm_res2net,
    timm_resnet,
    timm_swin,
    timm_vovnet,
    torchvision_mvit,
    torchvision_resnet,
)

_NEWER = {"efficientvim": ".timm_pairs", "gemma4_vit": ".timm_gemma4", "lowformer": ".timm_lowformer"}

families: list[Any] = [timm_dla, timm_nfnet, timm_positions, timm_relpos, timm_res2net, timm_resnet, timm_swin]
families += [timm_vovnet, torchvision_mvit, torchvision_resnet]
for needed, name in _NEWER.items():  # not all in timm 1.0.20
    if find_spec(f"timm.models.{needed}"):
        families.append(import_module(name, __package__))
for cls in (cls for family in families for cls in family.BLOCKS):
    register_adapter(cls)
