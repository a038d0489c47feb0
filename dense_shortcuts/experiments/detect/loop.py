"""The training loop of a detector: train an epoch, score the validation images, write a line, save the state."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ...errors import DenseShortcutError
from ...files import read_json, read_tensors, write_tensors, write_text
from ..train.checkpoint import CARD, WEIGHTS, load_all, restore_training, training_state
from ..train.config import read_fields
from ..train.data import EpochSampler, batches, mixed_seed
from ..train.display import Display
from ..train.loop import METRICS, append_line, drop_later_lines, make_accelerator, prefixed
from ..train.network import make_optimizer
from .config import DetectConfig
from .data import Coco, Picture, TestImages, TrainImages, train_transform
from .figures import Meter
from .network import build_detector

if TYPE_CHECKING:
    from accelerate import Accelerator

MASKS, STATE = "maskrcnn", "state.safetensors"


@dataclass
class Training:
    """What the epochs of a run share. `network` is `model` as Accelerate wraps it, around the same weights."""

    model: Any
    network: nn.Module
    optimizer: Any
    scheduler: Any
    loader: DataLoader
    sampler: EpochSampler
    epochs_done: int


def train_detector(
    config: DetectConfig, model: nn.Module, pictures: Sequence[Picture], val: Coco, folder: Path, display: Display
) -> dict[str, Any]:
    """Train a detector, from its saved state where the folder has one; gives the last figures.

    Args:
        config: resolved configuration.
        model: the detector at its start.
        pictures: images to train on.
        val: images to score.
        folder: the run's folder; gets metrics.jsonl, state.safetensors, model.safetensors and model.json.

    Raises:
        DenseShortcutError: a broken image, a loss that is not finite, a state of another network.
    """
    accelerator = make_accelerator(config.shared())
    training = prepare(config, model, pictures, folder, accelerator)
    display.start(display.label, training.epochs_done)
    figures: dict[str, Any] = {}

    for epoch in range(training.epochs_done, config.epochs):
        row = {"epoch": epoch + 1, **prefixed("train", train_epoch(training, config, epoch, accelerator, display))}
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            asked = time.perf_counter()
            figures = score(training.model, val, config, accelerator, by_class=epoch + 1 == config.epochs)
            row |= prefixed("val", figures) | {"val_seconds": time.perf_counter() - asked}
        if accelerator.is_main_process:
            # The line goes first: a state without its line would lose an epoch, a line without its state is dropped.
            append_line(folder / METRICS, json.dumps(row))
            save_state(training, folder / STATE, epoch + 1, accelerator)
            display.epoch(row)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_detector(folder, config, val, training.model)
    accelerator.free_memory()
    return figures


def prepare(
    config: DetectConfig, model: nn.Module, pictures: Sequence[Picture], folder: Path, accelerator: "Accelerator"
) -> Training:
    """Optimizer, schedule and loader, at the start or where the folder's saved state left them."""
    loader = train_loader(config, pictures)
    model = model.to(accelerator.device)
    optimizer = make_optimizer(config.shared(), model)
    scheduler = make_schedule(config, optimizer, len(loader))
    epochs_done = 0
    if (folder / STATE).is_file():
        tensors, about = read_tensors(folder / STATE)
        restore_training(tensors, about, model, optimizer, None, accelerator.scaler)
        epochs_done = about["epoch"]
    if accelerator.is_main_process:
        drop_later_lines(folder / METRICS, epochs_done)
    sampler = loader.sampler
    assert isinstance(sampler, EpochSampler)
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return Training(model, network, optimizer, scheduler, loader, sampler, epochs_done)


def train_loader(config: DetectConfig, pictures: Sequence[Picture]) -> DataLoader:
    """Batches of (images, targets), both lists; the last batch is left out where it is smaller than the others.

    Raises:
        DenseShortcutError: fewer training images than one batch holds.
    """
    if len(pictures) < config.batch_size:
        raise DenseShortcutError(
            f"{len(pictures)} training images are fewer than one batch: take --batch-size {len(pictures)} or less."
        )
    transform = train_transform(flip=config.flip, photometric=config.photometric, iou_crop=config.iou_crop)
    return DataLoader(
        TrainImages(pictures, transform, config.seed, masks=config.detector == MASKS),
        batch_size=config.batch_size,
        sampler=EpochSampler(len(pictures), shuffle=True, seed=config.seed),
        drop_last=True,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        collate_fn=side_by_side,
        generator=torch.Generator(),
    )


def side_by_side(samples: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
    """A batch of images of different sizes: a list of the images and a list of what goes with them."""
    return [list(part) for part in zip(*samples, strict=True)]


def make_schedule(config: DetectConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """timm's schedule of the learning rate, by optimizer steps: `step_update(steps)` sets it."""
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    warmup: dict[str, Any] = {"warmup_t": config.warmup_steps, "warmup_lr_init": config.lr / 1000, "t_in_epochs": False}
    if config.sched == "cosine":
        return CosineLRScheduler(optimizer, t_initial=config.epochs * steps_per_epoch, **warmup)
    cuts = [epoch * steps_per_epoch + 1 for epoch in config.milestones]  # timm looks one step ahead
    return MultiStepLRScheduler(optimizer, decay_t=cuts, decay_rate=config.decay_rate, warmup_prefix=False, **warmup)


def train_epoch(
    training: Training, config: DetectConfig, epoch: int, accelerator: "Accelerator", display: Display
) -> dict[str, float]:
    """One pass over the training images.

    Returns:
        loss (mean of the sums of the detector's losses), each of these losses, lr (of the last step),
        images_per_second, data_wait_share (of the time), seconds.

    Raises:
        DenseShortcutError: the loss is not finite.
    """
    from accelerate.utils import set_seed

    set_seed(mixed_seed(config.seed, epoch), device_specific=True)  # sampling of anchors and regions, image sizes
    training.sampler.epoch = epoch
    training.network.train()
    steps = len(training.loader)
    sums: dict[str, Tensor] = {}
    waited, started = 0.0, time.perf_counter()

    asked = started
    for step, (images, targets) in enumerate(batches(training.loader)):
        waited += time.perf_counter() - asked
        training.scheduler.step_update(epoch * steps + step)

        losses = training.network(images, targets)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise DenseShortcutError(
                f"the loss became {loss.item()} in step {step + 1} of epoch {epoch + 1}: lower --lr, raise "
                "--warmup-steps, add --clip-grad 10, or train with --precision no."
            )
        accelerator.backward(loss)
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(training.model.parameters(), config.clip_grad)
        training.optimizer.step()
        training.optimizer.zero_grad()

        for name, value in {"loss": loss, **losses}.items():
            sums[name] = sums.get(name, 0) + value.detach()
        if display.due:
            pace = (step + 1) * config.batch_size / (time.perf_counter() - started)
            display.step(epoch, (step + 1) / steps, pace, loss.item())
        asked = time.perf_counter()

    means = {name: float(accelerator.reduce(value, "mean")) / steps for name, value in sums.items()}
    seconds = time.perf_counter() - started
    return means | {
        "lr": training.optimizer.param_groups[0]["lr"],
        "images_per_second": steps * config.batch_size / seconds,
        "data_wait_share": waited / seconds,
        "seconds": seconds,
    }


@torch.no_grad()
def score(
    model: nn.Module, val: Coco, config: DetectConfig, accelerator: "Accelerator", *, by_class: bool = False
) -> dict[str, Any]:
    """The twelve figures on every image of a split, each looked at once whatever the number of processes.

    Returns:
        the figures of boxes; with masks those of masks as "segm_" and their names; on other processes than the main
        one an empty dictionary.
    """
    from accelerate.utils import gather_object

    model.eval()
    kinds = ("bbox", "segm") if config.detector == MASKS else ("bbox",)
    meters = {kind: Meter(kind, by_class=by_class) for kind in kinds}
    for place, found in detect(model, val.pictures, config, accelerator):
        for meter in meters.values():
            meter.add(val.pictures[place], found)
    figures: dict[str, Any] = {}
    for kind, meter in meters.items():
        states = gather_object([meter.states()]) if accelerator.num_processes > 1 else []
        for process, state in enumerate(states):
            if process != accelerator.process_index:
                meter.extend(state)
        if accelerator.is_main_process:
            for picture in val.pictures:
                if picture.path is None:
                    meter.add(picture, None)
            prefix = "" if kind == "bbox" else f"{kind}_"
            figures |= {f"{prefix}{name}": value for name, value in meter.figures(val).items()}
    return figures


def detect(
    model: nn.Module, pictures: Sequence[Picture], config: DetectConfig, accelerator: "Accelerator"
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(place in the list, what was found there) for this process's share of the images whose files are there.

    What is found is boxes (n, 4) as x1 y1 x2 y2 in pixels, labels, scores and, from Mask R-CNN, masks (n, H, W).
    """
    images = TestImages(pictures)
    share = Subset(images, range(accelerator.process_index, len(images), accelerator.num_processes))
    per_process = max(1, config.batch_size // accelerator.num_processes)
    loader = DataLoader(share, batch_size=per_process, num_workers=config.workers, collate_fn=side_by_side)
    for batch, places in batches(loader):
        with accelerator.autocast():
            found = model([image.to(accelerator.device) for image in batch])
        for place, each in zip(places, found, strict=True):
            each = {key: value.float() if value.is_floating_point() else value for key, value in each.items()}
            if "masks" in each:
                each["masks"] = (each["masks"][:, 0] > 0.5).to(torch.uint8)
            yield place, each


def save_state(training: Training, path: Path, epoch: int, accelerator: "Accelerator") -> None:
    """Save what the next epoch needs, whole or not at all."""
    nothing = torch.empty(0)
    tensors, about = training_state(training.model, training.optimizer.optimizer, None, accelerator.scaler, nothing)
    write_tensors(path, tensors, about | {"epoch": epoch})


def write_detector(folder: Path, config: DetectConfig, val: Coco, model: Any) -> None:
    """Write a trained detector: its weights, then the card that says how to build it. The card comes last."""
    from ... import __version__

    card = {
        "detector": config.detector,
        "model": config.model,
        "categories": [{"id": category, "name": name} for category, name in val.categories],
        "img_size": list(config.img_size),
        "mean": model.transform.image_mean,
        "std": model.transform.image_std,
        "epochs": config.epochs,
        "dense_shortcuts": __version__,
    }
    write_tensors(folder / WEIGHTS, model.state_dict(), {"detector": config.detector, "model": config.model})
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def read_detector(folder: Path) -> tuple[nn.Module, dict[str, Any], DetectConfig]:
    """The detector of a run's folder, its card, and the run's configuration.

    Raises:
        DenseShortcutError: a missing or broken file, or weights of another network than the card's.
    """
    card = read_json(folder / CARD)
    config = read_fields(folder / "config.yaml", DetectConfig)
    try:
        model = build_detector(config, len(card["categories"]), card, load_weights=False)
    except (KeyError, TypeError) as error:
        raise DenseShortcutError(
            f"{folder / CARD} lacks what a detector is built from ({error}): restore it."
        ) from error
    tensors, _ = read_tensors(folder / WEIGHTS)
    load_all(model, tensors)
    return model, card, config
