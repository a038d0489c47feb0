"""Dense shortcuts for residual networks: ResNet in, DSNet out.

import timm, dense_shortcuts as ds
net = ds.plug_in(timm.create_model("resnet50"))
"""

from . import models as models  # registers the families with timm
from .adapters import DenseBlock, register_adapter
from .check import check
from .errors import DenseShortcutError
from .fuse import fuse
from .loading import load
from .models import list_models
from .param_groups import param_groups
from .plug import Plan, dense_stages, plan, plug_in, shortcut_parameters, unplug
from .shortcut import DenseShortcut
from .stage import DenseStage

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022, by use
    # plug into a network
    "plug_in",
    "plan",
    "unplug",
    "Plan",
    # its weights, its health, its form for inference
    "load",
    "check",
    "fuse",
    # train it; teach a block
    "param_groups",
    "register_adapter",
    "DenseBlock",
    # what is added
    "DenseStage",
    "DenseShortcut",
    "dense_stages",
    "shortcut_parameters",
    # the registered networks
    "list_models",
    "DenseShortcutError",
]
