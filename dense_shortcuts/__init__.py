"""Dense shortcuts for residual networks: ResNet in, DSNet out.

import timm, dense_shortcuts as ds
net = ds.plug_in(timm.create_model("resnet50"))
"""

from . import models as models  # registers the families with timm
from .adapters import DenseBlock, register_adapter
from .errors import DenseShortcutError
from .inference.fuse import fuse
from .models import list_models
from .nn.shortcut import DenseShortcut
from .nn.stage import DenseStage
from .surgery.check import check
from .surgery.load import load
from .surgery.param_groups import param_groups
from .surgery.plug import Plan, dense_stages, plan, plug_in, shortcut_parameters, unplug

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
