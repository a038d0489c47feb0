"""One file per block family: where the residual branch ends, what the projection shortcut is, what follows the add.

A plugged block takes the class of its adapter; blocks of a class without an adapter are traced. Only the exact class
counts, because a subclass may have another forward pass. `families.py` registers the adapters for timm and torchvision.
"""

from typing import Any

from torch import nn

from ..nn.block import DenseBlock
from .tracing.trace import NoResidual
from .tracing.traced import Reading, TracedBlock, understand, view

_WRITTEN: dict[type[nn.Module], type[DenseBlock]] = {}


def register_adapter(dense: type[DenseBlock]) -> type[DenseBlock]:
    """Teach `plug_in` a block class; usable as a decorator.

    Args:
        dense: a class derived from `DenseBlock` and the host's block class, in this order, that says where the residual
            branch ends. It replaces an existing adapter of the same host class.

    Returns:
        `dense`.
    """
    host = dense.__bases__[-1]
    if not issubclass(dense, DenseBlock) or not issubclass(host, nn.Module) or issubclass(host, DenseBlock):
        raise TypeError(f"{dense.__name__} is not an adapter: write `class {dense.__name__}(DenseBlock, HostBlock)`.")
    _WRITTEN[host] = dense
    return dense


def has_adapter(cls: type[nn.Module]) -> bool:
    """Whether an adapter is written for a block class."""
    return cls in _WRITTEN


def read(block: Any) -> Any:
    """An object with the methods of `DenseBlock` for a block, a view if it is not plugged. The block is unchanged.

    Raises:
        NoResidual: the class has no adapter and the trace finds no residual block, or the block is configured without a
            shortcut; the text says which.
    """
    if isinstance(block, TracedBlock):
        return Reading(block, block._dense_trace)
    if isinstance(block, DenseBlock):
        return block
    if has_adapter(type(block)):
        dense: DenseBlock = view(block, _WRITTEN[type(block)])
        if not dense.is_residual():
            raise NoResidual("it is set to add no shortcut")
        return dense
    return understand(block)


def plug(block: nn.Module, reading: Any, inner: nn.Module | None) -> None:
    """Change a block in place so that it leaves its add to the stage."""
    if isinstance(reading, Reading):
        block.__dict__.update(reading.added)
        block.__class__ = reading.dense_class
    else:
        block.__class__ = type(reading)
        block.register_module("inner", inner)


def unplug(block: Any) -> None:
    """Undo `plug`."""
    if isinstance(block, TracedBlock):
        host = block._dense_trace.host
        del block._dense_trace
        block.__class__ = host
    else:
        del block.inner
        block.__class__ = type(block).__bases__[-1]


def host_of(reading: Any) -> type[nn.Module]:
    """The host's class of a block, from its reading."""
    return reading.traced.host if isinstance(reading, Reading) else type(reading).__bases__[-1]


__all__ = [
    "DenseBlock",
    "NoResidual",
    "has_adapter",
    "host_of",
    "plug",
    "read",
    "register_adapter",
    "unplug",
]
