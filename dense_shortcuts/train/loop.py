"""The training loop, to be read from top to bottom: train an epoch, test, write a line of metrics, save the state."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import DenseShortcutError
from ..weights import SHORTCUTS, record
from .checkpoint import STATE, read_tensors, restore_training, training_state, write_model, write_tensors, write_text
from .config import TrainConfig
from .data import Data, EpochSampler, TransformedImages, mixed_seed, worker_error
from .display import Display
from .network import Loss, build_network, make_loss, make_optimizer, make_scheduler, network_label

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from timm.utils import ModelEmaV3
    from torchmetrics import MetricCollection

METRICS = "metrics.jsonl"


def make_accelerator(config: TrainConfig) -> "Accelerator":
    """Accelerate's view of device, precision and processes.

    Raises:
        DenseShortcutError: the device cannot do this precision, or the batch does not divide among the processes.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    try:
        accelerator = Accelerator(
            mixed_precision=config.precision, dataloader_config=DataLoaderConfiguration(split_batches=True)
        )
    except ValueError as error:
        raise DenseShortcutError(f"--precision {config.precision} does not work here: {error}") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise DenseShortcutError("--precision fp16 needs a GPU, for a CPU has no loss scaling: take bf16 or no.")
    if config.batch_size % accelerator.num_processes:
        raise DenseShortcutError(
            f"--batch-size {config.batch_size} does not divide among {accelerator.num_processes} processes: "
            "take a multiple."
        )
    return accelerator


def make_loader(images: TransformedImages, config: TrainConfig, *, training: bool = False) -> DataLoader:
    """Batches of (images, labels). Training leaves out the last batch where it is smaller than the others.

    Raises:
        DenseShortcutError: fewer training images than one batch holds.
    """
    if training and len(images) < config.batch_size:
        raise DenseShortcutError(
            f"{len(images)} training images are fewer than one batch: take --batch-size {len(images)} or less."
        )
    return DataLoader(
        images,
        batch_size=config.batch_size,
        sampler=EpochSampler(len(images), shuffle=training, seed=config.seed),
        drop_last=training,
        num_workers=config.workers or 0,
        persistent_workers=bool(config.workers),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the seeds of worker processes come from the generator of drop path
    )


@dataclass
class Training:
    """What the epochs of one network share. `network` is `model` as Accelerate wraps it, around the same weights."""

    label: str
    model: nn.Module
    network: nn.Module
    ema: "ModelEmaV3 | None"
    optimizer: "AcceleratedOptimizer"
    scheduler: Any
    loss: Loss
    mix: Callable[..., tuple[Tensor, Tensor]] | None
    train_loader: DataLoader
    test_loader: DataLoader
    sampler: EpochSampler
    num_classes: int
    epochs_done: int

    def finished_model(self) -> nn.Module:
        """The weights that are tested and saved: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model


def train_network(config: TrainConfig, data: Data, folder: Path, display: Display) -> None:
    """Train one network, from its saved state where the folder has one, and leave metrics and checkpoint there.

    Args:
        config: resolved configuration.
        folder: the network's folder; gets metrics.jsonl, state.safetensors, model.safetensors and model.json.

    Raises:
        DenseShortcutError: bad input of any kind, a loss that is not finite, a state of another network.
    """
    accelerator = make_accelerator(config)
    training = prepare(config, data, folder, accelerator)
    display.start(training.label, training.epochs_done)

    for epoch in range(training.epochs_done, config.epochs):
        train = train_epoch(training, config, epoch, accelerator, display)
        asked = time.perf_counter()
        tested = training.network if training.ema is None else training.ema.module
        test, predicted = test_network(tested, training.test_loader, training.num_classes, accelerator)
        test["seconds"] = time.perf_counter() - asked
        if accelerator.is_main_process:
            row = {"epoch": epoch + 1, **prefixed("train", train), **prefixed("test", test)}
            # The line goes first: a state without its line would lose an epoch, a line without its state is dropped.
            append_line(folder / METRICS, json.dumps(row))
            record(folder / SHORTCUTS, epoch + 1, training.finished_model())
            save_state(training, folder / STATE, epoch + 1, predicted, accelerator)
            display.epoch(row)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_model(folder, config, data, training.finished_model())
    accelerator.free_memory()


def prepare(config: TrainConfig, data: Data, folder: Path, accelerator: "Accelerator") -> Training:
    """Network, optimizer, schedule, loss and loaders, at the start or where the folder's saved state left them."""
    num_classes = len(data.classes)
    train_loader = make_loader(data.train, config, training=True)
    test_loader = make_loader(data.test, config)
    model = placed(build_network(config, num_classes), config, accelerator.device)
    ema = make_ema(config, model)
    optimizer = make_optimizer(config, model)
    scheduler = make_scheduler(config, optimizer, len(train_loader))
    loss, mix = make_loss(config, num_classes)

    epochs_done = restore(folder / STATE, model, optimizer, ema, accelerator)
    if accelerator.is_main_process:
        drop_later_lines(folder / METRICS, epochs_done)

    network = torch.compile(model) if config.compile else model
    sampler = train_loader.sampler
    assert isinstance(sampler, EpochSampler)
    network, optimizer, train_loader, test_loader = accelerator.prepare(network, optimizer, train_loader, test_loader)
    return Training(
        label=network_label(config),
        model=model,
        network=network,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        loss=loss,
        mix=mix,
        train_loader=train_loader,
        test_loader=test_loader,
        sampler=sampler,
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
    training.sampler.epoch = epoch
    training.network.train()
    meters = make_meters(training.num_classes, accelerator, top5=False)
    steps = len(training.train_loader)
    waited, started = 0.0, time.perf_counter()

    asked = started
    for step, (images, labels) in enumerate(batches(training.train_loader)):
        waited += time.perf_counter() - asked
        images = images.contiguous(memory_format=memory_format(config))
        target = labels
        if training.mix is not None:
            np.random.seed(mixed_seed(config.seed, epoch, step, accelerator.process_index))
            images, target = training.mix(images, labels)
        training.scheduler.step_update(epoch * steps + step)

        output = training.network(images).float()
        loss = training.loss(output, target)
        accelerator.backward(loss)
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(training.model.parameters(), config.clip_grad)
        training.optimizer.step()
        training.optimizer.zero_grad()
        if training.ema is not None:
            training.ema.update(training.model, step=epoch * steps + step + 1)

        update_meters(meters, loss.detach(), output.detach(), labels)
        if display.due:
            pace = (step + 1) * config.batch_size / (time.perf_counter() - started)
            display.step(epoch, (step + 1) / steps, pace, loss.item())
        asked = time.perf_counter()

    result = read_meters(meters)  # this waits for the accelerator, so the clock is read after it
    seconds = time.perf_counter() - started
    if not math.isfinite(result["loss"]):
        raise DenseShortcutError(
            f"the loss of {training.label} became {result['loss']} in epoch {epoch + 1}: "
            "lower --lr, add --clip-grad 1, or train with --precision no."
        )
    return result | {
        "lr": training.optimizer.param_groups[0]["lr"],
        "images_per_second": steps * config.batch_size / seconds,
        "data_wait_share": waited / seconds,
        "seconds": seconds,
    }


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


def batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; an error in one of its processes is raised as the one sentence that it was."""
    try:
        yield from loader
    except DenseShortcutError as error:
        raise worker_error(error) from error


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

    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay is not None else None


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: "ModelEmaV3 | None", accelerator: "Accelerator"
) -> int:
    """Put back a saved state where there is one; gives the number of epochs it has behind it."""
    if not path.is_file():
        return 0
    tensors, about = read_tensors(path)
    restore_training(tensors, about, model, optimizer, ema.module if ema is not None else None, accelerator.scaler)
    return about["epoch"]


def save_state(training: Training, path: Path, epoch: int, predicted: Tensor, accelerator: "Accelerator") -> None:
    """Save what the next epoch needs, whole or not at all."""
    ema = training.ema.module if training.ema is not None else None
    optimizer = training.optimizer.optimizer
    tensors, about = training_state(training.model, optimizer, ema, accelerator.scaler, predicted)
    write_tensors(path, tensors, about | {"epoch": epoch})


def append_line(path: Path, line: str) -> None:
    """Add a line that is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
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
