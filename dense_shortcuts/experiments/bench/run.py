"""`dsnet bench`: measures what a configuration asks for and leaves a folder with the figures."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import DenseShortcutError
from ...extras import need
from ..environment import machine
from . import report
from .config import BenchConfig
from .figures import growths
from .goals import outcomes
from .measure import Result, compare
from .models import comparisons

if TYPE_CHECKING:
    from rich.console import Console

RESULTS, TABLES, PLOT = "results.json", "tables.md", "plot.png"


def bench(config: BenchConfig, command: str) -> Path:
    """Measure, print and write the figures; gives their folder. What is finished is written at once.

    Args:
        config: what to measure.
        command: the command line, to be written beside the figures.

    Raises:
        DenseShortcutError: bad input of any kind, or a folder that exists.
    """
    need("`dsnet bench`", "train")
    from rich.console import Console

    device = choose_device(config)
    config = config.resolved(device.type)
    planned, refusals = comparisons(config, device.type)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = make_folder(config.output)
    about = {"command": command, **machine(), "device_type": device.type, "refused_backends": refusals}

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # so that a log keeps whole rows
    console.print(heading(config, about, folder), highlight=False, soft_wrap=True)
    for refusal in refusals.values():
        console.print(f"left out: {refusal}", highlight=False, soft_wrap=True)
    results: list[Result] = []
    for mode in config.modes:
        for size in config.image_size:
            for comparison in planned:
                with console.status("") as status:

                    def tell(line: str, status: Any = status, what: str = f"{comparison.label}, {mode}") -> None:
                        status.update(f"{what}: {line}")

                    results.append(compare(comparison, mode, size, config, device, tell))
                show(results[-1], device, console)
                write(folder, config, about, results)
    for name, cells in closing_tables(config, about, results).items():
        console.print(report.rich_table(cells, name))
    console.print(f"figures, tables and plot: {folder}", highlight=False, soft_wrap=True)
    return folder


def choose_device(config: BenchConfig) -> torch.device:
    """CUDA where there is one, unless asked otherwise.

    Raises:
        DenseShortcutError: CUDA is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DenseShortcutError("--device cuda: PyTorch finds no CUDA device here; take --device cpu.")
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def make_folder(output: Path | None) -> Path:
    """Make the folder for the figures; one that exists is refused and left alone."""
    folder = output or Path("runs") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise DenseShortcutError(f"{folder} exists already: choose another --output.") from None
    except OSError as error:
        raise DenseShortcutError(f"cannot make {folder} ({error.strerror}): choose another --output.") from error
    return folder


def heading(config: BenchConfig, about: dict[str, Any], folder: Path) -> str:
    """A benchmark's first lines."""
    where = about["device"] if config.device == "cuda" else f"{about['processor']}, {about['threads']} threads"
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "torchvision", "timm"))
    precision = "float32" if config.precision == "no" else f"{config.precision} autocast"
    folded = ", norms folded" if config.folded else ""
    heap = "" if config.keep_heap or config.device == "cuda" else ", heap given back"
    return f"{where}; {versions}; {precision}, channels_last{folded}{heap}, {config.rounds} rounds\nfolder: {folder}"


def closing_tables(config: BenchConfig, about: dict[str, Any], results: Sequence[Result]) -> dict[str, report.Cells]:
    """What all results together say: growth with depth in a sweep, else the goals."""
    if config.depths:
        return report.growth_tables(growths(results))
    return {"goals": report.goal_cells(outcomes(results, config, about["device"], about["threads"]))}


def show(result: Result, device: torch.device, console: "Console") -> None:
    """A comparison's tables, and what was left out of it."""
    console.print(report.rich_table(report.speed_cells(result), report.title(result)))
    console.print(report.rich_table(report.cost_cells(result, device.type), ""))
    for name, reason in result.left_out.items():
        console.print(f"left out: {name} ({reason})", highlight=False, soft_wrap=True)


def write(folder: Path, config: BenchConfig, about: dict[str, Any], results: Sequence[Result]) -> None:
    """Write JSON, tables and plot of what is measured so far."""
    grown = growths(results)
    goals = outcomes(results, config, about["device"], about["threads"]) if not config.depths else []
    figures = {
        **about,
        "settings": dataclasses.asdict(config),
        "comparisons": [report.as_json(result) for result in results],
        "growth": [growth._asdict() for growth in grown],
        "goals": [dataclasses.asdict(goal) for goal in goals],
    }
    (folder / RESULTS).write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    parts = [f"`{about['command']}`, {about['started'][:10]}\n\n{heading(config, about, folder)}\n"]
    for result in results:
        left_out = [f"- left out: {name} ({reason})\n" for name, reason in result.left_out.items()]
        tables = [report.speed_cells(result), report.cost_cells(result, str(config.device))]
        parts += [f"## {report.title(result)}\n", *map(report.markdown, tables), *left_out]
    for name, cells in closing_tables(config, about, results).items():
        parts += [f"## {name}\n", report.markdown(cells)]
    (folder / TABLES).write_text("\n".join(parts), encoding="utf-8")
    report.plot(folder / PLOT, results, grown)
