"""One file a block family: where the residual branch ends, what the projection shortcut is, what follows the add.

A block that is plugged takes the class of its adapter, `dense_class`; a class without an adapter is traced. Only the
exact class counts: a subclass may have another forward pass.
"""

from torch import nn

from . import timm_res2net, timm_resnet, torchvision_resnet, traced
from .block import DenseBlock
from .trace import NoResidual

_WRITTEN: dict[type[nn.Module], type[DenseBlock]] = {}


def register_adapter(dense: type[DenseBlock]) -> type[DenseBlock]:
    """Teach `plug_in` a block class; usable as a decorator.

    Args:
        dense: a class made of `DenseBlock` and the host's block class, in this order, that says where the residual
            branch ends. An adapter of the same host class that is there already is replaced.

    Returns:
        `dense`.
    """
    _WRITTEN[host_class(dense)] = dense
    return dense


def host_class(dense: type[DenseBlock]) -> type[nn.Module]:
    """The host's block class that an adapter stands for: its last base."""
    host = dense.__bases__[-1]
    if not issubclass(dense, DenseBlock) or not issubclass(host, nn.Module) or issubclass(host, DenseBlock):
        raise TypeError(f"{dense.__name__} is no adapter: write `class {dense.__name__}(DenseBlock, HostBlock)`.")
    return host


def has_adapter(cls: type[nn.Module]) -> bool:
    """Whether an adapter is written for a block class."""
    return cls in _WRITTEN


def understand(block: nn.Module) -> DenseBlock:
    """A view of a block through its adapter, or through a trace of its forward pass; the block stays as it is.

    Raises:
        NoResidual: no adapter is written for its class, and the trace finds no residual block; the text says why.
    """
    if has_adapter(type(block)):
        return traced.view(block, _WRITTEN[type(block)])
    return traced.understand(block)


for family in (timm_resnet, timm_res2net, torchvision_resnet):
    for cls in family.BLOCKS:
        register_adapter(cls)

__all__ = ["DenseBlock", "NoResidual", "has_adapter", "host_class", "register_adapter", "understand"]
