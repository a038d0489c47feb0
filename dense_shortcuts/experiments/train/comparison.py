"""A comparison of networks: which ones, on which seeds, and the table, the verdict and the picture that it leaves."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import DenseShortcutError
from ...files import atomic
from .config import TrainConfig
from .network import densenet_twin, twin
from .report import History, Row, draw_curves, training_seconds

TITLES = {"host": "host", "dsnet": "DSNet", "densenet": "DenseNet"}
TRAIN_SPEED = "train_images_per_second"
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

    def ratios(cost: Callable[[Row], float]) -> str:
        found = {TITLES[name]: cost(rows[name]) / cost(rows[first]) for name in others}
        return " and ".join(f"{ratio:.2f}x in the {title}" for title, ratio in found.items())

    return [
        f"Accuracy: {gaps}.",
        f"Time, against the {TITLES[first]}: a training step takes {ratios(lambda row: 1 / row[TRAIN_SPEED])}, "
        f"inference {ratios(lambda row: 1 / row['infer_images_per_second'])}.",
        f"Memory of a training step, against the {TITLES[first]}: {ratios(lambda row: row['peak_bytes'])}.",
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

    means = {TITLES[name]: mean_history(runs) for name, runs in histories.items()}
    figure = Figure(figsize=(11, 8), layout="constrained")
    (over_time, over_memory), panels = figure.subplots(2, 2)
    for colour, (name, row) in zip(matplotlib.color_sequences["tab10"], rows.items(), strict=False):
        title = TITLES[name]
        seconds = training_seconds(histories[name][0], row[TRAIN_SPEED])
        over_time.plot(seconds, [each["test_top1"] for each in means[title]], ".-", color=colour, label=title)
        memory, accuracy = row["peak_bytes"] / 2**20, row["test_top1"]
        over_memory.errorbar(memory, accuracy, yerr=row["interval"], color=colour, marker="o", capsize=3)
        over_memory.annotate(title, (memory, accuracy), textcoords="offset points", xytext=(8, 4))
    over_time.set(xlabel="training time, s", ylabel="test accuracy, %")
    over_time.legend()
    over_memory.set(xlabel="memory of a training step, MiB", ylabel="test accuracy at the end, %")
    over_memory.margins(x=0.25)
    for axes in (over_time, over_memory):
        axes.grid(alpha=0.3)
    draw_curves(panels, means)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def mean_history(runs: Sequence[History]) -> History:
    """Epochs with the means over the seeds of what is drawn by epoch."""
    keys = ("epoch", "train_loss", "test_loss", "train_top1", "test_top1")
    return [{key: statistics.mean(each[key] for each in epoch) for key in keys} for epoch in zip(*runs, strict=True)]
