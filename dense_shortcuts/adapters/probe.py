"""Which axis of a block's maps holds the channels, and how many: found by running it on tensors without data."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .trace import NoResidual


class Layout(NamedTuple):
    """Channels of a block's output, and whether they are the last axis."""

    channels: int
    tokens: bool


def probe(block: nn.Module) -> Layout:
    """The layout of a residual block's output, from a forward pass over shapes alone; the block stays as it is.

    Raises:
        NoResidual: it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C).
    """
    shadow = _shadow(block)
    for channels in _widths(block):
        for shape, tokens in _shapes(channels):
            result = _run(shadow, torch.empty(shape, device="meta", dtype=_dtype(block)))
            if result is not None and result.ndim == len(shape):
                return Layout(result.shape[-1 if tokens else 1], tokens)
    raise NoResidual("it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C)")


def _run(shadow: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            result = shadow(x)
    except Exception:  # whatever a forward pass raises on a shape that is not its own
        return None
    return result if isinstance(result, Tensor) else None


def _dtype(block: nn.Module) -> torch.dtype:
    return next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)


def _widths(block: nn.Module) -> list[int]:
    """Channels that the input may have: those that a layer of the block takes, in order."""
    found: dict[int, None] = {}
    for module in block.modules():
        for name in ("in_channels", "in_features", "num_features", "num_channels", "normalized_shape"):
            value = getattr(module, name, None)
            value = value[-1] if isinstance(value, tuple | torch.Size) and value else value
            if isinstance(value, int):
                found[value] = None
    return list(found)[:8]


def _shapes(channels: int) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes to try, with whether their channels are last; no side is as long as the channels, so none is mistaken."""
    side = 16 if channels not in (16, 256) else 32
    return [
        ((2, channels, side, side), False),
        ((2, side * side, channels), True),
        ((2, side, side, channels), True),
    ]


def _shadow(module: nn.Module) -> nn.Module:
    """The same module in evaluation mode with tensors without data and no hooks."""
    shadow = module.__class__.__new__(module.__class__)
    shadow.__dict__.update(module.__dict__, training=False)
    shadow.__dict__["_parameters"] = {name: _empty(p) for name, p in module._parameters.items()}
    shadow.__dict__["_buffers"] = {name: _empty(b) for name, b in module._buffers.items()}
    shadow.__dict__["_modules"] = {n: None if m is None else _shadow(m) for n, m in module._modules.items()}
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        shadow.__dict__[name] = type(module.__dict__[name])()
    return shadow


def _empty(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor, device="meta")
