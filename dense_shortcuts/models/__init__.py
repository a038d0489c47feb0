"""Ready networks, registered with timm when the package is imported."""

from . import small_images as small_images  # its networks are registered with timm by that
from .dsnet import list_models

__all__ = ["list_models"]
