"""The training loop, to be read from top to bottom: train an epoch, test, write a line of metrics, save the state."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...errors import DenseShortcutError
from ...files import told_when_full, write_text
from ..weight_log import SHORTCUTS, record
from .checkpoint import restore_training, training_state, write_model
from .config import TrainConfig
from .data import Data, EpochSampler, batches, epochs_of, make_loader, mixed_seed
from .data.stream import StreamShare
from .display import Display
from .network import Loss, build_network, make_loss, make_optimizer, make_scheduler, network_label
from .pretrained import start_from
from .processes import average_statistics, gradients_stay, is_split, make_accelerator, shard, synchronise_on_cpu
from .states import (
    epoch_of,
    is_sharded,
    newest_whole,
    read_shapes,
    read_state,
    saved_states,
    shards_of,
    state_path,
    whole,
    write_state,
)
from .tracking import make_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from timm.utils import ModelEmaV3
    from torchmetrics import MetricCollection

METRICS = "metrics.jsonl"
CHECKED_STEPS = 50  # reading the loss waits for the accelerator, so whether it is finite is not asked at every step
FINITE = 2**62  # stands for the first step with a bad loss where there is none

_logger = logging.getLogger(__name__)


@dataclass
class Training:
    """What the epochs of one network share. `network` is `model` as Accelerate wraps it, around the same weights."""

    label: str
    folder: Path
    model: nn.Module
    network: nn.Module
    ema: "ModelEmaV3 | None"
    optimizer: "AcceleratedOptimizer"
    scheduler: Any
    loss: Loss
    mix: Callable[..., tuple[Tensor, Tensor]] | None
    train_loader: DataLoader
    test_loader: DataLoader
    order: EpochSampler | StreamShare
    num_classes: int
    epochs_done: int

    def finished_model(self) -> nn.Module:
        """The weights that are tested and saved: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model


def train_network(
    config: TrainConfig, data: Data, folder: Path, display: Display, model: nn.Module | None = None
) -> None:
    """Train one network, from its saved state where the folder has one, and leave metrics and checkpoint there.

    Args:
        config: resolved configuration.
        folder: the network's folder; gets metrics.jsonl, a state an epoch of which two stay, model.safetensors and
            model.json.
        model: a network to go on from; None builds the configuration's.

    Raises:
        DenseShortcutError: bad input of any kind, a loss that is not finite, a state of another network.
    """
    from accelerate.utils import gather_object

    accelerator = make_accelerator(config)
    training = prepare(config, data, folder, accelerator, model)
    tracker = make_tracker(config, folder, training.epochs_done)
    display.start(training.label, training.epochs_done)

    for epoch in range(training.epochs_done, config.epochs):
        train = train_epoch(training, config, epoch, accelerator, display)
        asked = time.perf_counter()
        for each in [training.model] if training.ema is None else [training.model, training.ema.module]:
            average_statistics(each)
        tested = training.network if training.ema is None else training.ema.module
        test, predicted = test_network(tested, training.test_loader, training.num_classes, accelerator)
        test["seconds"] = time.perf_counter() - asked
        if not math.isfinite(test["loss"]):  # of weights that the very last step spoilt
            raise not_finite(training, epoch, len(training.train_loader) // config.accumulate)
        broken = set(gather_object(data.train.broken.take() + data.test.broken.take()))
        row = {"epoch": epoch + 1, **prefixed("train", train), **prefixed("test", test), "broken_images": len(broken)}
        record(folder / SHORTCUTS, epoch + 1, training.finished_model(), write=accelerator.is_main_process)
        if accelerator.is_main_process:
            for sentence in display.broken(broken):
                _logger.warning("left out: %s", sentence)
            # The line goes first: a state without its line would lose an epoch, a line without its state is dropped.
            append_line(folder / METRICS, json.dumps(row))
        save_state(training, epoch + 1, predicted, accelerator)
        if tracker is not None:
            tracker.log(row, step=epoch + 1)
        display.epoch(row)
    if tracker is not None:
        tracker.finish()
    accelerator.wait_for_everyone()
    weights = whole(training.finished_model().state_dict())
    if accelerator.is_main_process:
        write_model(folder, config, data, weights)
        _logger.info("%s: finished", training.label)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def prepare(
    config: TrainConfig, data: Data, folder: Path, accelerator: "Accelerator", model: nn.Module | None = None
) -> Training:
    """Network, optimizer, schedule, loss and loaders, at the start or where the folder's saved state left them."""
    from timm.layers import convert_sync_batchnorm

    num_classes = len(data.classes)
    train_loader = make_loader(data.train, config, training=True)
    test_loader = make_loader(data.test, config)
    split, device = is_split(config, accelerator), accelerator.device
    if model is None:
        model = build_network(config, num_classes)
        if config.weights is not None and not saved_states(folder):  # else the newest state has them all
            start_from(model, config.weights)
    synchronised = config.sync_bn and accelerator.num_processes > 1
    if synchronised and device.type != "cpu":
        model = convert_sync_batchnorm(model)
    # FSDP takes no weights with the channels last; a convolution goes by its input then.
    model = model.to(device) if split else placed(model, config, device)
    ema = make_ema(config, model)
    if split:
        for each in [model] if ema is None else [model, ema.module]:
            shard(each, device, stages=not config.grad_checkpointing)
    optimizer = make_optimizer(config, model)
    scheduler = make_scheduler(config, optimizer, len(train_loader) // config.accumulate)
    loss, mix = make_loss(config, num_classes)

    epochs_done = restore(folder, model, optimizer, ema, accelerator)
    if accelerator.is_main_process:
        drop_later_lines(folder / METRICS, epochs_done)

    network: Any = torch.compile(model) if config.compile else model
    order = epochs_of(train_loader)
    if not split:  # Accelerate would wrap it for DDP
        network = accelerator.prepare(network)
    if synchronised and device.type == "cpu":
        synchronise_on_cpu(model)
    optimizer, train_loader, test_loader = accelerator.prepare(optimizer, train_loader, test_loader)
    return Training(
        label=network_label(config),
        folder=folder,
        model=model,
        network=network,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        loss=loss,
        mix=mix,
        train_loader=train_loader,
        test_loader=test_loader,
        order=order,
        num_classes=num_classes,
        epochs_done=epochs_done,
    )


def train_epoch(
    training: Training, config: TrainConfig, epoch: int, accelerator: "Accelerator", display: Display
) -> dict[str, float]:
    """One pass over the training images.

    Returns:
        loss (mean), top1 (%), lr (of the last step), images_per_second, data_wait_share (of the time), seconds.

    Raises:
        DenseShortcutError: the loss is not finite.
    """
    from accelerate.utils import set_seed

    set_seed(mixed_seed(config.seed, epoch), device_specific=True)  # drop path; images and mixup have their own seeds
    training.order.epoch = epoch
    training.network.train()
    meters = make_meters(training.num_classes, accelerator, top5=False)
    steps = len(training.train_loader) // config.accumulate
    bad = torch.full((1,), FINITE, device=accelerator.device)
    waited, started = 0.0, time.perf_counter()

    asked = started
    for place, (images, labels) in enumerate(batches(training.train_loader)):
        waited += time.perf_counter() - asked
        step, part = divmod(place, config.accumulate)
        if step == steps:  # too few batches for one more step
            continue
        last = part == config.accumulate - 1
        images = images.contiguous(memory_format=memory_format(config))
        target = labels
        if training.mix is not None:
            np.random.seed(mixed_seed(config.seed, epoch, place, accelerator.process_index))
            images, target = training.mix(images, labels)
        training.scheduler.step_update(epoch * steps + step)

        with gradients_stay(training.network, last):
            with accelerator.autocast():
                output = training.network(images).float()
            loss = training.loss(output, target)
            accelerator.backward(loss / config.accumulate)
        bad = torch.where(loss.detach().isfinite(), bad, bad.clamp(max=step))
        if last:
            if config.clip_grad is not None:
                accelerator.clip_grad_norm_(training.model.parameters(), config.clip_grad)
            training.optimizer.step()
            training.optimizer.zero_grad()
            if training.ema is not None:
                training.ema.update(training.model, step=epoch * steps + step + 1)
            if (step + 1) % CHECKED_STEPS == 0:
                check_finite(training, epoch, bad, accelerator)

        update_meters(meters, loss.detach(), output.detach(), labels)
        if display.due:
            pace = (step + 1) * config.batch_size / (time.perf_counter() - started)
            display.step(epoch, (step + 1) / steps, pace, loss.item())
        asked = time.perf_counter()

    check_finite(training, epoch, bad, accelerator)
    result = read_meters(meters)  # this waits for the accelerator, so the clock is read after it
    seconds = time.perf_counter() - started
    return result | {
        "lr": training.optimizer.param_groups[0]["lr"],
        "images_per_second": steps * config.batch_size / seconds,
        "data_wait_share": waited / seconds,
        "seconds": seconds,
    }


def check_finite(training: Training, epoch: int, bad: Tensor, accelerator: "Accelerator") -> None:
    """Stop all processes if the loss of one was not finite; `bad`, (1,), has the first such step of this process."""
    step = int(accelerator.gather(bad).min())
    if step != FINITE:
        raise not_finite(training, epoch, step + 1)


def not_finite(training: Training, epoch: int, step: int) -> DenseShortcutError:
    """What to say of a loss that is not finite, with the step counted from 1.

    Leaving such a step out and going on would not do: running statistics of batch norm have its numbers by then.
    """
    states = saved_states(training.folder)
    way = (
        "change lr (lower), clip_grad (1) or precision (no) in the run's config.yaml and go on by --resume from "
        f"{states[0].name}, which is of epoch {epoch_of(states[0])} and good"
        if states
        else "nothing was saved before, so start again with a lower --lr, --clip-grad 1 or --precision no"
    )
    return DenseShortcutError(
        f"the loss of {training.label} was not finite in step {step} of epoch {epoch + 1}: {way}."
    )


@torch.no_grad()
def test_network(
    network: nn.Module, loader: DataLoader, num_classes: int, accelerator: "Accelerator"
) -> tuple[dict[str, float], Tensor]:
    """Score a network on every image of a loader once, whatever the number of processes.

    Returns:
        loss (mean cross-entropy), top1 (%) and, with more than five classes, top5 (%); and the predicted classes, (N,).
    """
    network.eval()
    meters = make_meters(num_classes, accelerator, top5=num_classes > 5, gathered=True)
    predicted = []
    for images, labels in batches(loader):
        with accelerator.autocast():
            output = network(images).float()
        output, labels = accelerator.gather_for_metrics((output, labels))
        losses = nn.functional.cross_entropy(output, labels, reduction="none")
        update_meters(meters, losses, output, labels)
        predicted.append(output.argmax(1).cpu())
    return read_meters(meters), torch.cat(predicted)


def make_meters(
    num_classes: int, accelerator: "Accelerator", *, top5: bool, gathered: bool = False
) -> "MetricCollection":
    """torchmetrics' mean loss and accuracies; `gathered` ones already see the batches of all processes."""
    from torchmetrics import MeanMetric, Metric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy

    sync: dict[str, Any] = {"sync_on_compute": not gathered}
    # Labels are checked when they are read; checking them here would wait for the accelerator at every step.
    micro = sync | {"average": "micro", "validate_args": False}
    meters: dict[str, Metric | MetricCollection] = {
        "loss": MeanMetric(nan_strategy="disable", **sync),
        "top1": MulticlassAccuracy(num_classes, **micro),
    }
    if top5:
        meters["top5"] = MulticlassAccuracy(num_classes, top_k=5, **micro)
    return MetricCollection(meters, compute_groups=False).to(accelerator.device)


def update_meters(meters: "MetricCollection", losses: Tensor, output: Tensor, labels: Tensor) -> None:
    """Add a batch: its loss (or each image's), class scores (N, K) and labels (N,)."""
    for name, meter in meters.items():
        meter.update(losses) if name == "loss" else meter.update(output, labels)


def read_meters(meters: "MetricCollection") -> dict[str, float]:
    """The figures: loss, and accuracies in percent."""
    return {name: float(m.compute()) * (1 if name == "loss" else 100) for name, m in meters.items()}


def prefixed(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def placed(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model on its device, in the memory format of the configuration."""
    return model.to(device).to(memory_format=memory_format(config))


def memory_format(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def make_ema(config: TrainConfig, model: nn.Module) -> "ModelEmaV3 | None":
    """timm's moving average of the weights; its decay rises with the steps, so that a short run forgets its start."""
    from timm.utils import ModelEmaV3

    if config.ema_decay is None:
        return None
    # One tensor after the other where some are shards and others are not.
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, foreach=config.strategy != "fsdp")


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: "ModelEmaV3 | None",
    accelerator: "Accelerator",
) -> int:
    """Put back the newest whole state where there is one; gives the number of epochs it has behind it."""
    from accelerate.utils import broadcast_object_list

    # The first process chooses, for on a shared disk the others may see another folder for a while.
    path = broadcast_object_list([newest_whole(folder) if accelerator.is_main_process else None])[0]
    if path is None:
        return 0
    averaged = ema.module if ema is not None else None
    tensors, about = read_state(path, shards_of(read_shapes(path), model, optimizer, averaged))
    restore_training(tensors, about, model, optimizer, averaged, accelerator.scaler)
    _logger.info("%s: goes on from %s, its newest whole state, after %d epochs", folder.name, path.name, about["epoch"])
    return about["epoch"]


def save_state(training: Training, epoch: int, predicted: Tensor, accelerator: "Accelerator") -> None:
    """Save what the next epoch needs, whole or not at all; every process calls this."""
    ema = training.ema.module if training.ema is not None else None
    optimizer = training.optimizer.optimizer
    tensors, about = training_state(training.model, optimizer, ema, accelerator.scaler, predicted)
    sharded = any(map(is_sharded, tensors.values()))
    path = state_path(training.folder, epoch, sharded=sharded)
    write_state(path, tensors, about | {"epoch": epoch}, accelerator)
    _logger.info("%s: epoch %d is done and saved in %s", training.label, epoch, path.name)


def append_line(path: Path, line: str) -> None:
    """Add a line that is on the disk when this returns."""
    with told_when_full(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut short is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DenseShortcutError(f"line {number} of {path} is not JSON: restore it or train again.") from error
    return rows


def drop_later_lines(path: Path, epochs_done: int) -> None:
    """Leave out the metrics of epochs whose state was not saved any more."""
    if path.is_file():
        rows = [row for row in read_metrics(path) if row["epoch"] <= epochs_done]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
