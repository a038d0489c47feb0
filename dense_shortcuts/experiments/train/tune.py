"""Training on with a network that was changed: the settings of its own run, fewer epochs, a lower learning rate."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import DenseShortcutError
from .checkpoint import write_model
from .config import TrainConfig, TuneConfig
from .data import Data
from .display import Display
from .loop import METRICS, make_accelerator, make_loader, placed, read_metrics, test_network, train_network
from .network import network_label
from .run import RunInterrupted, data_of, environment, make_folder


@dataclass(frozen=True)
class Tuned:
    """A changed network in a run's folder of its own.

    Attributes:
        folder: the network's folder.
        data, images: the test images, and their number.
        start: accuracy as it was changed, %.
        end: accuracy after the last epoch, %; as `start` without epochs.
    """

    folder: Path
    data: str
    images: int
    start: float
    end: float


def tune(model: nn.Module, config: TrainConfig, data: Data, how: TuneConfig, *, name: str, command: str) -> Tuned:
    """Train a changed network on, and leave it in a new run's folder.

    Args:
        model: what to go on from.
        config: the configuration that builds such a network, with the run's settings.
        data: its images.
        how: the settings of the further training.
        name: of the run where `how` has none.
        command: what made it, for the run's records.

    Raises:
        DenseShortcutError: the folder exists.
    """
    run = how.output / (name if how.name is None else how.name)
    if run.exists():
        raise DenseShortcutError(f"{run} exists already: choose another --name.")
    schedule: dict[str, Any] = {"epochs": max(how.epochs, 1), "lr": how.lr, "sched": "cosine", "warmup_epochs": 0}
    schedule["weights"] = None  # the model is what it goes on from
    config = dataclasses.replace(config, **schedule, name=run.name, output=str(how.output)).resolved()
    start = accuracy(model, config, data)
    make_folder(run, config, environment(config, command, command, data))
    folder = run / network_label(config)
    folder.mkdir()
    if not how.epochs:
        write_model(folder, config, data, model.state_dict())
        return Tuned(folder, config.data, len(data.test), start, start)
    from rich.console import Console

    try:
        with Display([network_label(config)], how.epochs, Console()) as display:
            train_network(config, data, folder, display, model)
    except KeyboardInterrupt:
        raise RunInterrupted(run) from None
    return Tuned(folder, config.data, len(data.test), start, read_metrics(folder / METRICS)[-1]["test_top1"])


def accuracy(model: nn.Module, config: TrainConfig, data: Data) -> float:
    """Accuracy on the test images, %."""
    accelerator = make_accelerator(config)
    network, loader = accelerator.prepare(placed(model, config, accelerator.device), make_loader(data.test, config))
    figures, _ = test_network(network, loader, len(data.classes), accelerator)
    return float(figures["top1"])


def settings(folder: Path, card: dict[str, Any], how: TuneConfig) -> tuple[TrainConfig, Data]:
    """The configuration and images to go on with: those of the network's run, but for what `how` says of the images."""
    given = {"data_dir": how.data_dir, "limit_train": how.limit_train, "limit_test": how.limit_test}
    config, data = data_of(folder, card, training=True, **given)
    return dataclasses.replace(config, model=card["model"], **card["shortcut"]), data


@torch.no_grad()
def recalibrate(model: nn.Module, norms: nn.ModuleList, config: TrainConfig, data: Data, batches: int = 50) -> None:
    """Set the running statistics of some batch norms to the average over training batches; nothing else changes."""
    loader = make_loader(data.train, config, training=True)
    before = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
        norm.train()
    for _, (images, _labels) in zip(range(batches), loader, strict=False):
        model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
