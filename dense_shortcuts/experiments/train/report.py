"""What a run leaves to read: the table and the curves."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...files import atomic

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
History = Sequence[Mapping[str, Any]]  # the metrics of each epoch

# Column of the table: key in a row, heading, and how its figure is written.
COLUMNS = (
    ("name", "network", "{}"),
    ("accuracy", "accuracy, %", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("multiply_adds", "MACs", "{}"),
    ("train_images_per_second", "train, images/s", "{:,.0f}"),
    ("infer_images_per_second", "infer, images/s", "{:,.0f}"),
    ("peak_bytes", "memory", "{}"),
)


def row(name: str, label: str, histories: Sequence[History], test_images: int, costs: Mapping[str, Any]) -> Row:
    """A network's row, by its name in the table and its folder's: figures of its last epoch, means over the seeds, its
    median training speed, and what it costs.

    `interval` is half of the 95 % interval of the accuracy for so many test images. The first epoch's speed is left out
    where there are more, since it includes every one-time cost.
    """
    last = [history[-1] for history in histories]
    speeds = [h["train_images_per_second"] for history in histories for h in history[1:] or history]
    keys = [key for key in ("test_top1", "test_top5", "test_loss", "train_loss") if key in last[0]]
    figures = {key: statistics.mean(each[key] for each in last) for key in keys}
    right = figures["test_top1"] / 100
    return {
        "name": name,
        "network": label,
        "epochs": last[0]["epoch"],
        **figures,
        "test_top1_by_seed": [each["test_top1"] for each in last],
        "interval": 196 * (right * (1 - right) / test_images) ** 0.5,
        "train_images_per_second": statistics.median(speeds),
        **costs,
    }


def cells(row: Row) -> list[str]:
    """A row as text, column by column."""
    readable = row | {
        "accuracy": f"{row['test_top1']:.2f} ± {row['interval']:.2f}",
        "multiply_adds": millions(row["multiply_adds"]),
        "peak_bytes": mebibytes(row["peak_bytes"]),
    }
    return [form.format(readable[key]) for key, _, form in COLUMNS]


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def mebibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def data_note(histories: Sequence[History]) -> str:
    """How much of the training time went to waiting for images, and how many of them were broken."""
    shares = [statistics.median(h["train_data_wait_share"] for h in history) for history in histories]
    broken = max(h.get("broken_images", 0) for history in histories for h in history)
    note = f"Training waited for data during {max(shares):.1%} of the time (median of the epochs"
    note += ", the network that waited most)." if len(shares) > 1 else ")."
    return note + (f" {broken:,} broken image{'s were' if broken > 1 else ' was'} left out." if broken else "")


def footnote(device: torch.device, batch_size: int, test_images: int, seeds: int = 1) -> str:
    """What the figures of the table are, in a sentence or two."""
    memory = (
        "highest sum of PyTorch's own allocations in one training step, weights, gradients and optimizer included"
        if device.type == "cpu"
        else "highest memory of the CUDA allocator in one training step, weights, gradients and optimizer included"
    )
    means = f", mean of {seeds} seeds" if seeds > 1 else ""
    return (
        f"Accuracy on {test_images:,} test images after the last epoch{means}, ± its 95 % interval for so many images. "
        "MACs for one image. Training speed is the median of the run's epochs; inference speed is timed with the "
        f"networks in turn. Memory: {memory}, batch {batch_size}."
    )


def markdown(rows: Sequence[Row], note: str, verdict: Sequence[str] = ()) -> str:
    """The table for a README."""
    lines = ["| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", note, *(["", *(f"- {sentence}" for sentence in verdict)] if verdict else []), ""])


def rich_table(rows: Sequence[Row]) -> "Table":
    """The table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for key, heading, _ in COLUMNS:
        left = key == "name"
        table.add_column(heading.replace(", ", "\n"), justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def training_seconds(history: History, images_per_second: float) -> list[float]:
    """The training time (s) up to the end of each epoch at a given speed."""
    images = [round(each["train_images_per_second"] * each["train_seconds"]) for each in history]
    return [count / images_per_second for count in itertools.accumulate(images)]


def curves(path: Path, histories: Mapping[str, History]) -> None:
    """Loss and accuracy by epoch as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    draw_curves(figure.subplots(1, 2), histories)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def draw_curves(panels: Any, histories: Mapping[str, History]) -> None:
    """Loss and accuracy by epoch in two panels: training dashed, test solid, a colour for each network."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    headings = ("loss (of training: with smoothing, augmentation)", "accuracy, %")
    for axes, figure_name, heading in zip(panels, ("loss", "top1"), headings, strict=True):
        for colour, (label, history) in zip(matplotlib.color_sequences["tab10"], histories.items(), strict=False):
            epochs = [h["epoch"] for h in history]
            for part, style in (("train", "--"), ("test", "-")):
                values = [h[f"{part}_{figure_name}"] for h in history]
                axes.plot(epochs, values, style, color=colour, label=f"{label}, {part}", marker=".", markersize=4)
        axes.set(xlabel="epoch", ylabel=heading)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].legend()
