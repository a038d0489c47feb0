"""Charts as HTML and SVG: nothing is loaded for them, they tell their numbers on hovering and fit a narrow screen."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

from ..explain.shortcuts import Shortcuts, course, told, two_digits
from ..weight_log import Rows

CSS = """
.ds-grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 100%), 1fr)); gap: 1rem; }
.ds-grid.wide { grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); }
.ds-card ul { display: flex; flex-wrap: wrap; gap: .15rem .9rem; list-style: none; margin: .25rem 0 .5rem; padding: 0;
  font-size: .85rem; }
.ds-card li span { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.ds-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .75rem; margin-bottom: 1rem;
  background: var(--block-background-fill); color: var(--body-text-color); }
.ds-card h3 { margin: 0 0 .25rem; font-size: 1.05rem; }
.ds-card figure { margin: 0; }
.ds-card figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .25rem; }
.ds-card svg { width: 100%; height: auto; display: block; max-height: 20rem; }
.ds-card svg text { font-family: system-ui, sans-serif; fill: currentColor; }
.ds-card rect:hover, .ds-card circle:hover { stroke: var(--body-text-color); stroke-width: 1.5; }
.ds-scroll { overflow-x: auto; }
.ds-card table { border: 0; border-collapse: collapse; width: 100%; font-size: .9rem; }
.ds-card .ds-scroll tr { border: 0; }
.ds-card .ds-scroll :is(th, td) { text-align: right; padding: .25rem .5rem; border: 0;
  border-top: 1px solid var(--border-color-primary); }
.ds-card .ds-scroll :is(th, td):first-child { text-align: left; }
.ds-bar { display: block; height: .45rem; border-radius: 2px; background: #1f6feb; margin-left: auto; }
.ds-bar.memory { background: #b35900; }
.ds-note { margin: 0 0 .5rem; font-size: .9rem; }
.ds-error { border: 2px solid #b42318; border-radius: 8px; padding: .6rem .8rem; font-weight: 600;
  background: #fef3f2; color: #7a1610; }
.pixels img { object-fit: contain; width: 100%; height: 100%; }
"""

LINES = ("#1f6feb", "#b35900", "#1a7f37", "#8250df", "#bf3989", "#57606a")


def error(message: str) -> str:
    """A message that screen readers speak at once."""
    return f'<div class="ds-error" role="alert">{escape(message[:1].upper() + message[1:])}</div>'


def shortcut_maps(found: Shortcuts) -> str:
    """A card for each stage: heat maps of mean |w|, spread and change, the course in training, and all as a table."""
    cards = []
    for stage in found.stages:
        figures = [
            heat_map(stage.mean_abs, "mean |w|", "viridis"),
            heat_map(stage.spread, "spread over channels", "viridis"),
            heat_map(stage.change, "change of mean |w|", "RdBu_r"),
        ]
        if stage.history:
            figures.append(lines({distances(d): v for d, v in course(stage).items()}, "mean |w| by epoch"))
        about = told(stage).removeprefix(f"{stage.name}: ")
        cards.append(
            f'<section class="ds-card"><h3>{escape(stage.name)}</h3><p class="ds-note">{escape(about)}.</p>'
            f'<div class="ds-grid">{"".join(figures)}</div>'
            f"<details><summary>Numbers</summary>{pair_table(stage.mean_abs, stage.spread, stage.change)}</details>"
            "</section>"
        )
    return "".join(cards)


def distances(back: int) -> str:
    """What the page calls the maps that lie so many blocks back."""
    return "nearest map" if back == 1 else f"{back} back"


def heat_map(rows: Rows, title: str, colours: str) -> str:
    """A heat map of pairs: block l downwards, map i to the right; each cell says its number."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    depth = len(rows)
    greatest = max((abs(value) for row in rows for value in row if value is not None), default=0.0) or 1.0
    cell, edge = 100 / depth, 14
    parts = [f'<svg viewBox="0 0 {100 + edge} {100 + edge}" role="img" aria-label="{escape(title)}">']
    for k, row in enumerate(rows):
        for i, value in enumerate(row):
            if value is None:
                continue
            share = (value / greatest + 1) / 2 if colours == "RdBu_r" else value / greatest
            red, green, blue, _ = colour = colormaps[colours](share)
            x, y = edge + i * cell, k * cell
            says = f"block {k + 1} from map X_{i}: {title} {value:.4g}"
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell:.2f}" height="{cell:.2f}" fill="{to_hex(colour)}">'
                f"<title>{escape(says)}</title></rect>"
            )
            if depth <= 6:
                ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#000"
                parts.append(
                    f'<text x="{x + cell / 2:.2f}" y="{y + cell / 2 + 2:.2f}" text-anchor="middle" font-size="6" '
                    f'style="fill:{ink};pointer-events:none">{two_digits(value)}</text>'
                )
    step = max(1, depth // 6)
    for k in range(0, depth, step):
        middle = (k + 0.5) * cell
        parts.append(f'<text x="{edge - 2}" y="{middle + 2:.2f}" text-anchor="end" font-size="5.5">{k + 1}</text>')
        parts.append(f'<text x="{edge + middle:.2f}" y="106" text-anchor="middle" font-size="5.5">{k}</text>')
    parts.append(f'<text x="{edge + 50}" y="113" text-anchor="middle" font-size="5.5">earlier map i</text>')
    parts.append(
        '<text x="-50" y="5" text-anchor="middle" font-size="5.5" transform="rotate(-90)">block l</text></svg>'
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def lines(series: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Lines by epoch with a legend below that wraps on a narrow screen; each point says its number."""
    points = [point for values in series.values() for point in values]
    first, last = min(epoch for epoch, _ in points), max(epoch for epoch, _ in points)
    top = round_top(max(value for _, value in points))
    width = max(1, last - first)
    parts = [f'<svg viewBox="0 0 154 104" role="img" aria-label="{escape(title)}">']
    for mark in (0.0, top / 4, top / 2, 3 * top / 4, top):
        y = 88 - 82 * mark / top
        parts.append(f'<line x1="18" x2="150" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-opacity=".2"/>')
        parts.append(f'<text x="16" y="{y + 2:.1f}" text-anchor="end" font-size="5.5">{mark:.3g}</text>')
    for epoch in sorted({first, first + width // 2, last}):
        x = 20 + 128 * (epoch - first) / width
        parts.append(f'<text x="{x:.1f}" y="96" text-anchor="middle" font-size="5.5">{epoch}</text>')
    parts.append('<text x="84" y="103" text-anchor="middle" font-size="5.5">epoch</text>')
    for colour, (name, values) in zip(cycle(LINES), series.items(), strict=False):
        path = [(20 + 128 * (epoch - first) / width, 88 - 82 * value / top) for epoch, value in values]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1"/>')
        for (x, y), (epoch, value) in zip(path, values, strict=True):
            says = escape(f"{name}, epoch {epoch}: {value:.4g}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.4" fill="{colour}"><title>{says}</title></circle>')
    parts.append("</svg>")
    legend = "".join(
        f'<li><span style="background:{colour}"></span>{escape(name)}</li>'
        for colour, name in zip(cycle(LINES), series, strict=False)
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}<ul>{legend}</ul></figure>"


def round_top(value: float) -> float:
    """The least of 1, 2, 4, 5, 8 or 10 times a power of ten that is not below a value; 1 for nothing above 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((n * power for n in (1, 2, 4, 5, 8) if n * power >= value), 10 * power)


def run_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Accuracy and loss by epoch of networks, by name, and their last figures as a table."""
    kinds = {"test_top1": "test accuracy, %", "test_loss": "test loss", "train_loss": "training loss"}
    figures = [
        lines({name: [(row["epoch"], row[key]) for row in rows] for name, rows in histories.items()}, title)
        for key, title in kinds.items()
    ]
    last = [
        [name, str(rows[-1]["epoch"]), *(f"{rows[-1][key]:.3f}" for key in kinds)] for name, rows in histories.items()
    ]
    return (
        f'<section class="ds-card"><div class="ds-grid wide">{"".join(figures)}</div>'
        f"{html_table(['network', 'epochs', *kinds.values()], last)}</section>"
    )


def pair_table(mean_abs: Rows, spread: Rows, change: Rows) -> str:
    """Every pair in a row, for those who do not hover."""
    cells = [
        [str(k + 1), f"X_{i}", *(f"{figure:.4f}" for figure in figures)]
        for k, rows in enumerate(zip(mean_abs, spread, change, strict=True))
        for i, figures in enumerate(zip(*rows, strict=True))
        if None not in figures
    ]
    return html_table(["block l", "map i", "mean |w|", "spread", "change"], cells)


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are text."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f'<div class="ds-scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def benchmark(comparison: dict[str, Any]) -> str:
    """A comparison of `dsnet bench`: bars of speed and memory over the peer's, with the spread of the rounds."""
    shape = "x".join(map(str, comparison["shape"]))
    heads = ("network", "training step", "inference", "memory")
    rows = []
    for row in comparison["rows"]:
        speeds = [row["speed_ratio"].get(what) for what in ("train", "infer")]
        most = [_speed(speed) for speed in speeds]
        rows.append(f"<tr><td>{escape(row['name'])}</td>{''.join(most)}{_memory(row['memory_ratio'])}</tr>")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f'<section class="ds-card"><h3>{escape(comparison["label"])}, {escape(comparison["mode"])}</h3>'
        f'<p class="ds-note">Input {shape}. Over {escape(comparison["peer"])}: speed, longer is faster; memory, '
        "shorter is less. The medians of the rounds, with the least and the greatest.</p>"
        f'<div class="ds-scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</section>"
    )


def _speed(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return "<td>-</td>"
    text = f"{ratio['median']:.2f}x <small>({ratio['least']:.2f} to {ratio['most']:.2f})</small>"
    return f"<td>{text}{_bar(ratio['median'])}</td>"


def _memory(ratio: float | None) -> str:
    return "<td>-</td>" if ratio is None else f"<td>{ratio:.2f}x{_bar(ratio, 'memory')}</td>"


def _bar(ratio: float, kind: str = "") -> str:
    """A bar; the peer's 1 is half of the cell's width."""
    return f'<span class="ds-bar {kind}" style="width:{min(100.0, 50 * ratio):.0f}%" aria-hidden="true"></span>'
