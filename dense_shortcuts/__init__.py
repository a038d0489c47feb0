"""Dense shortcuts for residual networks: ResNet in, DSNet out.

import timm, dense_shortcuts as ds
net = ds.plug_in(timm.create_model("resnet50"))
"""

from . import models  # registers the families with timm
from .adapters import DenseBlock, register_adapter
from .check import check
from .errors import DenseShortcutError
from .fuse import fuse
from .loading import load
from .models import list_models
from .plug import Plan, dense_stages, plan, plug_in, shortcut_parameters, unplug
from .shortcut import DenseShortcut
from .stage import DenseStage

__version__ = "0.1.0"

__all__ = [
    "DenseBlock",
    "DenseShortcut",
    "DenseShortcutError",
    "DenseStage",
    "Plan",
    "check",
    "dense_stages",
    "fuse",
    "list_models",
    "load",
    "models",
    "plan",
    "plug_in",
    "register_adapter",
    "shortcut_parameters",
    "unplug",
]
