"""What a benchmark leaves to read: tables for the terminal and for RESULTS.md, and JSON."""

import dataclasses
from collections.abc import Sequence
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
    """The goals as a table, headings first."""
    rows = [[o.goal, o.needed, _form(o.measured, ".3f"), o.mode or "-", o.verdict] for o in outcomes]
    return [["goal", "needed", "measured", "mode", "verdict"], *rows]


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
