"""Shortcut weights in few numbers: for every pair (l, i) the mean of |w| and the spread over the channels."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import DenseShortcutError
from ..nn.connectivity import Sources
from ..nn.inner_shortcut import InnerShortcut
from ..nn.shortcut import DenseShortcut
from ..nn.weighting import start_parameter, weigh

SHORTCUTS = "shortcuts.jsonl"  # in a network's folder: a line for every epoch

Summary = dict[str, Any]
Rows = list[list[float | None]]


def weight_summary(model: nn.Module) -> Summary:
    """What every shortcut weighs now. Every process calls it where the parameters are spread over several.

    Returns:
        stages: by the stage's module name (by the shortcut's own, such as "blocks.shortcut2", where a container has
            more rows than one) {"mean_abs", "spread"}, each a row for every block l = 1..L with a number for every
            map i = 0..l-1: the mean of |w_{l,i}| and the standard deviation of w_{l,i} over the channels; None where
            the block does not sum the map.
        inner: DS2's v by the block's name: {"mean_abs", "spread"}, one number each.
        Stages without weights (the dense identity), or whose weights depend on the image (attention), are left out.
    """
    stages = {
        name: _rows(shortcut.sources, [shortcut.weight(k) for k in shortcut.summing])
        for name, shortcut in _weighted(model).items()
    }
    inner = {
        name.removesuffix(".inner"): dict(zip(("mean_abs", "spread"), _figures(module.weight[None])[0], strict=True))
        for name, module in model.named_modules()
        if isinstance(module, InnerShortcut)
    }
    return {"stages": stages, "inner": inner}


def start_summary(model: nn.Module) -> Summary:
    """What every shortcut weighed before training, by its `init`; as `weight_summary`, without inner."""
    return {"stages": {name: _rows(found.sources, _starts(found)) for name, found in _weighted(model).items()}}


def record(path: Path, epoch: int, model: nn.Module, *, write: bool = True) -> None:
    """Add the summary after an epoch as a line of JSON; a network without shortcut weights leaves no file.

    Every process calls it, and one of them writes.
    """
    found = weight_summary(model)
    if not write or (not found["stages"] and not found["inner"]):
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


def _weighted(model: nn.Module) -> dict[str, DenseShortcut]:
    """The shortcuts with weights that are the same for every image, by the names that summaries have for them."""
    return {
        re.sub(r"(^|\.)shortcut$", "", name): module
        for name, module in model.named_modules()
        if isinstance(module, DenseShortcut) and len(module.weights) and module.weighting != "attention"
    }


def _starts(shortcut: DenseShortcut) -> list[Tensor]:
    weighting, init, channels = shortcut.weighting, shortcut.init, shortcut.channels
    parameters = [start_parameter(weighting, init, len(shortcut.sources[k]), channels) for k in shortcut.summing]
    return [weigh(weighting, parameter, channels, []) for parameter in parameters]


def _rows(sources: Sources, weights: Sequence[Tensor]) -> dict[str, Rows]:
    """mean_abs and spread of weights (maps, C), one for each block that sums any map."""
    found = iter(weights)
    mean_abs: Rows = []
    spread: Rows = []
    for k, maps in enumerate(sources):
        figures = dict(zip(maps, _figures(next(found)), strict=True)) if maps else {}
        mean_abs.append([figures[i][0] if i in figures else None for i in range(k + 1)])
        spread.append([figures[i][1] if i in figures else None for i in range(k + 1)])
    return {"mean_abs": mean_abs, "spread": spread}


def _figures(weight: Tensor) -> list[tuple[float, float]]:
    """Mean of the magnitude and standard deviation of each row of (maps, C)."""
    with torch.no_grad():
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        weight = weight.double()
        return list(zip(_rounded(weight.abs().mean(1)), _rounded(weight.std(1, correction=0)), strict=True))


def _rounded(values: Tensor) -> list[float]:
    """Six digits, which keeps a record of many epochs small."""
    return [float(f"{value:.6g}") for value in values.tolist()]
