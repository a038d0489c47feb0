"""The goals that this project has set itself for speed and memory, and whether figures meet them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...ops.backend import own_backend
from .config import BenchConfig
from .figures import memory_ratio, speed_ratio
from .measure import Result
from .models import NORMS


@dataclass(frozen=True)
class Goal:
    """A ratio of a DSNet to another network, at its device's settings (`SETTINGS`).

    Attributes:
        what: "train" and "infer" are ratios of speed, of which `bound` is the least; "memory" is one of a training
            step's peak, of which it is the most.
    """

    device: str
    network: str
    reference: str
    what: str
    bound: float
    mode: str | None = None  # None is either, like for like, one for all goals of a network
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.device}, {self.mode}" if self.mode else self.device
        note = f" ({self.note})" if self.note else ""
        return f"{where}: {self.what}, {self.network} over {self.reference}{note}"

    @property
    def needed(self) -> str:
        return f"{self.bound:.2f}x at {'most' if self.what == 'memory' else 'least'}"


GOALS = (
    Goal("cuda", "dsnet50", "torchvision.resnet50", "train", 0.90),
    Goal("cuda", "dsnet50", "torchvision.resnet50", "memory", 1.05),
    Goal("cuda", "dsnet152", "torchvision.resnet152", "train", 0.75),
    Goal("cuda", "dsnet152", "torchvision.resnet152", "memory", 1.10),
    Goal("cuda", "dsnet50", "torchvision.densenet121", "train", 1.5),
    Goal("cuda", "dsnet50", "torchvision.resnet50", "train", 1.0, "eager", "stretch"),
    Goal("cpu", "dsnet50", "timm.resnet50", "infer", 0.95, "eager"),
    Goal("cpu", "dsnet50", "timm.resnet50", "train", 0.90, "eager"),
    Goal("cpu", "dsnet50", "timm.resnet50", "memory", 1.10, "eager"),
)

# Batch and image size of the goals, by device and network; CUDA's are for one H100 in bf16, the CPU's for two threads.
SETTINGS = {
    ("cuda", "dsnet50"): (256, 224),
    ("cuda", "dsnet152"): (128, 224),
    ("cpu", "dsnet50"): (8, 128),
}


@dataclass(frozen=True)
class Outcome:
    """A goal for one norm with its figure, None where it was not measured, and the mode it was measured in."""

    goal: str
    norm: str
    needed: str
    measured: float | None
    mode: str | None
    verdict: str


def outcomes(results: Sequence[Result], config: BenchConfig, device_name: str, threads: int) -> list[Outcome]:
    """Every goal for every norm, by this device's own back end.

    Goals that either mode may meet are all held to one mode for each network: the one that meets the most of them.
    """
    at_goal_settings = {
        "cuda": not config.folded and config.device == "cuda" and "H100" in device_name and config.precision == "bf16",
        "cpu": not config.folded and config.device == "cpu" and threads == 2 and config.precision == "no",
    }
    usable = {device: results if fits else () for device, fits in at_goal_settings.items()}
    chosen: dict[tuple[str, str, str], str | None] = {}
    found = []
    for goal in GOALS:
        for norm in NORMS:
            key = (goal.device, goal.network, norm)
            if key not in chosen:
                chosen[key] = _best_mode(*key, usable[goal.device])
            found.append(_outcome(goal, norm, goal.mode or chosen[key], usable[goal.device]))
    return found


def _best_mode(device: str, network: str, norm: str, results: Sequence[Result]) -> str | None:
    """The mode that meets most of a network's goals of either mode; None where nothing was measured."""
    goals = [goal for goal in GOALS if (goal.device, goal.network, goal.mode) == (device, network, None)]
    modes = list(dict.fromkeys(result.mode for result in results))
    met = {mode: [_outcome(goal, norm, mode, results).verdict for goal in goals] for mode in modes}
    return max(modes, key=lambda mode: (met[mode].count("met"), met[mode].count("not met")), default=None)


def _outcome(goal: Goal, norm: str, mode: str | None, results: Sequence[Result]) -> Outcome:
    """A goal held to the figures of one mode."""
    name = f"{goal.network}/{norm}/{own_backend(goal.device)[0]}"
    known = [f for r in results if r.mode == mode and (f := _figure(goal, name, r)) is not None]
    if not known:
        return Outcome(str(goal), norm, goal.needed, None, None, "not run here")
    met = known[-1] <= goal.bound if goal.what == "memory" else known[-1] >= goal.bound
    return Outcome(str(goal), norm, goal.needed, known[-1], mode, "met" if met else "not met")


def _figure(goal: Goal, name: str, result: Result) -> float | None:
    """The goal's ratio in one result, None where that is not one of this goal's."""
    rows = {row.name: row for row in result.rows}
    batch_size, size = SETTINGS[goal.device, goal.network]
    fits = goal.mode in (None, result.mode) and (result.shape[0], result.shape[2]) == (batch_size, size)
    if not fits or name not in rows or goal.reference not in rows:
        return None
    if goal.what == "memory":
        return memory_ratio(rows[name], rows[goal.reference])
    ratio = speed_ratio(rows[name], rows[goal.reference], goal.what)
    return None if ratio is None else ratio.median
