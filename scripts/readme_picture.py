"""The README's picture: ResNet, DenseNet and the dense shortcut as diagrams, and the weights that a stage learned.

    python scripts/readme_picture.py NETWORK [OUTPUT.png]

NETWORK is the folder of a trained DSNet, such as runs/NAME/stage-batch, whose first stage is drawn. Without OUTPUT.png
the picture goes to docs/screenshots.
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dense_shortcuts.experiments.explain.shortcuts import draw_heat, read_shortcuts

OUTPUT = Path(__file__).parents[1] / "docs" / "screenshots" / "dense-shortcut.png"
GREY, BLUE, ORANGE = "#4a4a4a", "#1f77b4", "#d95f02"
BLOCKS = 3
NEAREST = [(n, n + 1) for n in range(BLOCKS)]
ALL = [(i, n) for n in range(1, BLOCKS + 1) for i in range(n)]
DIAGRAMS = {
    "ResNet": ("adds the map before", NEAREST, GREY),
    "DenseNet": ("concatenates all earlier maps", ALL, BLUE),
    "Dense shortcut": ("adds w · N(map) of all earlier maps", ALL, ORANGE),
}


def diagram(axes: Any, title: str, says: str, arrows: list[tuple[int, int]], colour: str) -> None:
    """Maps X_0 .. X_3 from left to right with a block F between them, and the given arrows over them."""
    for n in range(BLOCKS + 1):
        axes.text(2 * n, 0, f"$X_{n}$", ha="center", va="center", fontsize=12)
        if n < BLOCKS:
            box = FancyBboxPatch((2 * n + 0.72, -0.24), 0.56, 0.48, boxstyle="round,pad=0.06", fc="white", ec=GREY)
            axes.add_patch(box)
            axes.text(2 * n + 1, 0, f"$F_{n + 1}$", ha="center", va="center", fontsize=10)
            axes.annotate("", (2 * n + 0.66, 0), (2 * n + 0.3, 0), arrowprops={"arrowstyle": "->", "color": GREY})
            axes.annotate("", (2 * n + 1.7, 0), (2 * n + 1.34, 0), arrowprops={"arrowstyle": "->", "color": GREY})
    for start, end in arrows:
        bend = -0.42 if end - start == 1 else -0.42 - 0.03 * (end - start)
        axes.add_patch(
            FancyArrowPatch(
                *((2 * start, 0.28), (2 * end, 0.28)),
                connectionstyle=f"arc3,rad={bend}",
                **{"arrowstyle": "-|>", "mutation_scale": 9, "color": colour, "linewidth": 1.6},
            )
        )
    axes.set(xlim=(-0.5, 2 * BLOCKS + 0.5), ylim=(-0.6, 1.9))
    axes.set_title(title, fontsize=13, fontweight="bold", color=colour)
    axes.text(BLOCKS, -0.75, says, ha="center", va="top", fontsize=10, color=GREY)
    axes.axis("off")


def main(checkpoint: str, output: Path) -> None:
    figure = Figure(figsize=(14, 3), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.8))
    for axes, (title, parts) in zip(panels, DIAGRAMS.items(), strict=False):
        diagram(axes, title, *parts)
    learned = read_shortcuts(checkpoint).stages[0].mean_abs
    draw_heat(figure, panels[-1], learned, "learned weights, mean |w|", "Oranges")
    panels[-1].spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(output)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else OUTPUT)
