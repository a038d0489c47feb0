"""The whole of it: plan every network, examine one of each architecture, and keep what was seen as it comes."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .examining import Row, examine
from .names import places
from .planning import Planned, architectures, plan_one

Record = TypeVar("Record", Planned, Row)


def sweep(pattern: str, folder: Path, report: Callable[[str], None]) -> tuple[list[Planned], list[Row]]:
    """The plan of every network that a wildcard names, and what was seen of the smallest of each architecture.

    What the folder's JSON lines have already is kept.
    """
    plans = plan_all(pattern, folder / "plans.jsonl", report)
    chosen = [members[0] for members in architectures(plans) if members[0].verdict == "planned"]
    return plans, examine_all(chosen, folder / "rows.jsonl", report)


def plan_all(pattern: str, file: Path, report: Callable[[str], None]) -> list[Planned]:
    """The plan of every network that a wildcard names."""
    done, found = {row.place: row for row in read(file, Planned)}, places(pattern)
    report(f"{len(found)} networks, {sum(place in done for place in found)} of them planned")
    for n, place in enumerate(found, 1):
        if place not in done:
            done[place] = row = plan_one(place)
            append(file, row)
            told = row.refusal or row.error or f"{row.stages} stages"
            report(f"{n}/{len(found)} {place.library} {place.name}: {row.verdict}, {told[:150]}")
    return [done[place] for place in found]


def examine_all(chosen: list[Planned], file: Path, report: Callable[[str], None]) -> list[Row]:
    """What was seen of these networks."""
    done = {row.place: row for row in read(file, Row)}
    todo = [planned for planned in chosen if planned.place not in done]
    report(f"{len(chosen)} architectures, {len(chosen) - len(todo)} of them examined")
    for n, planned in enumerate(todo, len(chosen) - len(todo) + 1):
        done[planned.place] = row = examine(planned)
        append(file, row)
        told = "; ".join(f"{check} {result}" for check, result in row.checks.items() if result != "yes")
        report(f"{n}/{len(chosen)} {row.library} {row.name}: {row.verdict}; {told[:150] or 'all checks pass'}")
    return [done[planned.place] for planned in chosen]


def read(file: Path, kind: type[Record]) -> list[Record]:
    """The records that a sweep has written; none where there is no file."""
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return [kind(**json.loads(line)) for line in lines]


def append(file: Path, record: Any) -> None:
    """Write a record behind those that are there."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(record)) + "\n")
