"""`dsnet bench`: measures what a configuration asks for and leaves a folder with the figures."""

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ...errors import DenseShortcutError
from ...extras import need
from ...ops.backend import kernels, unusable
from ..environment import machine
from . import report
from .config import BenchConfig, Mode
from .figures import growths
from .goals import outcomes
from .measure import TIME_IS_UP, Result, compare
from .models import comparisons
from .passes import faults

if TYPE_CHECKING:
    from rich.console import Console

RESULTS, TABLES = "results.json", "tables.md"
LAST_BEGIN = 330  # seconds after which --gpu begins no network, should the deepest one take two minutes to compile


def bench(config: BenchConfig, command: str) -> Path:
    """Measure, print and write the figures; gives their folder. What is finished is written at once.

    Args:
        config: what to measure.
        command: the command line, to be written beside the figures.

    Raises:
        DenseShortcutError: bad input of any kind, a folder that exists, or kernels that differ from the reference.
    """
    need("`dsnet bench`", "train")
    from rich.console import Console

    device = choose_device(config)
    config = config.resolved(device.type)
    planned = comparisons(config, device.type)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = make_folder(config.output)
    about = {"command": command, **machine(), "device_type": device.type, "notes": []}
    started = time.monotonic()
    until = started + LAST_BEGIN if config.gpu else math.inf
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # so that a log keeps whole rows
    tell = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    tell(heading(config, about, folder))
    wrong: list[str] = []
    if config.gpu:
        with console.status("") as status:
            count, wrong = faults(kernels("triton"), device.type, status.update)
        about["notes"] += [f"Triton passes beside the reference: {count} cases, {len(wrong)} differ", *wrong]
        tell(*about["notes"], sep="\n")

    results: list[Result] = []
    turns = [(m, s, c) for m in get_args(Mode) for s in config.image_size for c in planned if m in c.modes]
    for mode, size, comparison in turns:
        write(folder, config, about, results)
        what = f"{comparison.label}, {mode}"
        if time.monotonic() > until:
            about["notes"].append(f"left out: {what} ({TIME_IS_UP})")
            tell(about["notes"][-1])
            continue
        tell(f"{what}, after {time.monotonic() - started:.0f} s")
        with console.status("") as status:
            results.append(compare(comparison, mode, size, config, device, status.update, until))
        show(results[-1], device, console)
    write(folder, config, about, results)
    for name, cells in closing_tables(config, about, results).items():
        console.print(report.rich_table(cells, name))
    tell(f"figures and tables: {folder}")
    if wrong:
        raise DenseShortcutError(f"the kernels differ from the reference, {len(wrong)} times: see {folder / TABLES}.")
    return folder


def choose_device(config: BenchConfig) -> torch.device:
    """CUDA where there is one, unless asked otherwise.

    Raises:
        DenseShortcutError: CUDA is asked for and there is none, or under --gpu none that the kernels are for.
    """
    wanted, there = "cuda" if config.gpu else config.device, torch.cuda.is_available()
    fault = unusable("triton", "cuda") if config.gpu else None
    if wanted == "cuda" and not there:
        fault = "PyTorch finds no CUDA device here"
    if fault is not None:
        flag = "--gpu" if config.gpu else "--device cuda"
        raise DenseShortcutError(f"{flag}: {fault}; leave it out to measure the CPU.")
    return torch.device(wanted or ("cuda" if there else "cpu"))


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
    packages = {name: about["packages"].get(name) for name in ("torch", "torchvision", "timm", "triton")}
    versions = ", ".join(f"{name} {found}" for name, found in packages.items() if found)
    git = about["git"]
    commit = f"commit {git['commit'][:7]}{', changed since' * git['changed']}" if git else "no commit"
    precision = "float32" if config.precision == "no" else f"{config.precision} autocast"
    folded = ", norms folded" if config.folded else ""
    heap = "" if config.keep_heap or config.device == "cuda" else ", heap given back"
    how = f"{precision}, channels_last{folded}{heap}, {config.rounds} rounds"
    return f"{where}; {versions}; {commit}; {how}\nfolder: {folder}"


def closing_tables(config: BenchConfig, about: dict[str, Any], results: Sequence[Result]) -> dict[str, report.Cells]:
    """What all results together say: growth with depth in a sweep, else the goals."""
    if config.depths:
        return report.growth_tables(growths(results))
    found = outcomes(results, config, about["threads"])
    return {"goals": report.goal_cells(found)} if found else {}


def show(result: Result, device: torch.device, console: "Console") -> None:
    """A comparison's tables, and what was left out of it."""
    console.print(report.rich_table(report.speed_cells(result), report.title(result)))
    console.print(report.rich_table(report.cost_cells(result, device.type), ""))
    for name, reason in result.left_out.items():
        console.print(f"left out: {name} ({reason})", highlight=False, soft_wrap=True)


def write(folder: Path, config: BenchConfig, about: dict[str, Any], results: Sequence[Result]) -> None:
    """Write JSON and tables of what is measured so far."""
    goals = outcomes(results, config, about["threads"]) if not config.depths else []
    figures = {
        **about,
        "settings": dataclasses.asdict(config),
        "comparisons": [report.as_json(result) for result in results],
        "growth": [growth._asdict() for growth in growths(results)],
        "goals": [dataclasses.asdict(goal) for goal in goals],
    }
    (folder / RESULTS).write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")
    parts = [f"`{about['command']}`, {about['started'][:10]}\n\n{heading(config, about, folder)}\n"]
    parts += [f"- {line}\n" for line in about["notes"]]
    for result in results:
        left_out = [f"- left out: {name} ({reason})\n" for name, reason in result.left_out.items()]
        tables = [report.speed_cells(result), report.cost_cells(result, str(config.device))]
        parts += [f"## {report.title(result)}\n", *map(report.markdown, tables), *left_out]
    for name, cells in closing_tables(config, about, results).items():
        parts += [f"## {name}\n", report.markdown(cells)]
    (folder / TABLES).write_text("\n".join(parts), encoding="utf-8")
