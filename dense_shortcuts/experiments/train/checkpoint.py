"""Checkpoints: safetensors and JSON, written whole or not at all; nothing is unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DenseShortcutError
from ...files import read_json, read_tensors, write_tensors, write_text
from ...surgery.load import load
from .config import DATA_DEFAULTS, TrainConfig
from .data import Data
from .network import PLUGGING_FIELDS, build_network

SHORTCUT_FIELDS = ("aggregate", *PLUGGING_FIELDS, "channels", "layers")
WEIGHTS, CARD = "model.safetensors", "model.json"


def write_model(folder: Path, config: TrainConfig, data: Data, tensors: Mapping[str, Tensor]) -> None:
    """Write a trained network: its weights, then the card that says how to build it and how to prepare images.

    The card comes last, so a folder with a card holds a finished network.
    """
    from ... import __version__

    card = {
        "model": config.model,
        "shortcut": {field: getattr(config, field) for field in SHORTCUT_FIELDS},
        "num_classes": len(data.classes),
        "classes": list(data.classes),
        "class_numbers": config.classes,
        "in_chans": 3,
        "img_size": config.test_size or config.img_size,
        "crop_pct": config.crop_pct,
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation,
        "data": config.data,
        "epochs": config.epochs,
        "dense_shortcuts": __version__,
    }
    write_tensors(folder / WEIGHTS, tensors, {"model": config.model})
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def crop_of(card: Mapping[str, Any]) -> float:
    """Part of the resized image's shorter side that the middle crop keeps (early cards leave it to the data)."""
    return float(card.get("crop_pct") or DATA_DEFAULTS[card["data"]]["crop_pct"])


def read_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder that `write_model` filled, and its card.

    Raises:
        DenseShortcutError: a missing or broken file, or weights of another network than the card's.
    """
    card = read_json(folder / CARD)
    try:
        config = TrainConfig(model=card["model"], **card["shortcut"])
        model = build_network(config, card["num_classes"])
    except (KeyError, TypeError) as error:
        raise DenseShortcutError(
            f"{folder / CARD} lacks what a network is built from ({error}): restore it."
        ) from error
    if "sources" in card:
        from ...surgery.sparsify import with_sources

        model = with_sources(model, card["sources"])
    tensors, _ = read_tensors(folder / WEIGHTS)
    load_all(model, tensors)
    return model, card


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    scaler: torch.amp.GradScaler | None,
    predicted: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that training goes on from, as tensors by name and as JSON, for `write_tensors`.

    Args:
        predicted: classes predicted for the test images, (N,), kept for the comparison of two networks.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["predicted"] = predicted
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    state = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    about = {
        "optimizer": _split(state["state"], "optimizer", tensors),
        "groups": _split(groups, "group", tensors),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    return tensors, about


def restore_training(
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Put back what `training_state` gave.

    Raises:
        DenseShortcutError: the state is of another network or another configuration.
    """
    load_all(model, part(tensors, "model."))
    if ema is not None:
        load_all(ema, part(tensors, "ema."))
    current = optimizer.state_dict()
    saved_groups = _join(about["groups"], tensors)
    needed = [group.keys() - {"params"} for group in current["param_groups"]]
    if len(saved_groups) != len(needed) or any(not g.keys() >= n for g, n in zip(saved_groups, needed, strict=True)):
        raise DenseShortcutError("the saved optimizer is another one: resume with the configuration of the run.")
    groups = [own | saved for own, saved in zip(current["param_groups"], saved_groups, strict=True)]
    optimizer.load_state_dict({"state": _join(about["optimizer"], tensors), "param_groups": groups})
    if scaler is not None and about["scaler"] is not None:
        scaler.load_state_dict(about["scaler"])


def load_all(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights that must have every key of the model, the shortcuts' too; else refused with the keys named."""
    started = sorted(model.state_dict().keys() - tensors.keys())
    if started:
        raise DenseShortcutError(
            f"the checkpoint is of another network: it has no {', '.join(started)}; build the one it was saved from."
        )
    load(model, tensors)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors` and leave their name. Dictionaries become lists of pairs, since
    JSON would turn the optimizer's whole-number keys into text."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[k, _split(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_split(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_split(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_split` took apart."""
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_join(v, tensors) for v in value["tuple"])
    return {k: _join(v, tensors) for k, v in value["pairs"]}
