"""What a sweep leaves to read: mean, spread and a paired test of each row, as Markdown and CSV, and a plot."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files import atomic, write_text
from ..train.loop import METRICS, read_metrics
from ..train.network import network_label
from ..train.report import mebibytes, millions, training_seconds
from .costs import Cost
from .spec import Row, Sweep

TABLE, TABLE_CSV, RUNS_CSV, PLOT = "table.md", "table.csv", "runs.csv", "plot.png"


@dataclass(frozen=True)
class Run:
    """A finished run: test accuracy in % after each epoch, and the training time up to there (s, as measured)."""

    seed: int
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        runs: the finished ones.
        against: the row it is compared with, "" for the first.
        difference, p_value: mean over the seeds that both have, and the paired t test's p; None with too few of them.
        at_equal_time: accuracy in % of each run at the time of the shortest row.
    """

    row: Row
    cost: Cost
    runs: tuple[Run, ...]
    against: str
    difference: float | None
    p_value: float | None
    at_equal_time: tuple[float, ...]

    @property
    def final(self) -> list[float]:
        return [run.accuracy[-1] for run in self.runs]


def write(sweep: Sweep, folder: Path, costs: Mapping[str, Cost], states: Mapping[str, tuple[str, str]]) -> None:
    """Write table.md, table.csv, runs.csv and plot.png from the runs that are done."""
    done = {row.name: read_runs(sweep, row, folder, costs[row.name], states) for row in sweep.rows}
    lines = make_lines(sweep, done, costs)
    write_text(folder / TABLE, markdown(lines, sweep))
    write_text(folder / TABLE_CSV, as_csv([flat(line) for line in lines]))
    runs = [(line, run) for line in lines for run in line.runs]
    write_text(
        folder / RUNS_CSV,
        as_csv(
            [
                {"row": line.row.name, "seed": run.seed, "epochs": len(run.accuracy), "test_top1": run.accuracy[-1]}
                for line, run in runs
            ]
        ),
    )
    plot(folder / PLOT, lines)


def read_runs(
    sweep: Sweep, row: Row, folder: Path, cost: Cost, states: Mapping[str, tuple[str, str]]
) -> tuple[Run, ...]:
    """The finished runs of a row. Their time is images trained over the row's measured speed: the clock of a run also
    shows what else the machine did."""
    runs = []
    for cell in sweep.cells():
        if cell.row != row.name or states[cell.key][0] != "done":
            continue
        rows = read_metrics(folder / cell.key / network_label(row.config) / METRICS)
        seconds = training_seconds(rows, cost["train_images_per_second"])
        runs.append(Run(cell.seed, tuple(each["test_top1"] for each in rows), tuple(seconds)))
    return tuple(runs)


def make_lines(sweep: Sweep, done: Mapping[str, Sequence[Run]], costs: Mapping[str, Cost]) -> list[Line]:
    """The table's rows that have a finished run."""
    totals = [run.seconds[-1] for runs in done.values() for run in runs]
    lines = []
    for place, row in enumerate(sweep.rows):
        runs = tuple(done[row.name])
        against = row.against or (sweep.rows[0].name if place else "")
        difference, p_value = paired_t(runs, done[against]) if against else (None, None)
        equal = tuple(accuracy_at(run, min(totals)) for run in runs)
        if runs:
            lines.append(Line(row, costs[row.name], runs, against, difference, p_value, equal))
    return lines


def paired_t(runs: Sequence[Run], others: Sequence[Run]) -> tuple[float | None, float | None]:
    """Mean difference of the last accuracies over the seeds of both, and the p of Student's paired t test.

    The p is None with fewer than two such seeds, or where all differences are equal.
    """
    from scipy.stats import ttest_rel

    theirs = {run.seed: run.accuracy[-1] for run in others}
    pairs = [(run.accuracy[-1], theirs[run.seed]) for run in runs if run.seed in theirs]
    if not pairs:
        return None, None
    mine, other = zip(*pairs, strict=True)
    difference = statistics.mean(mine) - statistics.mean(other)
    if len(pairs) < 2 or len({round(a - b, 9) for a, b in pairs}) == 1:
        return difference, None
    return difference, float(ttest_rel(mine, other).pvalue)


def accuracy_at(run: Run, seconds: float) -> float:
    """Accuracy in % after so much training, on the line between two epochs; a network begins with none."""
    return float(np.interp(seconds, (0.0, *run.seconds), (0.0, *run.accuracy)))


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, as text."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def flat(line: Line) -> dict[str, Any]:
    """A row for the CSV file."""
    final = line.final
    return {
        "row": line.row.name,
        "lr": line.row.config.lr,
        "n": len(final),
        "mean": statistics.mean(final),
        "sd": statistics.stdev(final) if len(final) > 1 else math.nan,
        "against": line.against,
        "difference": line.difference,
        "p": line.p_value,
        "epochs": len(line.runs[0].accuracy),
        "train_seconds": line.runs[0].seconds[-1],
        "mean_at_equal_time": statistics.mean(line.at_equal_time),
        **line.cost,
        "channels": " ".join(map(str, line.row.config.channels)),
        "published": line.row.published,
    }


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(lines: Sequence[Line], sweep: Sweep) -> str:
    """The table with what its figures are."""
    published = any(line.row.published for line in lines)
    heads = ["row", "lr", "n", "accuracy, %", "difference", "p", "epochs", "time, s", "at equal time, %"]
    heads += ["parameters", "MACs", "train, images/s", "memory", *(["published"] if published else [])]
    text = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    text += ["| " + " | ".join(cells(line, published)) + " |" for line in lines]
    return "\n".join([*text, "", footnote(lines, sweep), ""])


def cells(line: Line, published: bool) -> list[str]:
    """A row as text."""
    first = line.difference is None
    other = f" ({line.against})" if line.row.against else ""
    return [
        line.row.name + (f" ({' '.join(map(str, line.row.config.channels))} wide)" if line.row.same_budget_as else ""),
        f"{line.row.config.lr:g}",
        str(len(line.runs)),
        spread(line.final),
        "" if first else f"{line.difference:+.2f}{other}",
        "" if line.p_value is None else f"{line.p_value:.2g}",
        str(len(line.runs[0].accuracy)),
        f"{line.runs[0].seconds[-1]:,.0f}",
        spread(line.at_equal_time),
        f"{line.cost['parameters']:,}",
        millions(line.cost["multiply_adds"]),
        f"{line.cost['train_images_per_second']:,.0f}",
        mebibytes(line.cost["peak_bytes"]),
        *([line.row.published] if published else []),
    ]


def footnote(lines: Sequence[Line], sweep: Sweep) -> str:
    """What the figures are, and how little a test over few seeds can see."""
    tests = sum(line.p_value is not None for line in lines)
    least = min(len(line.runs) for line in lines)
    shortest = min(run.seconds[-1] for line in lines for run in line.runs)
    few = (
        f" With so few seeds (n = {least}) only differences that are large and alike on every seed give a small p."
        if least < 6
        else ""
    )
    rates = (
        f" The learning rate of each row is the best of {', '.join(f'{lr:g}' for lr in sweep.tune.lr)} on "
        f"{sweep.tune.validation:,} validation images, held out from training, with seed {sweep.seeds[0]}."
        if sweep.tune is not None
        else ""
    )
    return (
        "Test accuracy after the last epoch, mean ± standard deviation over n seeds. Difference to "
        f"{sweep.rows[0].name} unless another row is named, over the seeds that both have; p is that of Student's "
        f"paired t test over these seeds, two-sided, not corrected for the {tests} tests made.{few} Time: the images "
        "trained over the training speed, which is measured for all rows in turn (on a CPU by the time of the "
        f"process). At equal time: the accuracy after {shortest:,.0f} s, the time of the shortest row, on the line "
        "between two epochs; a learning rate that has not come to its end there holds it down. Memory of one training "
        f"step with its batch.{rates}"
    )


def plot(path: Path, lines: Sequence[Line]) -> None:
    """Accuracy against training time, mean and standard deviation, and last accuracy against memory, as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    over_time, over_memory = figure.subplots(1, 2)
    colours = matplotlib.color_sequences["tab20"]
    for place, line in enumerate(lines):
        colour = colours[place % len(colours)]
        seconds = line.runs[0].seconds
        values = np.asarray([run.accuracy for run in line.runs])
        mean, sd = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        over_time.plot(seconds, mean, color=colour, marker=".", label=line.row.name)
        over_time.fill_between(seconds, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        memory = line.cost["peak_bytes"] / 2**20
        over_memory.errorbar(memory, mean[-1], yerr=sd[-1], color=colour, marker="o", capsize=3)
        over_memory.annotate(line.row.name, (memory, mean[-1]), textcoords="offset points", xytext=(6, 3), fontsize=7)
    over_time.set(xlabel="training time at the measured speed, s", ylabel="test accuracy, %")
    over_memory.set(xlabel="memory of a training step, MiB", ylabel="test accuracy after the last epoch, %")
    for axes in (over_time, over_memory):
        axes.grid(alpha=0.3)
    over_time.legend(fontsize=8)
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
