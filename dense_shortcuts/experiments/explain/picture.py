"""Pictures: maps over images, and a grid of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import atomic

if TYPE_CHECKING:
    from .run import Object, Seen


def overlay(pixels: np.ndarray, cam: np.ndarray, side: int = 336) -> np.ndarray:
    """A map in [0, 1], (S, S), laid over a picture (S, S, 3) uint8: dark where nothing is, yellow at the top.

    Smaller ones are enlarged to `side` pixels by cubic interpolation, so that a map of few places is drawn smooth.
    """
    import cv2
    from pytorch_grad_cam.utils.image import show_cam_on_image

    size = (max(side, len(pixels)),) * 2
    picture = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC).astype(np.float32) / 255
    smooth = np.clip(cv2.resize(cam.astype(np.float32), size, interpolation=cv2.INTER_CUBIC), 0, 1)
    return show_cam_on_image(picture, smooth, use_rgb=True, colormap=cv2.COLORMAP_INFERNO)


def draw(
    path: Path, labels: Sequence[str], methods: Sequence[str], drawn: Sequence[tuple["Object", Sequence["Seen"]]]
) -> None:
    """A PNG with a row for each object: the picture with its boxes, then every network's map by every method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + len(labels) * len(methods)
    rows = max(1, len(drawn))
    figure = Figure(figsize=(2.3 * columns, 2.75 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for line, (thing, seen) in zip(panels, drawn, strict=False):
        show(line[0], seen[0].pixels, thing.path.name, seen[0].boxes, len(seen[0].pixels))
        cells = [(label, each, method) for method in methods for label, each in zip(labels, seen, strict=True)]
        for axes, (label, each, method) in zip(line[1:], cells, strict=True):
            scored = each.scores.get(method)
            inside = f", {scored.energy:.0%} inside" if scored is not None else ""
            title = f"{short(label)}, {method}\n{short(each.target)}{inside}"
            show(axes, overlay(each.pixels, each.maps[method]), title, each.boxes, len(each.pixels))
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def show(axes: Any, pixels: np.ndarray, title: str, boxes: np.ndarray, side: int) -> None:
    """A picture with its title and the outlines of boxes (B, 4), whose numbers are for one of `side` pixels."""
    from matplotlib.patches import Rectangle

    axes.imshow(pixels, extent=(0, side, side, 0))
    axes.set_title(title, fontsize=8)
    for x0, y0, x1, y1 in boxes:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=2.4))
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="black", linewidth=1.0))


def short(text: str, length: int = 24) -> str:
    """The end of a long name, for titles."""
    return text if len(text) <= length else "…" + text[1 - length :]
