"""Which axis of a block's maps holds the channels, and how many: found by running it on tensors without data."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .verify import NoResidual, shadow

_PAIRS = ("size", "feat_size", "input_dimensions")
_SIDES = ("H", "W", "height", "width")
_MASKS = ("attention_mask", "attn_mask", "mask")


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
        NoResidual: it takes neither maps, (N, C, H, W), sequences or volumes, nor tokens of one to three axes.
    """
    double, dtype, lengths = shadow(block).eval(), _dtype(block), _lengths(block)

    def run(shape: tuple[int, ...], tokens: bool) -> Layout | None:
        others = _guesses(needed, shape[2] if not tokens or len(shape) > 3 else math.isqrt(shape[1]))
        result = _run(double, torch.empty(shape, device="meta", dtype=dtype), others)
        if result is None or result.ndim != len(shape):
            return None
        return Layout(result.shape[-1 if tokens else 1], tokens, shape, dtype, tuple(others))

    for channels in _widths(block):
        for sizes, tokens in _free_shapes(channels):
            layouts = [run(shape, tokens) for shape in sizes]
            if layouts[0] is not None and None not in layouts:
                return layouts[0]
    for channels in _widths(block):
        for shape, tokens in _fixed_shapes(channels, lengths):
            if (layout := run(shape, tokens)) is not None:
                return layout
    raise NoResidual(
        "it takes neither maps (N, C, H, W), (N, C, L) or (N, C, D, H, W) nor tokens (N, L, C), (N, H, W, C) or "
        "(N, D, H, W, C)"
    )


def _guesses(needed: tuple[str, ...], side: int) -> list[Any]:
    """What some transformers call their blocks with: the size of the map that tokens stand for, and a mask or None.

    Raises:
        NoResidual: an argument of another name.
    """
    guesses: list[Any] = []
    for name in needed:
        if name not in (*_PAIRS, *_SIDES, *_MASKS):
            raise NoResidual(f"its forward pass needs a second argument, {name}")
        guesses.append((side, side) if name in _PAIRS else side if name in _SIDES else None)
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


def _free_shapes(channels: int) -> list[tuple[list[tuple[int, ...]], bool]]:
    """Shapes to try of what takes any length, with whether their channels are last; all of one entry have to work.

    One length alone may be taken for channels: a Conv1d of 16 channels takes (2, 16, C) whatever C is. No side is as
    long as the channels, so none is mistaken.
    """
    side = 16 if channels not in (16, 256) else 32
    other = 32 if side == 16 and channels not in (32, 1024) else 64
    return [
        ([(2, channels, side, side)], False),
        ([(2, channels, side * side), (2, channels, other * other)], False),
        ([(2, side * side, channels), (2, other * other, channels)], True),
        ([(2, side, side, channels)], True),
        ([(2, channels, 8, side, side)], False),
        ([(2, 8, side, side, channels)], True),
    ]


def _fixed_shapes(channels: int, lengths: list[int]) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes to try of what is made for one length, with whether their channels are last."""
    side = 16 if channels not in (16, 256) else 32
    sides = [math.isqrt(tokens) for tokens in lengths]
    windows = [((2, channels, 28, 28), False), ((2, 28, 28, channels), True)] if channels != 28 else []  # of 7 or 14
    fixed = [s for s, tokens in zip(sides, lengths, strict=True) if s * s == tokens and s not in (1, channels)]
    return [
        ((2, side * side, channels), True),
        *(((2, tokens, channels), True) for tokens in lengths if tokens != channels),
        *(((2, channels, s, s), False) for s in fixed),
        *windows,
    ]
