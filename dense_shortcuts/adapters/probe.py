"""Which axis of a block's maps holds the channels, and how many: found by running it on tensors without data."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .verify import NoResidual, shadow

_SIZES = ("size", "feat_size", "H", "W")


class Layout(NamedTuple):
    """Channels of a block's output, whether they are the last axis, and what it may be called with.

    That is a shape and dtype of its input, and further arguments that it needs.
    """

    channels: int
    tokens: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    others: tuple[Any, ...]

    def example(self) -> tuple[Any, ...]:
        """An input without data, and the further arguments."""
        return torch.empty(self.shape, device="meta", dtype=self.dtype), *self.others


def probe(block: nn.Module, needed: tuple[str, ...] = ()) -> Layout:
    """The layout of a residual block's output, from a forward pass over shapes alone; the block stays as it is.

    Args:
        block: the block.
        needed: names of further arguments that its forward pass needs.

    Raises:
        NoResidual: it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C).
    """
    double, lengths = shadow(block).eval(), _lengths(block)
    for channels in _widths(block):
        for shape, tokens in _shapes(channels, lengths):
            side = shape[2] if not tokens or len(shape) == 4 else math.isqrt(shape[1])
            others = _guesses(needed, side)
            result = _run(double, torch.empty(shape, device="meta", dtype=_dtype(block)), others)
            if result is not None and result.ndim == len(shape):
                return Layout(result.shape[-1 if tokens else 1], tokens, shape, _dtype(block), tuple(others))
    raise NoResidual("it takes neither maps (N, C, H, W) nor tokens (N, L, C) or (N, H, W, C)")


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


def _run(block: nn.Module, x: Tensor, others: list[Any]) -> Tensor | None:
    try:
        with torch.no_grad():
            result = block(x, *others)
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


def _lengths(block: nn.Module) -> list[int]:
    """Numbers of positions that a block may be made for.

    A layer over positions has it; a buffer has an entry for each of them, or for each pair.
    """
    sides = dict.fromkeys(side for buffer in block.buffers() for side in buffer.shape if side > 1)
    pairs = [math.isqrt(side) for side in sides if math.isqrt(side) ** 2 == side > 1]
    return [*_widths(block), *list(sides)[:8], *pairs[:8]]


def _shapes(channels: int, lengths: list[int]) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes to try, with whether their channels are last; no side is as long as the channels, so none is mistaken."""
    side = 16 if channels not in (16, 256) else 32
    sides = [math.isqrt(tokens) for tokens in lengths]
    windows = [((2, channels, 28, 28), False), ((2, 28, 28, channels), True)] if channels != 28 else []  # of 7 or 14
    fixed = [s for s, tokens in zip(sides, lengths, strict=True) if s * s == tokens and s not in (1, channels)]
    return [
        ((2, channels, side, side), False),
        ((2, side * side, channels), True),
        ((2, side, side, channels), True),
        *(((2, tokens, channels), True) for tokens in lengths if tokens != channels),
        *(((2, channels, s, s), False) for s in fixed),
        *windows,
    ]
