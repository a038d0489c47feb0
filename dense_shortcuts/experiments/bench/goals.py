"""The goals that this project has set itself for speed and memory, and whether figures meet them."""

from collections.abc import Sequence
from dataclasses import dataclass

from .config import BenchConfig, Mode
from .figures import memory_ratio, speed_ratio
from .measure import Result
from .models import HOSTS, NORMS

SIZE = 224  # of the images, in pixels
THREADS = 2  # of a CPU


@dataclass(frozen=True)
class Goal:
    """A ratio of a network to the peer of its comparison: in float32 on a CPU, in bf16 on CUDA.

    Attributes:
        batch_size: images a step, None for any number.
        mode: None is either, like for like, one for all goals of a network.
        what: "train" and "infer" are ratios of speed, of which `bound` is the least; "memory" is one of a training
            step's peak, of which it is the most.
    """

    device: str
    network: str
    batch_size: int | None
    mode: Mode | None
    what: str
    bound: float

    def __str__(self) -> str:
        return f"{self.device}, {self.mode or 'either mode'}: {self.what}, {self.network}"

    @property
    def needed(self) -> str:
        return f"{self.bound:.2f}x at {'most' if self.what == 'memory' else 'least'}"


_DSNET50, _DSNET152 = ([f"dsnet{depth}/{norm}" for norm in NORMS] for depth in (50, 152))
_PLUGGED = [f"plugged.{host}" for host in HOSTS]
_STATED: tuple[tuple[str, list[str], int | None, Mode | None, dict[str, float]], ...] = (
    ("cpu", _DSNET50, 8, "eager", {"train": 0.93, "infer": 0.95, "memory": 1.03}),
    ("cpu", _DSNET50, 8, "compiled", {"train": 0.92, "infer": 0.92}),
    ("cpu", _DSNET152, 4, "eager", {"train": 0.80, "infer": 0.90}),
    ("cpu", _PLUGGED, 4, "eager", {"train": 0.93, "infer": 0.93}),
    ("cuda", _DSNET50, None, None, {"train": 0.95, "memory": 1.05}),
    ("cuda", _DSNET152, None, None, {"train": 0.85, "memory": 1.05}),
)
GOALS = tuple(
    Goal(device, network, batch_size, mode, what, bound)
    for device, networks, batch_size, mode, bounds in _STATED
    for network in networks
    for what, bound in bounds.items()
)


@dataclass(frozen=True)
class Outcome:
    """A goal with its figure and the mode it was taken in, None where it was not measured at the goal's settings."""

    goal: str
    needed: str
    measured: float | None
    mode: str | None
    verdict: str


def outcomes(results: Sequence[Result], config: BenchConfig, threads: int) -> list[Outcome]:
    """Every goal of the networks that took part, on this device.

    Goals that either mode may meet are all held to one mode for each network: the one that meets the most of them.
    """
    there = {row.name for result in results for row in result.rows}
    goals = [goal for goal in GOALS if goal.device == config.device and goal.network in there]
    fits = config.precision == "bf16" if config.device == "cuda" else config.precision == "no" and threads == THREADS
    usable = results if fits and not config.folded else ()
    chosen = {network: _best_mode([g for g in goals if g.network == network], usable) for network in there}
    return [_outcome(goal, goal.mode or chosen[goal.network], usable) for goal in goals]


def _best_mode(goals: Sequence[Goal], results: Sequence[Result]) -> str | None:
    """The mode that meets most of a network's goals of either mode; None where nothing was measured."""
    modes = list(dict.fromkeys(result.mode for result in results))
    met = {mode: [_outcome(goal, mode, results).verdict for goal in goals if goal.mode is None] for mode in modes}
    return max(modes, key=lambda mode: (met[mode].count("met"), met[mode].count("not met")), default=None)


def _outcome(goal: Goal, mode: str | None, results: Sequence[Result]) -> Outcome:
    """A goal held to the figures of one mode."""
    known = [f for r in results if r.mode == mode and (f := _figure(goal, r)) is not None]
    if not known:
        return Outcome(str(goal), goal.needed, None, None, "not run here")
    met = known[-1] <= goal.bound if goal.what == "memory" else known[-1] >= goal.bound
    return Outcome(str(goal), goal.needed, known[-1], mode, "met" if met else "not met")


def _figure(goal: Goal, result: Result) -> float | None:
    """The goal's ratio in one result, None where that is not one of this goal's."""
    row = next((row for row in result.rows if row.name == goal.network), None)
    if row is None or goal.batch_size not in (None, result.shape[0]) or result.shape[2] != SIZE:
        return None
    if goal.what == "memory":
        return memory_ratio(row, result.rows[0])
    ratio = speed_ratio(row, result.rows[0], goal.what)
    return None if ratio is None else ratio.median
