"""Which axis of a block's maps holds the channels, and how many: found by running it on tensors without data."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .verify import NoResidual, shadow


class Layout(NamedTuple):
    """Channels of a block's output, whether they are the last axis, and an input that it takes."""

    channels: int
    tokens: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    def example(self) -> Tensor:
        """An input without data."""
        return torch.empty(self.shape, device="meta", dtype=self.dtype)


def probe(block: nn.Module) -> Layout:
    """The layout of a residual block's output, from a forward pass over shapes alone; the block stays as it is.

    Raises:
        NoResidual: it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C).
    """
    double = shadow(block).eval()
    for channels in _widths(block):
        for shape, tokens in _shapes(channels):
            result = _run(double, torch.empty(shape, device="meta", dtype=_dtype(block)))
            if result is not None and result.ndim == len(shape):
                return Layout(result.shape[-1 if tokens else 1], tokens, shape, _dtype(block))
    raise NoResidual("it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C)")


def _run(block: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            result = block(x)
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
