"""A comparison of networks: which ones, on which seeds, and the table, the verdict and the picture that it leaves."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DenseShortcutError
from ...files import atomic
from .config import TrainConfig
from .network import densenet_twin, twin
from .report import History, Row

TITLES = {"host": "host", "dsnet": "DSNet", "densenet": "DenseNet"}
LEVEL = 0.05  # of the p below which a difference counts


def compared_networks(config: TrainConfig, asked: Sequence[str], num_classes: int) -> dict[str, TrainConfig]:
    """The configurations to train by name, in the order of TITLES; without `asked` all that there can be.

    Raises:
        DenseShortcutError: fewer than two, or a DenseNet where there is none to compare with.
    """
    found = {"host": twin(config), "dsnet": config}
    if not asked or "densenet" in asked:
        densenet = densenet_twin(config, num_classes)
        if densenet is not None:
            found["densenet"] = densenet
        elif asked:
            raise DenseShortcutError(
                "a DenseNet has three to five stages and takes no weights of a host: leave it out of --networks."
            )
    chosen = {name: each for name, each in found.items() if not asked or name in asked}
    if len(chosen) < 2:
        raise DenseShortcutError("--networks must name two or all of host, dsnet and densenet.")
    return chosen


def paired(first: Tensor, second: Tensor, labels: Tensor) -> dict[str, Any]:
    """Two networks on the same test images, over seeds.

    Args:
        first, second: predicted classes, (seeds, N).
        labels: true classes, (N,).

    Returns:
        difference (points, second less first, the seeds' mean), by_seed, and p_value, of a t test over the images of
        the difference in how many seeds got each right. The test sees the luck of the images, not that of the seeds.
    """
    from scipy.stats import ttest_1samp

    gaps = (second == labels).double() - (first == labels).double()
    by_image = gaps.mean(0)
    p_value = float(ttest_1samp(by_image.numpy(), 0.0).pvalue) if by_image.any() else 1.0
    by_seed = [100 * gap for gap in gaps.mean(1).tolist()]
    return {"difference": 100 * float(by_image.mean()), "by_seed": by_seed, "p_value": p_value}


def verdict(rows: Mapping[str, Row], pairs: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """A sentence each on accuracy, time and memory.

    Args:
        rows: the table's rows by name, the one that the others are measured against first.
        pairs: what `paired` gave for each two of them.
    """
    first, *others = rows
    gaps = "; ".join(gap(*names, pair) for names, pair in pairs.items())

    def ratios(key: str, *, inverse: bool = False) -> str:
        found = [(rows[first][key] / rows[name][key]) ** (1 if inverse else -1) for name in others]
        return " and ".join(f"{ratio:.2f}x in the {TITLES[name]}" for ratio, name in zip(found, others, strict=True))

    return [
        f"Accuracy: {gaps}.",
        f"Time, against the {TITLES[first]}: a training step takes {ratios('train_images_per_second', inverse=True)}, "
        f"inference {ratios('infer_images_per_second', inverse=True)}.",
        f"Memory of a training step, against the {TITLES[first]}: {ratios('peak_bytes')}.",
    ]


def gap(first: str, second: str, pair: Mapping[str, Any]) -> str:
    """How far the second network is from the first, and whether that is more than chance."""
    points, p_value = pair["difference"], pair["p_value"]
    agree = len({by_seed > 0 for by_seed in pair["by_seed"]}) == 1
    seeds = f" on each of {len(pair['by_seed'])} seeds" if len(pair["by_seed"]) > 1 else ""
    if p_value >= LEVEL:
        why = f"within chance, p = {p_value:.2f}"
    elif not agree:
        why = f"within chance, the seeds disagree, p = {p_value:.1g}"
    else:
        why = f"p = {p_value:.1g}{seeds}"
    side = "above" if points > 0 else "below"
    return f"the {TITLES[second]} is {abs(points):.2f} points {side} the {TITLES[first]} ({why})"


def picture(path: Path, rows: Mapping[str, Row], histories: Mapping[str, Sequence[History]]) -> None:
    """Accuracy over training time and over memory, and loss and accuracy by epoch, as a PNG.

    Args:
        histories: the metrics of each network, for every seed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 8), layout="constrained")
    (over_time, over_memory), (losses, accuracies) = figure.subplots(2, 2)
    for colour, (name, row) in zip(matplotlib.color_sequences["tab10"], rows.items(), strict=False):
        runs = histories[name]
        epochs = [each["epoch"] for each in runs[0]]
        images = [each["train_images_per_second"] * each["train_seconds"] for each in runs[0]]
        seconds = torch.tensor(images).cumsum(0) / row["train_images_per_second"]
        for axes, key, style in (
            (over_time, "test_top1", ".-"),
            (losses, "train_loss", "--"),
            (losses, "test_loss", "-"),
            (accuracies, "train_top1", "--"),
            (accuracies, "test_top1", "-"),
        ):
            values = [
                statistics.mean(figures) for figures in zip(*([e[key] for e in run] for run in runs), strict=True)
            ]
            label = TITLES[name] if axes is over_time else f"{TITLES[name]}, {key.split('_')[0]}"
            axes.plot(seconds if axes is over_time else epochs, values, style, color=colour, label=label)
        spread = {"color": colour, "marker": "o", "capsize": 3}
        over_memory.errorbar(row["peak_bytes"] / 2**20, row["test_top1"], yerr=row["interval"], **spread)
        at = (row["peak_bytes"] / 2**20, row["test_top1"])
        over_memory.annotate(TITLES[name], at, textcoords="offset points", xytext=(8, 4))
    over_time.set(xlabel="training time, s", ylabel="test accuracy, %")
    over_memory.set(xlabel="memory of a training step, MiB", ylabel="test accuracy at the end, %")
    over_memory.margins(x=0.25)
    losses.set(xlabel="epoch", ylabel="loss (of training: with smoothing, augmentation)")
    accuracies.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (over_time, over_memory, losses, accuracies):
        axes.grid(alpha=0.3)
    over_time.legend()
    losses.legend(fontsize=8)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
