"""Ready networks, registered with timm when the package is imported."""

from .dsnet import list_models

__all__ = ["list_models"]
