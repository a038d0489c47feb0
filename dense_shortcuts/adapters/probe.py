"""Which axis of a block's maps holds the channels, and how many: found by running it on tensors without data."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trace import NoResidual

_SIZES = ("size", "feat_size", "H", "W")


class Layout(NamedTuple):
    """Channels of a block's output, and whether they are the last axis."""

    channels: int
    tokens: bool


def probe(block: nn.Module, needed: tuple[str, ...] = ()) -> Layout:
    """The layout of a residual block's output, from a forward pass over shapes alone; the block stays as it is.

    Args:
        block: the block.
        needed: names of further arguments that its forward pass needs.

    Raises:
        NoResidual: it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C).
    """
    shadow, widths = _shadow(block), _widths(block)
    for channels in widths:
        for shape, tokens in _shapes(channels, widths):
            side = shape[2] if not tokens or len(shape) == 4 else math.isqrt(shape[1])
            result = _run(shadow, torch.empty(shape, device="meta", dtype=_dtype(block)), _guesses(needed, side))
            if result is not None and result.ndim == len(shape):
                return Layout(result.shape[-1 if tokens else 1], tokens)
    width = _token_norm(block)
    if width is not None:
        return Layout(width, True)
    raise NoResidual("it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C)")


def _token_norm(block: nn.Module) -> int | None:
    """Channels of a transformer's block that takes tokens in a number of its own: it has layer norms and linear layers.

    A layer norm over one axis is over the last one, which a convolution's maps do not have their channels on.
    """
    norms = [m for m in block.children() if isinstance(m, nn.LayerNorm) and len(m.normalized_shape) == 1]
    linear = any(isinstance(m, nn.Linear) for m in block.modules())
    convolved = any(isinstance(m, nn.Conv2d) for m in block.modules())
    return norms[0].normalized_shape[0] if norms and linear and not convolved else None


def _guesses(needed: tuple[str, ...], side: int) -> list[Any]:
    """The height and width of the map that tokens stand for, by which some transformers call their blocks.

    Raises:
        NoResidual: an argument of another name.
    """
    guesses = []
    for name in needed:
        if name not in _SIZES:
            raise NoResidual(f"its forward pass needs a second argument, {name}")
        guesses.append(side if name in ("H", "W") else (side, side))
    return guesses


def _run(shadow: nn.Module, x: Tensor, others: list[Any]) -> Tensor | None:
    try:
        with torch.no_grad():
            result = shadow(x, *others)
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


def _shapes(channels: int, widths: list[int]) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes to try, with whether their channels are last; no side is as long as the channels, so none is mistaken."""
    side = 16 if channels not in (16, 256) else 32
    return [
        ((2, channels, side, side), False),
        ((2, side * side, channels), True),
        ((2, side, side, channels), True),
        *(((2, tokens, channels), True) for tokens in widths if tokens != channels),  # mixers know their tokens' number
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
