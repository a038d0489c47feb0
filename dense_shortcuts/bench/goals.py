"""The goals that this project has set itself for speed and memory, and whether figures meet them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..ops.dispatch import own_backend
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
    mode: str | None = None  # None is either, like for like
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
    """Every goal for every norm, by this device's own back end; the better mode where either will do."""
    at_goal_settings = {
        "cuda": not config.folded and config.device == "cuda" and "H100" in device_name and config.precision == "bf16",
        "cpu": not config.folded and config.device == "cpu" and threads == 2 and config.precision == "no",
    }
    found = []
    for goal in GOALS:
        for norm in NORMS:
            name = f"{goal.network}/{norm}/{own_backend(goal.device)[0]}"
            figures = {r.mode: _figure(goal, name, r) for r in results if at_goal_settings[goal.device]}
            known = {mode: figure for mode, figure in figures.items() if figure is not None}
            if not known:
                found.append(Outcome(str(goal), norm, goal.needed, None, None, "not run here"))
                continue
            least = goal.what != "memory"
            mode = (max if least else min)(known, key=lambda m: known[m])
            met = known[mode] >= goal.bound if least else known[mode] <= goal.bound
            found.append(Outcome(str(goal), norm, goal.needed, known[mode], mode, "met" if met else "not met"))
    return found


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
