"""What share of a stage's input is left after each of its blocks at the start, by shortcut.

    python scripts/signal_plot.py [OUTPUT.png]

The stage is the first of a 56-layer network (nine blocks), whose residual branches start at zero, in training mode; the
images are 128 of Fashion-MNIST. The share is the squared cosine between X_l and X_0 of an image, mean over the images,
which is the part of the energy of X_l that is X_0 up to a factor. Without OUTPUT.png it goes to docs/screenshots.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.data import load_data

OUTPUT = Path(__file__).parents[1] / "docs" / "screenshots" / "signal.png"
SHORTCUTS: dict[str, dict[str, Any] | None] = {
    "identity (the host)": None,
    "group norm, nearest map": {"norm": "group", "init": "nearest"},
    "batch norm, nearest map": {"norm": "batch", "init": "nearest"},
    "batch norm, all maps alike": {"norm": "batch", "init": "uniform"},
    "batch norm without centring, nearest map": {"norm": "batch", "init": "nearest", "center": False},
    "layer norm without centring, nearest map": {"norm": "layer", "init": "nearest", "center": False},
}


def network(options: dict[str, Any] | None) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("dsnet56", num_classes=10, zero_init_last=True, **(options or {}))
    return (ds.unplug(model) if options is None else model).train()


@torch.no_grad()
def maps(model: Any, images: Tensor) -> list[Tensor]:
    """X_0, the input of the first stage, and X_l behind each of its blocks."""
    found: list[Tensor] = []
    for block in getattr(model.layer1, "blocks", model.layer1):
        block.register_forward_hook(lambda _, inputs, output: found.append(output))
    model.layer1.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model(images)
    return found


def shares(found: list[Tensor]) -> list[float]:
    """The squared cosine between each map and the first, mean over the images."""
    return [float(torch.cosine_similarity(x.flatten(1), found[0].flatten(1)).square().mean()) for x in found]


def main(output: Path) -> None:
    data = load_data(TrainConfig(data="fashion").resolved())
    images = torch.stack([data.test[(0, place)][0] for place in range(128)])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, options in SHORTCUTS.items():
        found = maps(network(options), images)
        left = shares(found)
        style = {"identity": ":", "without": "--"}
        dashes = next((dash for word, dash in style.items() if word in name), "-")
        axes.plot(range(len(left)), left, dashes, marker=".", label=name, linewidth=3 if dashes == ":" else 1.5)
        zeros = float((found[-1] == 0).float().mean())
        print(
            f"{name:42s} share after 1, 3, 6, 9 blocks {[round(left[i], 2) for i in (1, 3, 6, 9)]}, zeros {zeros:.2f}"
        )
    axes.set(xlabel="block l", ylabel="share of the energy of X_l that is X_0", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    FigureCanvasAgg(figure).print_png(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
