"""What a run leaves to read: the table, the curves, and a sentence that says which network won."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files import atomic

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]

# Column of the table: key in a row, heading, and how its figure is written.
COLUMNS = (
    ("network", "network", "{}"),
    ("test_top1", "accuracy, %", "{:.2f}"),
    ("parameters", "parameters", "{:,}"),
    ("multiply_adds", "MACs", "{}"),
    ("train_images_per_second", "train, images/s", "{:,.0f}"),
    ("infer_images_per_second", "infer, images/s", "{:,.0f}"),
    ("peak_bytes", "memory", "{}"),
)


def row(label: str, history: Sequence[Mapping[str, Any]], costs: Mapping[str, Any]) -> Row:
    """A network's row: figures of its last epoch, its median training speed, and what it costs.

    The first epoch's speed is left out where there are more, for it includes every one-time cost.
    """
    speeds = [h["train_images_per_second"] for h in history]
    return {
        "network": label,
        "epochs": history[-1]["epoch"],
        "test_top1": history[-1]["test_top1"],
        "test_top5": history[-1].get("test_top5"),
        "test_loss": history[-1]["test_loss"],
        "train_loss": history[-1]["train_loss"],
        "train_images_per_second": statistics.median(speeds[1:] or speeds),
        **costs,
    }


def cells(row: Row) -> list[str]:
    """A row as text, column by column."""
    readable = row | {"multiply_adds": millions(row["multiply_adds"]), "peak_bytes": mebibytes(row["peak_bytes"])}
    return [form.format(readable[key]) for key, _, form in COLUMNS]


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def mebibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def data_note(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How much of the training time went to waiting for images, and how many of them were broken."""
    shares = [statistics.median(h["train_data_wait_share"] for h in history) for history in histories.values()]
    broken = max(h.get("broken_images", 0) for history in histories.values() for h in history)
    note = f"Training waited for data during {max(shares):.1%} of the time (median of the epochs"
    note += ", the network that waited most)." if len(shares) > 1 else ")."
    return note + (f" {broken:,} broken image{'s were' if broken > 1 else ' was'} left out." if broken else "")


def footnote(device: torch.device, batch_size: int, test_images: int) -> str:
    """What the figures of the table are, in a sentence or two."""
    memory = (
        "highest sum of PyTorch's own allocations in one training step, weights, gradients and optimizer included"
        if device.type == "cpu"
        else "highest memory of the CUDA allocator in one training step, weights, gradients and optimizer included"
    )
    return (
        f"Accuracy on {test_images:,} test images after the last epoch. MACs for one image. Training speed is the "
        f"median of the run's epochs; inference speed is timed with the networks in turn. Memory: {memory}, "
        f"batch {batch_size}."
    )


def markdown(rows: Sequence[Row], note: str, verdict: str | None) -> str:
    """The table for a README."""
    lines = ["| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", note, *(["", verdict] if verdict else []), ""])


def rich_table(rows: Sequence[Row]) -> "Table":
    """The table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for key, heading, _ in COLUMNS:
        left = key == "network"
        table.add_column(heading.replace(", ", "\n"), justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def curves(path: Path, histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Loss and accuracy by epoch as a PNG: training dashed, test solid, a colour for each network."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
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
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def paired(first: Tensor, second: Tensor, labels: Tensor) -> dict[str, Any]:
    """Two networks on the same test images: counts, and McNemar's exact test of whether they differ.

    Args:
        first, second: predicted classes, (N,).
        labels: true classes, (N,).

    Returns:
        images, only_first (right by the first alone), only_second, p_value.
    """
    from scipy.stats import binomtest

    first_right, second_right = first == labels, second == labels
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    differing = only_first + only_second
    p_value = binomtest(only_first, differing, 0.5).pvalue if differing else 1.0
    return {"images": len(labels), "only_first": only_first, "only_second": only_second, "p_value": float(p_value)}


def full_name(label: str) -> str:
    """A network's label with what it is."""
    return f"the host ({label})" if label == "identity" else f"the DSNet ({label})"


def verdict(rows: Sequence[Row], pairs: Mapping[str, Any]) -> str:
    """Which of two networks won, by how much, and whether chance alone gives such a difference.

    Args:
        rows: the two rows of the table.
        pairs: what `paired` gave for them in this order.
    """
    names = [full_name(row["network"]) for row in rows]
    accuracies = [row["test_top1"] for row in rows]
    only = [pairs["only_first"], pairs["only_second"]]
    images = f"{pairs['images']:,} test images"
    if only[0] == only[1]:
        return f"A draw: {names[0]} and {names[1]} both have {accuracies[0]:.2f} % of {images} right."
    best, other = (0, 1) if only[0] > only[1] else (1, 0)
    p_value = pairs["p_value"]
    chance = (
        f"a difference that chance gives too easily to call (McNemar's exact p = {p_value:.2f}; below 0.05 would count)"
        if p_value >= 0.05
        else f"more than chance gives on these images (McNemar's exact p = {p_value:.2g}), on this one seed"
    )
    return (
        f"T{names[best][1:]} won by {accuracies[best] - accuracies[other]:.2f} points: {accuracies[best]:.2f} % "
        f"against {accuracies[other]:.2f} % of {names[other]} on {images}. {only[best]} of them only the winner got "
        f"right, {only[other]} only the other: {chance}."
    )
