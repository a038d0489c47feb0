"""Trackers by Accelerate beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...extras import is_installed, need
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FOLDER, PROJECT = "tensorboard", "dense-shortcuts"
EXTRA = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackio"}


def chosen_tracker(config: TrainConfig) -> str:
    """The tracker of a configuration: the named one, else TensorBoard where it is installed, else "none".

    Raises:
        DenseShortcutError: the named one is not installed.
    """
    if config.tracker is None:
        return "tensorboard" if is_installed("tensorboard") else "none"
    if config.tracker != "none":
        need(f"--tracker {config.tracker}", EXTRA[config.tracker])
    return config.tracker


def make_tracker(config: TrainConfig, folder: Path, epochs_done: int) -> "GeneralTracker | None":
    """The tracker of one network, started; it shows something on the main process only. None for "none".

    Args:
        folder: the network's; TensorBoard's files lie beside it, so that `tensorboard --logdir runs` shows all runs.
        epochs_done: what a resumed run has behind it; TensorBoard drops what it was shown of later epochs.
    """
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    name = chosen_tracker(config)
    if name == "none":
        return None
    run = f"{folder.parent.name}-{folder.name}"
    tracker: Any
    if name == "tensorboard":
        tracker = TensorBoardTracker(folder.name, folder.parent / FOLDER, purge_step=epochs_done + 1)
    elif name == "wandb":
        settings = dataclasses.asdict(config)
        tracker = WandBTracker(PROJECT, name=run, id=run, resume="allow", dir=str(folder.parent), config=settings)
    else:
        tracker = TrackioTracker(PROJECT, name=run, resume="allow", config=dataclasses.asdict(config))
    if hasattr(tracker, "start"):  # before Accelerate 1.9 the constructor does it
        tracker.start()
    return tracker
