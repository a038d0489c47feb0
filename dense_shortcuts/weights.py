"""Shortcut weights in few numbers: for every pair (l, i) the mean of |w| and the spread over the channels."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DenseShortcutError
from .plug import dense_stages
from .shortcut import DenseShortcut, InnerShortcut, start_weight

SHORTCUTS = "shortcuts.jsonl"  # in a network's folder: a line for every epoch

Summary = dict[str, Any]


def weight_summary(model: nn.Module) -> Summary:
    """What every shortcut weighs now.

    Returns:
        stages: by module name {"mean_abs", "spread"}, each a row for every block l = 1..L with a number for every map
            i = 0..l-1: the mean of |w_{l,i}| and the standard deviation of w_{l,i} over the channels.
        inner: DS2's v by the block's name: {"mean_abs", "spread"}, one number each.
        Stages without weights (the dense identity) are left out.
    """
    stages = {name: _rows(stage.shortcut.weights) for name, stage in dense_stages(model).items()}
    inner = {
        name.removesuffix(".inner"): {key: rows[0][0] for key, rows in _rows([module.weight[None]]).items()}
        for name, module in model.named_modules()
        if isinstance(module, InnerShortcut)
    }
    return {"stages": {name: rows for name, rows in stages.items() if rows["mean_abs"]}, "inner": inner}


def start_summary(model: nn.Module) -> Summary:
    """What every shortcut weighed before training, by its `init`; as `weight_summary`, without inner."""
    return {
        "stages": {
            name: _rows(_starts(stage.shortcut))
            for name, stage in dense_stages(model).items()
            if len(stage.shortcut.weights)
        }
    }


def record(path: Path, epoch: int, model: nn.Module) -> None:
    """Add the summary after an epoch as a line of JSON; a network without shortcut weights leaves no file."""
    found = weight_summary(model)
    if not found["stages"] and not found["inner"]:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"epoch": epoch, **found}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_record(path: Path) -> list[Summary]:
    """The lines that `record` left, in the order of their epochs; none where there is no file.

    An epoch that was trained twice, because a run was cut off before its state was saved, counts as it came out last,
    and with it all later ones; a last line that was cut short is left out.

    Raises:
        DenseShortcutError: another line that is not JSON.
    """
    found: list[Summary] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise DenseShortcutError(f"line {number} of {path} is not JSON: restore or remove the file.") from error
            break
        found = [*(earlier for earlier in found if earlier["epoch"] < row["epoch"]), row]
    return found


def _starts(shortcut: DenseShortcut) -> list[Tensor]:
    return [start_weight(shortcut.init, k + 1, shortcut.channels) for k in range(shortcut.depth)]


def _rows(weights: Iterable[Tensor]) -> dict[str, list[list[float]]]:
    """mean_abs and spread of weights (l, C), a row each."""
    with torch.no_grad():
        found = [weight.double() for weight in weights]
        return {
            "mean_abs": [_rounded(weight.abs().mean(1)) for weight in found],
            "spread": [_rounded(weight.std(1, correction=0)) for weight in found],
        }


def _rounded(values: Tensor) -> list[float]:
    """Six digits, which keeps a record of many epochs small."""
    return [float(f"{value:.6g}") for value in values.tolist()]
