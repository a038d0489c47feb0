"""One file a block family: where the residual branch ends, what the projection shortcut is, what follows the add.

`DENSE_CLASSES` maps a host's block class to the class its instances take while they are plugged. Only the exact class
counts: a subclass may have another forward pass.
"""

from typing import Any

from torch import nn

from . import timm_res2net, timm_resnet, torchvision_resnet

DENSE_CLASSES: dict[type[nn.Module], Any] = {
    cls.__bases__[-1]: cls for family in (timm_resnet, timm_res2net, torchvision_resnet) for cls in family.BLOCKS
}
HOST_CLASSES = {dense: host for host, dense in DENSE_CLASSES.items()}
