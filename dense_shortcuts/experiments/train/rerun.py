"""Repeat a run from its folder, say what differs in its surroundings, and compare the results number by number."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import DenseShortcutError
from ...files import read_json, read_tensors, write_text
from ..command import dsnet
from .checkpoint import CARD, WEIGHTS
from .config import read_yaml
from .loop import METRICS, read_metrics
from .run import CONFIG, ENVIRONMENT, TABLE, asked_of, execute, resume

RERUN = "rerun.json"
CLOCKED = ("seconds", "per_second", "share")  # ends of the names of metrics that a clock gives
SURROUNDINGS = ("python", "system", "device", "processor", "threads")


def rerun(folder: Path, name: str | None = None, line: str = "") -> tuple[Path, dict[str, Any]]:
    """Train again what a run trained, with its configuration and seed, in a folder beside it.

    A rerun that was interrupted goes on.

    Args:
        folder: a run's folder, all networks of which are finished.
        name: of the new folder; None is the old one's with "-rerun".
        line: the command as it was typed.

    Returns:
        the new folder; and `differences` of the surroundings as sentences, `networks` with what `compared` gives for
        each, and `equal`, whether every metric and weight is the same bit by bit.

    Raises:
        DenseShortcutError: not a finished run, or an error of the training itself.
    """
    if not (folder / CONFIG).is_file():
        raise DenseShortcutError(f"{folder} is no run to repeat, for it has no {CONFIG}: give the folder of a run.")
    before = read_json(folder / ENVIRONMENT)
    config = read_yaml(folder / CONFIG)
    places = sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"**/{METRICS}"))
    if not (folder / TABLE).is_file() or not all((folder / place / CARD).is_file() for place in places):
        raise DenseShortcutError(
            f"{folder} is not finished: go on with `{dsnet(before['command'], '--resume', folder)}` first."
        )
    torch.set_num_threads(before["threads"])  # sums depend on it
    again = folder.with_name(name or f"{folder.name}-rerun")
    here = dataclasses.replace(config, output=str(folder.parent), name=again.name)
    if (again / CONFIG).is_file() and read_yaml(again / CONFIG) == here.resolved():
        resume(again, before["command"])
    else:
        execute(here, before["command"], resumed=None, line=line, asked=asked_of(before))
    networks = {place: compared(folder / place, again / place) for place in places}
    outcome = {
        "of": str(folder),
        "differences": differences(before, read_json(again / ENVIRONMENT)),
        "networks": networks,
        "equal": all(each["equal"] for each in networks.values()),
    }
    write_text(again / RERUN, json.dumps(outcome, indent=2) + "\n")
    return again, outcome


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run depends on besides its configuration and was not the same, a sentence each."""
    pairs = [(key, before.get(key), now.get(key)) for key in SURROUNDINGS]
    for part in ("packages", "data", "weights"):
        then, since = before.get(part) or {}, now.get(part) or {}
        pairs += [(f"{part}: {key}", then.get(key), since.get(key)) for key in sorted({*then, *since})]
    git = [each.get("git") or {} for each in (before, now)]
    pairs.append(("commit of this package", git[0].get("commit"), git[1].get("commit")))
    found = [f"{what} was {_told(then)} and is {_told(since)}" for what, then, since in pairs if then != since]
    if any(each.get("changed") for each in git):
        found.append("the package's source had changes that were not committed, which nobody recorded")
    return found


def _told(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def compared(first: Path, second: Path) -> dict[str, Any]:
    """Two folders of one network.

    Returns:
        equal (metrics and weights, bit by bit), epochs, test_top1 of both (%), and the largest differences of a metric
        (with its name) and of a weight; a difference is NaN where one of the two has no such number.
    """
    rows = [unclocked(read_metrics(folder / METRICS)) for folder in (first, second)]
    tensors = [read_tensors(folder / WEIGHTS)[0] for folder in (first, second)]
    gaps = {f"{key} of epoch {a['epoch']}": gap(a[key], b.get(key)) for a, b in zip(*rows, strict=False) for key in a}
    worst = max(gaps, key=lambda key: math.inf if math.isnan(gaps[key]) else gaps[key])
    same = tensors[0].keys() == tensors[1].keys()
    weights = [float((tensors[0][key].double() - tensors[1][key].double()).abs().max()) for key in tensors[0] if same]
    return {
        "equal": rows[0] == rows[1] and same and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0]),
        "epochs": [len(each) for each in rows],
        "test_top1": [each[-1]["test_top1"] for each in rows],
        "metric": {"name": worst, "difference": gaps[worst]},
        "weight": max(weights, default=math.nan),
    }


def gap(first: Any, second: Any) -> float:
    return abs(first - second) if isinstance(second, int | float) else math.nan


def unclocked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what a clock says."""
    return [{key: value for key, value in row.items() if not key.endswith(CLOCKED)} for row in rows]


def sentences(again: Path, outcome: Mapping[str, Any]) -> list[str]:
    """What to print of a rerun."""
    lines = [f"surroundings: {difference}" for difference in outcome["differences"]]
    lines = lines or ["surroundings: the same versions, machine, source and data as recorded"]
    for label, each in outcome["networks"].items():
        then, now = each["test_top1"]
        if each["equal"]:
            lines.append(f"{label}: bit-equal in {each['epochs'][0]} epochs' metrics and in the weights, {now:.2f} %")
        else:
            lines.append(
                f"{label}: NOT equal, {then:.2f} % then and {now:.2f} % now; the largest difference is "
                f"{each['metric']['difference']:.3g} in {each['metric']['name']}, and {each['weight']:.3g} in a weight"
            )
    return [*lines, f"both in full: {again / RERUN}"]
