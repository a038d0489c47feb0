"""Which axes of a layer's output are channels and places: maps (N, C, H, W) or (N, H, W, C), or tokens (N, L, C)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DenseShortcutError
from ...nn.block import layout_of
from ...surgery.plug import dense_stages


@dataclass(frozen=True)
class Layout:
    """How a layer's output is laid out.

    Attributes:
        channels_last: whether channels are the last axis, else they are the second.
        grid: rows and columns.
        prefix: tokens before those of the grid, such as a class token.
    """

    channels_last: bool
    grid: tuple[int, int]
    prefix: int = 0

    def maps(self, output: Tensor) -> Tensor:
        """The layer's output as maps (N, C, H, W)."""
        if not self.channels_last:
            return output
        if output.ndim == 3:
            output = output[:, self.prefix :].unflatten(1, self.grid)
        return output.movedim(-1, 1)

    def output(self, maps: Tensor, output: Tensor) -> Tensor:
        """The layer's output from its maps, with what it had before the grid."""
        if not self.channels_last:
            return maps
        places = maps.movedim(1, -1)
        return places if output.ndim == 4 else torch.cat([output[:, : self.prefix], places.flatten(1, 2)], 1)


def find_layout(model: nn.Module, layer: str, images: Tensor) -> Layout:
    """The layout of a layer's output for such images, (N, 3, H, W), from a forward pass with the first one.

    Places are the two axes whose ratio is the images' own. Where that holds for either layout, C being equal to H and
    W, a plugged block's layout decides, else timm's `output_fmt`, else channels are taken to be the second axis. Tokens
    are laid out row by row where the network says how many stand before them (`num_prefix_tokens` of timm's ViTs).

    Raises:
        DenseShortcutError: an output that is no map of the image, or has one place only.
    """
    output = _output(model, layer, images[:1])
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DenseShortcutError(f"{layer} gives no feature map (N, C, H, W) but {shape}: choose another layer.")
    size = (images.shape[2], images.shape[3])
    layout = _of_tokens(model, layer, output, size) if output.ndim == 3 else _of_maps(model, layer, output, size)
    if layout.grid == (1, 1):
        raise DenseShortcutError(f"{layer} gives maps of one place only for such images: choose an earlier layer.")
    return layout


def _output(model: nn.Module, layer: str, image: Tensor) -> Any:
    """What the layer gives; None where it takes no part."""
    seen: list[Any] = [None]
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with torch.no_grad():
            model(image)
    finally:
        handle.remove()
    return seen[-1]


def _of_maps(model: nn.Module, layer: str, output: Tensor, size: tuple[int, int]) -> Layout:
    a, b, c = output.shape[1:]
    second, last = _fits((b, c), size), _fits((a, b), size)
    channels_last = _says_last(model, layer) if second == last else last
    return Layout(channels_last, (a, b) if channels_last else (b, c))


def _of_tokens(model: nn.Module, layer: str, output: Tensor, size: tuple[int, int]) -> Layout:
    declared = getattr(model, "num_prefix_tokens", None)
    for prefix in () if declared is None else (declared, 0):
        for grid in _grids(output.shape[1] - prefix):
            if _fits(grid, size):
                return Layout(True, grid, prefix)
    raise DenseShortcutError(
        f"{layer} gives tokens {tuple(output.shape)} and the network does not say where in the image they lie: choose "
        "a layer that gives a map."
    )


def _grids(places: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of so many places, those nearest to a square first."""
    for rows in sorted(range(1, places + 1), key=lambda rows: abs(rows - places / rows)):
        if places % rows == 0:
            yield rows, places // rows


def _fits(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether rows and columns are the image's own over one number, up to a place in either."""
    (rows, columns), (height, width) = grid, size
    return rows <= height and columns <= width and abs(rows * width - columns * height) < max(height, width)


def _says_last(model: nn.Module, layer: str) -> bool:
    """Whether channels are the last axis by what is known of the layer without its shape."""
    if isinstance(model.get_submodule(layer), nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm):
        return False
    for name, stage in dense_stages(model).items():
        if f"{layer}.".startswith(f"{name}." if name else ""):
            return layout_of(stage[stage.segments[0].first]).tokens
    return getattr(model, "output_fmt", None) == "NHWC"
