"""What a benchmark leaves to read: tables for the terminal and for RESULTS.md, JSON, and a plot."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import Growth, images_per_second, memory_ratio, speed_ratio
from .goals import Outcome
from .measure import Result

if TYPE_CHECKING:
    from rich.table import Table

Cells = list[list[str]]

GROWTH_NAMES = {
    "train": ("extra time of a training step, ms", 1e3),
    "infer": ("extra time of inference, ms", 1e3),
    "bytes": ("bytes of a training step at the ends of blocks, MB", 1e-6),
    "least bytes": ("least bytes of a training step at the ends of blocks, MB", 1e-6),
}


def title(result: Result) -> str:
    """What was compared, on what input."""
    shape = "x".join(map(str, result.shape))
    return f"{result.label}, {result.mode}, input {shape}, ratios to {result.peer}"


def speed_cells(result: Result) -> Cells:
    """Speeds as a table, headings first; a ratio is the median of the rounds, then come the least and the greatest."""
    peer = result.rows[0]
    rows = []
    for row in result.rows:
        cells = [row.name]
        for what in ("train", "infer"):
            ratio = speed_ratio(row, peer, what)
            cells.append(_form(images_per_second(result, row, what), ",.1f"))
            cells += ["-", "-"] if ratio is None else [f"{ratio.median:.3f}", f"{ratio.least:.2f}-{ratio.most:.2f}"]
        rows.append(cells)
    return [["network", "train, images/s", "ratio", "rounds", "infer, images/s", "ratio", "rounds"], *rows]


def cost_cells(result: Result, device: str) -> Cells:
    """Memory, launches and traffic as a table, headings first."""
    launched = "kernels" if device == "cuda" else "operators"
    rows = []
    for row in result.rows:
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
        launches = "/".join(_form(row.launched.get(what), ",d") for what in ("train", "infer"))
        moved = row.shortcut_bytes or (None, None, None)
        megabytes = [None if b is None else b / 1e6 / result.shape[0] for b in moved]
        ratio = _form(memory_ratio(row, result.rows[0]), ".3f")
        rows.append([row.name, _form(peak, ",.0f"), ratio, launches, *(_form(b, ",.1f") for b in megabytes)])
    heads = [
        "network",
        "memory, MiB",
        "ratio",
        f"{launched}, train/infer",
        "ends of blocks, MB/image",
        "least",
        "untiled",
    ]
    return [heads, *rows]


def goal_cells(outcomes: Sequence[Outcome]) -> Cells:
    """The goals as a table, headings first: one row a goal, one column a norm."""
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        figure = "" if outcome.measured is None else f"{outcome.measured:.3f} {outcome.mode}, "
        rows.setdefault(outcome.goal, [outcome.goal, outcome.needed]).append(figure + outcome.verdict)
    return [["goal", "needed", *dict.fromkeys(outcome.norm for outcome in outcomes)], *rows.values()]


def growth_tables(growths: Sequence[Growth]) -> dict[str, Cells]:
    """A depth sweep as a table for each cost, headings first: the cost by depth and the exponent p of L^p."""
    depths = sorted({depth for growth in growths for depth in growth.by_depth})
    tables: dict[str, Cells] = {}
    for growth in growths:
        name, factor = GROWTH_NAMES[growth.what]
        costs = [growth.by_depth.get(depth) for depth in depths]
        figures = [_form(None if cost is None else cost * factor, ",.1f") for cost in costs]
        table = tables.setdefault(name, [["stage", *(f"L = {depth}" for depth in depths), "exponent"]])
        table.append([f"{growth.name}, {growth.mode}, {growth.size} px", *figures, _form(growth.exponent, ".2f")])
    return tables


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(cells: Cells) -> str:
    """A table for RESULTS.md."""
    heads, *rows = cells
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def rich_table(cells: Cells, heading: str) -> "Table":
    """A table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=heading, title_justify="left", title_style="bold")
    short_names = max(len(row[0]) for row in cells) <= 32
    for i, head in enumerate(cells[0]):
        own = {"justify": "right", "overflow": "fold"} if i else {"no_wrap": short_names}
        table.add_column(head.replace(", ", "\n"), **own)
    for row in cells[1:]:
        table.add_row(*row)
    return table


def as_json(result: Result) -> dict[str, Any]:
    """A result with its ratios beside the seconds of every round."""
    peer = result.rows[0]
    rows = []
    for row in result.rows:
        found = dataclasses.asdict(row)
        found["images_per_second"] = {what: images_per_second(result, row, what) for what in row.seconds}
        ratios = {what: speed_ratio(row, peer, what) for what in row.seconds}
        found["speed_ratio"] = {what: ratio._asdict() for what, ratio in ratios.items() if ratio is not None}
        found["memory_ratio"] = memory_ratio(row, peer)
        found["shortcut_bytes"] = row.shortcut_bytes._asdict() if row.shortcut_bytes is not None else None
        rows.append(found)
    return dataclasses.asdict(result) | {"rows": rows}


def plot(path: Path, results: Sequence[Result], growths: Sequence[Growth]) -> None:
    """The figures as a PNG: for a depth sweep the costs by depth, else ratios to the peer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if growths:
        figure = Figure(figsize=(13, 4.5), layout="constrained")
        plot_growths(figure, growths)
    else:
        height = sum(1.2 + 0.32 * len(result.rows) for result in results)
        figure = Figure(figsize=(13, height), layout="constrained")
        plot_ratios(figure, results)
    FigureCanvasAgg(figure).print_png(path)


def plot_ratios(figure: Any, results: Sequence[Result]) -> None:
    """A row of panels for each result: speed of training step and inference, memory; bars with the rounds' spread."""
    heights = [2 + len(result.rows) for result in results]
    panels = figure.subplots(len(results), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, result in zip(panels, results, strict=True):
        peer, names = result.rows[0], [row.name for row in result.rows]
        for axes, what in zip(line, ("train", "infer"), strict=False):
            found = [(row.name, speed_ratio(row, peer, what)) for row in result.rows]
            ratios = {name: ratio for name, ratio in found if ratio is not None}
            spread = [
                [r.median - r.least for r in ratios.values()],
                [r.most - r.median for r in ratios.values()],
            ]
            axes.barh(list(ratios), [r.median for r in ratios.values()], xerr=spread if ratios else None, capsize=2)
            axes.set_title({"train": "training step", "infer": "inference"}[what] + ", speed over peer's", fontsize=9)
        memory = [memory_ratio(row, peer) or 0.0 for row in result.rows]
        line[2].barh(names, memory, color="tab:orange")
        line[2].set_title("peak memory over peer's", fontsize=9)
        line[0].set_ylabel(f"{result.label}\n{result.mode}, {result.shape[2]} px", fontsize=9)
        for axes in line:
            axes.axvline(1.0, color="black", linewidth=0.8)
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
        for axes in line[1:]:
            axes.tick_params(labelleft=False)


def plot_growths(figure: Any, growths: Sequence[Growth]) -> None:
    """A panel for each cost, by depth, both logarithmic; a cost that is not above 0 has no place there."""
    kinds = list(dict.fromkeys(growth.what for growth in growths if growth.what != "least bytes"))
    for axes, what in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        name, factor = GROWTH_NAMES[what]
        for growth in growths:
            points = {depth: cost * factor for depth, cost in growth.by_depth.items() if cost > 0}
            if growth.what == what and points:
                power = "" if growth.exponent is None else f": L^{growth.exponent:.2f}"
                label = f"{growth.name}, {growth.mode}{power}"
                axes.plot(list(points), list(points.values()), marker=".", label=label)
        axes.set(xscale="log", yscale="log", xlabel="blocks L", title=name)
        axes.set_xticks(sorted({d for g in growths for d in g.by_depth}), labels=None)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
