"""What the rows of a sweep cost, measured in turn, and the host that is widened to another row's cost."""

import bisect
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import nn

from ...errors import DenseShortcutError
from ...files import read_json, write_text
from ..environment import machine
from ..profiling import peak_bytes
from ..train.config import TrainConfig
from ..train.measure import images_at_once, multiply_adds, parameters, training_step
from ..train.network import build_network
from .spec import Row, Sweep

BUDGET, COSTS = "budget.json", "costs.json"
ROUNDS = 5
LEAST_SECONDS = 0.2  # of a turn
STEP, WIDEST = 16, 2  # widths are in sixteenths of the host's own, up to twice it

Cost = dict[str, Any]


def costs(configs: Sequence[TrainConfig], num_classes: int, rounds: int = ROUNDS) -> list[Cost]:
    """Training speed and memory of each configuration's network, and its size.

    The networks take turns, and on a CPU the process's own time counts, so that another process's work hits none.

    Returns:
        for each: train_images_per_second (median of the rounds), peak_bytes, parameters, multiply_adds.
    """
    steps = [training_step(config.resolved(), num_classes) for config in configs]
    found: list[Cost] = []
    for config, (step, resident, device) in zip(configs, steps, strict=True):
        step()
        model = build_network(config, num_classes)
        found.append(
            {
                "peak_bytes": peak_bytes(step, resident(), device),
                "parameters": parameters(model),
                "multiply_adds": multiply_adds(model, config.resolved().img_size or 32),
            }
        )
    seconds: list[list[float]] = [[] for _ in configs]
    for _ in range(rounds):
        for (step, _, device), seen in zip(steps, seconds, strict=True):
            seen.append(step_seconds(step, device))
    for config, cost, seen in zip(configs, found, seconds, strict=True):
        cost["train_images_per_second"] = images_at_once(config) / statistics.median(seen)
    return found


def step_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step: of the clock on an accelerator, of the process on each of its threads on a CPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    calls, began = 0, clock()
    while True:
        step()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = clock() - began
        if elapsed >= LEAST_SECONDS:
            return elapsed / calls / (torch.get_num_threads() if device.type == "cpu" else 1)


def saved_costs(sweep: Sweep, folder: Path, num_classes: int) -> dict[str, Cost]:
    """What each row costs by its name, measured all together once on this device and kept in the sweep's folder."""
    path = folder / COSTS
    device = machine()["device"]
    wanted = {row.name: json.loads(json.dumps(dataclasses.asdict(row.config))) for row in sweep.rows}
    if path.is_file():
        saved = read_json(path)
        if saved["device"] == device and saved["settings"] == wanted:
            return saved["costs"]
    measured = dict(zip(wanted, costs([row.config for row in sweep.rows], num_classes), strict=True))
    write_text(path, json.dumps({"device": device, "settings": wanted, "costs": measured}, indent=2) + "\n")
    return measured


def with_budgets(sweep: Sweep, folder: Path, num_classes: int) -> Sweep:
    """The sweep with the width of each `same_budget_as` row settled: measured the first time, then as it was kept."""
    path = folder / BUDGET
    kept = read_json(path) if path.is_file() else {}
    rows = []
    for row in sweep.rows:
        if row.same_budget_as is not None:
            if row.name not in kept:
                kept[row.name] = widened(row, sweep.row(row.same_budget_as), num_classes)
                write_text(path, json.dumps(kept, indent=2) + "\n")
            config = dataclasses.replace(row.config, channels=tuple(kept[row.name]["channels"]))
            row = dataclasses.replace(row, config=config)
        rows.append(row)
    return dataclasses.replace(sweep, rows=tuple(rows))


def widened(row: Row, target: Row, num_classes: int) -> dict[str, Any]:
    """The narrowest width of a host at which a training step takes at least the other row's time and memory.

    Returns:
        channels (of each stage), and what was measured: each width tried, with its cost and the other row's (`goal`).

    Raises:
        DenseShortcutError: not a timm ResNet, or no width up to twice its own is enough.
    """
    own = stage_channels(build_network(row.config, num_classes), row.name)
    widths = [tuple(c * k // (2 * STEP) * 2 for c in own) for k in range(STEP, WIDEST * STEP + 1)]  # even, for the stem
    tried = []

    def enough(channels: tuple[int, ...]) -> bool:
        config = dataclasses.replace(row.config, channels=channels)
        host, goal = costs([config, target.config], num_classes)
        tried.append({"channels": channels, "cost": host, "goal": goal})
        slower = host["train_images_per_second"] <= goal["train_images_per_second"]
        return slower and host["peak_bytes"] >= goal["peak_bytes"]

    if not enough(widths[-1]):
        raise DenseShortcutError(
            f"row {row.name!r} stays cheaper than {target.name!r} at {WIDEST} times its width: "
            "give it channels or layers of its own."
        )
    chosen = widths[bisect.bisect_left(widths, True, hi=len(widths) - 1, key=enough)]
    return {"channels": chosen, "tried": tried}


def stage_channels(model: nn.Module, name: str) -> list[int]:
    """Width of each stage of a timm ResNet before expansion."""
    if not isinstance(model, ResNet):
        raise DenseShortcutError(
            f"row {name!r} has `same_budget_as` and is no ResNet of timm's: give it a model of the size by hand."
        )
    stages: list[Any] = [getattr(model, f"layer{i}") for i in range(1, 5)]
    return [stage[0].conv1.out_channels for stage in stages if len(stage)]
