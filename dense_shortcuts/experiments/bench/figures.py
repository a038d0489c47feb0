"""What the measured seconds and bytes say: speeds, ratios round by round, and how cost grows with depth."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .measure import Result, Row


class Ratio(NamedTuple):
    """Median, least and greatest of the rounds."""

    median: float
    least: float
    most: float


def speed_ratio(row: Row, peer: Row, what: str) -> Ratio | None:
    """A network's speed over its peer's, each round by itself; None where it was not measured."""
    if what not in row.seconds:
        return None
    ratios = [theirs / own for own, theirs in zip(row.seconds[what], peer.seconds[what], strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def memory_ratio(row: Row, peer: Row) -> float | None:
    """A network's peak memory over its peer's."""
    if row.peak_bytes is None or peer.peak_bytes is None:
        return None
    return row.peak_bytes / peer.peak_bytes


def images_per_second(result: Result, row: Row, what: str) -> float | None:
    """Median speed."""
    return result.shape[0] / statistics.median(row.seconds[what]) if what in row.seconds else None


def extra_seconds(row: Row, peer: Row, what: str) -> float:
    """Median of the rounds' differences to the peer."""
    return statistics.median(own - theirs for own, theirs in zip(row.seconds[what], peer.seconds[what], strict=True))


class Growth(NamedTuple):
    """How a cost grows in a depth sweep: by depth, and the exponent p of L^p that fits best; None where none does."""

    mode: str
    size: int
    name: str
    what: str
    by_depth: dict[int, float]
    exponent: float | None


def growths(results: Sequence[Result]) -> list[Growth]:
    """For each entry of a sweep but the host: extra seconds of a step ("train", "infer") and bytes of the shortcuts."""
    costs: dict[tuple[str, int, str, str], dict[int, float]] = {}
    for result in results:
        if result.depth is None:
            continue
        peer = result.rows[0]
        for row in result.rows[1:]:
            found = {what: extra_seconds(row, peer, what) for what in row.seconds}
            if row.shortcut_bytes is not None:
                found |= {"bytes": row.shortcut_bytes.moved, "least bytes": row.shortcut_bytes.least}
            for what, cost in found.items():
                costs.setdefault((result.mode, result.shape[2], row.name, what), {})[result.depth] = cost
    return [Growth(*key, by_depth, exponent(by_depth)) for key, by_depth in costs.items()]


def exponent(costs: dict[int, float]) -> float | None:
    """Slope of log(cost) over log(depth) by least squares; None with fewer than two depths or a cost not above 0."""
    if len(costs) < 2 or min(costs.values()) <= 0:
        return None
    return statistics.linear_regression(
        *zip(*((math.log(d), math.log(c)) for d, c in costs.items()), strict=True)
    ).slope
