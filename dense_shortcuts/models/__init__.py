"""The networks that importing the package registers with timm."""

from . import small_images as small_images  # registers its networks with timm
from .dsnet import list_models

__all__ = ["list_models"]
