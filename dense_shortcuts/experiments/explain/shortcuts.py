"""`dsnet shortcuts`: for each stage heat maps of the weight of every pair (l, i), and how they came about."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import shipped
from ...errors import DenseShortcutError
from ...extras import need
from ...files import atomic, write_text
from ..weight_log import SHORTCUTS, Rows, Summary, read_record, start_summary, weight_summary
from .networks import read_network


@dataclass(frozen=True)
class Stage:
    """What a stage learned to look back at; each of Rows has a row for every block l = 1..L, a number for every map i,
    None where the block does not sum that map.

    Attributes:
        mean_abs: mean of |w_{l,i}| over the channels.
        spread: standard deviation of w_{l,i} over the channels.
        start: mean_abs before training.
        history: (epoch, mean_abs) of the epochs that the run recorded.
    """

    name: str
    mean_abs: Rows
    spread: Rows
    start: Rows
    history: tuple[tuple[int, Rows], ...]

    @property
    def change(self) -> Rows:
        """mean_abs less start."""
        return [
            [
                None if now is None or before is None else round(now - before, 6)
                for now, before in zip(*rows, strict=True)
            ]
            for rows in zip(self.mean_abs, self.start, strict=True)
        ]

    def pairs(self) -> list[tuple[int, int, float]]:
        """(l, i, mean_abs) of every pair that is summed."""
        return [
            (k + 1, i, value) for k, row in enumerate(self.mean_abs) for i, value in enumerate(row) if value is not None
        ]


@dataclass(frozen=True)
class Shortcuts:
    """The stages of a network, and DS2's |v| by block where it has such weights."""

    label: str
    stages: tuple[Stage, ...]
    inner: dict[str, dict[str, float]]


def shortcuts(checkpoint: str, output: Path, line: str) -> Path:
    """Draw a network's shortcut weights as a PNG at `output` and write them as JSON beside it; gives the JSON's path.

    Raises:
        DenseShortcutError: no such network, or one without shortcut weights.
    """
    need("`dsnet shortcuts`", "train")
    if output.suffix.lower() != ".png":
        raise DenseShortcutError(f"--output {output} must end in .png.")
    found = read_shortcuts(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(output, found)
    written = output.with_suffix(".json")
    write_text(written, json.dumps({"command": line, **as_json(found)}, indent=2) + "\n")
    for stage in found.stages:
        print(told(stage))
    print(f"heat maps: {output}, numbers: {written}")
    return written


def read_shortcuts(checkpoint: str) -> Shortcuts:
    """The shortcut weights of a run's folder or of a DSNet by name, with what the run recorded in training."""
    network = read_network(checkpoint)
    path = shipped.checkpoint(Path(checkpoint))
    folder = path if path.is_dir() else path.parent
    history = read_record(folder / SHORTCUTS) if network.trained else []
    now, start = weight_summary(network.model), start_summary(network.model)
    if not now["stages"]:
        raise DenseShortcutError(
            f"{checkpoint} has no shortcut weights to look at, or none that are the same for every image: give a DSNet."
        )
    stages = [
        Stage(name, rows["mean_abs"], rows["spread"], start["stages"][name]["mean_abs"], _history(name, history))
        for name, rows in now["stages"].items()
    ]
    return Shortcuts(checkpoint, tuple(stages), now["inner"])


def as_json(found: Shortcuts) -> dict[str, Any]:
    """Every number, by stage."""
    return {
        "network": found.label,
        "stages": {
            stage.name: {
                "mean_abs": stage.mean_abs,
                "spread": stage.spread,
                "start": stage.start,
                "change": stage.change,
                "history": [{"epoch": epoch, "mean_abs": rows} for epoch, rows in stage.history],
            }
            for stage in found.stages
        },
        "inner": found.inner,
    }


def told(stage: Stage) -> str:
    """A stage in a line: how much of the weight goes to the nearest map, to the stage's input and to the rest."""
    pairs = stage.pairs()
    total = sum(value for _, _, value in pairs)
    nearest = sum(value for block, i, value in pairs if i == block - 1)
    first = sum(value for block, i, value in pairs if i == 0 and block > 1)
    shares = [part / total if total else 0.0 for part in (nearest, first, total - nearest - first)]
    return (
        f"{stage.name}: {len(stage.mean_abs)} blocks, {len(pairs)} pairs; of the sum of mean |w| {shares[0]:.0%} is on "
        f"the nearest map, {shares[1]:.0%} on X_0 from later blocks, {shares[2]:.0%} on the maps between"
    )


def two_digits(value: float) -> str:
    """A number with two digits behind the point, and no sign before 0.00."""
    return f"{value:.2f}".replace("-0.00", "0.00")


def grid(rows: Rows) -> np.ndarray:
    """Rows of growing length as (L, L), with NaN where a block does not sum such a map."""
    square = np.full((len(rows), len(rows)), np.nan)
    for line, row in zip(square, rows, strict=True):
        line[: len(row)] = [np.nan if value is None else value for value in row]
    return square


def draw(path: Path, found: Shortcuts) -> None:
    """A PNG with a row for each stage: mean |w|, its spread, its change since the start, and its course by epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    recorded = any(stage.history for stage in found.stages)
    columns = 4 if recorded else 3
    figure = Figure(figsize=(3.6 * columns, 3.2 * len(found.stages)), layout="constrained")
    figure.suptitle(f"What {found.label} looks back at", fontsize=11)
    panels = figure.subplots(len(found.stages), columns, squeeze=False)
    for line, stage in zip(panels, found.stages, strict=True):
        draw_heat(figure, line[0], stage.mean_abs, f"{stage.name}: mean |w|", "viridis")
        draw_heat(figure, line[1], stage.spread, "spread over channels", "viridis")
        draw_heat(figure, line[2], stage.change, "change of mean |w| since the start", "RdBu_r")
        if recorded:
            draw_course(line[3], stage)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def draw_heat(figure: Any, axes: Any, rows: Rows, title: str, colours: str) -> None:
    """A heat map of pairs: block l downwards, map i to the right; numbers where there is room."""
    square = grid(rows)
    greatest = float(np.nanmax(np.abs(square))) or 1.0
    least = -greatest if colours == "RdBu_r" else 0.0
    image = axes.imshow(square, cmap=colours, vmin=least, vmax=greatest)
    figure.colorbar(image, ax=axes, fraction=0.046)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("earlier map i", fontsize=8)
    axes.set_ylabel("block l", fontsize=8)
    step = max(1, len(rows) // 8)
    axes.set_xticks(range(0, len(rows), step))
    axes.set_yticks(range(0, len(rows), step), [str(k + 1) for k in range(0, len(rows), step)])
    axes.tick_params(labelsize=8)
    if len(rows) > 8:
        return
    for k, row in enumerate(rows):
        for i, value in enumerate(row):
            if value is None:
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(i, k, two_digits(value), ha="center", va="center", fontsize=7, color="white" if dark else "black")


def draw_course(axes: Any, stage: Stage) -> None:
    """mean |w| by epoch, from the start on: a line for each distance l - i between block and map, as their mean."""
    for distance, values in course(stage).items():
        label = "nearest map" if distance == 1 else f"{distance} back"
        axes.plot(*zip(*values, strict=True), marker=".", markersize=4, label=label)
    axes.set_title("mean |w| by epoch", fontsize=9)
    axes.set_xlabel("epoch", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=1 + len(stage.mean_abs) // 9)


def course(stage: Stage) -> dict[int, list[tuple[int, float]]]:
    """(epoch, mean of mean |w| over the pairs) by the distance l - i; epoch 0 is the start."""
    by_distance: dict[int, list[tuple[int, int]]] = {}
    for block, i, _ in stage.pairs():
        by_distance.setdefault(block - i, []).append((block - 1, i))
    epochs = [(0, stage.start), *stage.history]
    return {
        distance: [(epoch, float(np.mean([rows[k][i] for k, i in pairs]))) for epoch, rows in epochs]
        for distance, pairs in sorted(by_distance.items())
    }


def _history(name: str, record: Sequence[Summary]) -> tuple[tuple[int, Rows], ...]:
    return tuple((row["epoch"], row["stages"][name]["mean_abs"]) for row in record)
