"""A detection run and its folder: `train`, `resume`, `evaluate`, and `compare`, which trains twins with some seeds."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import DenseShortcutError
from ...extras import need
from ...files import atomic, read_json, write_text
from ..command import dsnet
from ..environment import machine
from ..train.checkpoint import CARD
from ..train.display import Display
from ..train.loop import METRICS, make_accelerator, read_metrics
from ..train.network import make_optimizer, network_label, twin
from ..train.run import CONFIG, ENVIRONMENT, RunInterrupted, checkpoint_folder, default_name, make_folder
from .config import DetectConfig, read_recipe
from .data import Coco, Picture, read_split, report, trainable
from .figures import TWELVE, twelve_lines
from .loop import MASKS, read_detector, score, train_detector, train_loader
from .network import build_detector

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

FIGURES, FAULTS = "figures.json", "data.json"
TRAIN, COMPARE = "detect train", "detect compare"


@dataclasses.dataclass(frozen=True)
class Data:
    """Images to train on, images to score, and what is wrong with either, by split."""

    pictures: list[Picture]
    val: Coco
    faults: dict[str, dict[str, list[Any]]]


def train(config: DetectConfig) -> Path:
    """Train a detector; gives the run's folder.

    Raises:
        DenseShortcutError: bad input of any kind; a folder that exists already is left as it was.
    """
    return execute(config, resumed=None)


def resume(folder: Path, command: str) -> Path:
    """Go on with a run that was interrupted; what is finished is not trained again.

    Raises:
        DenseShortcutError: not a run's folder, or that of another command.
    """
    if not (folder / CONFIG).is_file():
        raise DenseShortcutError(f"{folder} is no run to resume, for it has no {CONFIG}: give the folder of a run.")
    about = read_json(folder / ENVIRONMENT)
    began = about["command"]
    if began != command:
        raise DenseShortcutError(
            f"{folder} was started otherwise: go on with `{dsnet(*began.split(), '--resume', folder)}`."
        )
    config = read_recipe(folder / CONFIG)
    if command == COMPARE:
        return compare(config, about["seeds"], resumed=folder)
    return execute(config, resumed=folder)


def execute(config: DetectConfig, resumed: Path | None) -> Path:
    """Check everything, make the folder, train, and report."""
    config = config.resolved()
    accelerator = accelerator_for(config)
    data = load_data(config)
    model = checked_model(config, data)
    folder = resumed or Path(config.output) / (config.name or default_name(config.detector, config.model))
    if accelerator.is_main_process and resumed is None:
        make_folder(folder, config, environment(config, TRAIN))
    accelerator.wait_for_everyone()
    from rich.console import Console

    console = Console(quiet=not accelerator.is_main_process)
    for line in heading(config, data, folder, accelerator.device):
        console.print(line, highlight=False, soft_wrap=True)
    try:
        fit(config, model, data, folder, accelerator, console)
    except KeyboardInterrupt:
        raise RunInterrupted(folder) from None
    return folder


def fit(
    config: DetectConfig, model: Any, data: Data, folder: Path, accelerator: "Accelerator", console: "Console"
) -> None:
    """Train unless that is done, and leave figures, curves and faults in the folder."""
    for note in model.backbone.body.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if not (folder / CARD).is_file():
        with Display([label(config)], config.epochs, console, summary) as display:
            figures = train_detector(config, model, data.pictures, data.val, folder, display)
        if accelerator.is_main_process:
            write_text(folder / FIGURES, json.dumps(figures, indent=2) + "\n")
            write_text(folder / FAULTS, json.dumps(data.faults, indent=2) + "\n")
            curves(folder / "curves.png", read_metrics(folder / METRICS))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print_figures(read_json(folder / FIGURES), console)
        console.print(f"figures, curves, metrics and checkpoint: {folder}", highlight=False, soft_wrap=True)


def accelerator_for(config: DetectConfig) -> "Accelerator":
    """Accelerate's view of device, precision and processes; see `train.processes.make_accelerator`."""
    accelerator = make_accelerator(config.shared())
    if config.sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise DenseShortcutError("--sync-bn needs GPUs, for PyTorch has none for processes on a CPU: leave it out.")
    return accelerator


def load_data(config: DetectConfig) -> Data:
    """Both splits of a resolved configuration's data.

    Raises:
        DenseShortcutError: see `data.read_coco` and `data.trainable`; categories that differ between the splits.
    """
    need("scoring detections", "detect")
    folder, masks = Path(str(config.data_dir)), config.detector == MASKS
    train_set, val = read_split(folder, "train", config.limit_train), read_split(folder, "val", config.limit_val)
    if train_set.categories != val.categories:
        differing = sorted({f"{i} {name}" for i, name in set(train_set.categories) ^ set(val.categories)})
        raise DenseShortcutError(f"the splits differ in the categories {', '.join(differing)}: give both the same.")
    pictures, faults = trainable(train_set, masks=masks, empty_images=config.empty_images)
    return Data(pictures, val, {"train": faults, "val": val.faults})


def checked_model(config: DetectConfig, data: Data) -> Any:
    """The detector at its start, after what cannot work with it has been refused."""
    model = build_detector(config, len(data.val.categories))
    make_optimizer(config.shared(), model)
    train_loader(config, data.pictures)
    return model


def label(config: DetectConfig) -> str:
    """What the network is, in a word: the detector and its backbone's shortcut."""
    return f"{config.detector}-{network_label(config.shared())}"


def environment(config: DetectConfig, command: str, **more: Any) -> dict[str, Any]:
    """What a run depends on besides its configuration."""
    return {"command": command, **more, "seed": config.seed, **machine()}


def heading(config: DetectConfig, data: Data, folder: Path, device: torch.device) -> list[str]:
    """A run's first lines, with what is wrong with the data."""
    where = f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    lines = [
        f"{config.detector} on {config.model} ({network_label(config.shared())}), {config.epochs} epochs on {where}",
        f"{len(data.pictures):,} training and {len(data.val.pictures):,} validation images, "
        f"{len(data.val.names)} classes: {', '.join(data.val.names[:8])}{', ...' if len(data.val.names) > 8 else ''}",
    ]
    for split, faults in data.faults.items():
        lines += report(faults, split)
    return [*lines, f"run folder: {folder}"]


def summary(row: dict[str, Any]) -> str:
    """The score of a row of metrics, as the progress line shows it."""
    if "val_AP" not in row:
        return ""
    masks = f", of masks {row['val_segm_AP']:.3f}" if "val_segm_AP" in row else ""
    return f"AP {row['val_AP']:.3f}, AP50 {row['val_AP50']:.3f}{masks}"


def print_figures(figures: dict[str, Any], console: "Console") -> None:
    """The twelve figures, of boxes and of masks where there are some, and AP by class."""
    for prefix, what in (("", "boxes"), ("segm_", "masks")):
        if f"{prefix}AP" not in figures:
            continue
        console.print(f"{what}:")
        own = {name: figures[prefix + name] for name, *_ in TWELVE}
        for line in twelve_lines(own):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        classes = figures.get(f"{prefix}classes", {})
        told = ", ".join(f"{name} {ap:.3f}" for name, ap in classes.items())
        console.print(f" AP by class: {told}", highlight=False, markup=False, soft_wrap=True)


def curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Loss and AP by epoch as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    apart = ("lr", "images_per_second", "data_wait_share", "seconds")
    for key in [k for k in rows[0] if k.startswith("train_") and k.removeprefix("train_") not in apart]:
        width = 2.5 if key == "train_loss" else 1
        left.plot([r["epoch"] for r in rows], [r[key] for r in rows], ".-", linewidth=width, label=key[6:])
    scored = [r for r in rows if "val_AP" in r]
    for name in ("AP", "AP50", "AP75"):
        right.plot([r["epoch"] for r in scored], [r[f"val_{name}"] for r in scored], ".-", label=name)
    left.set(xlabel="epoch", ylabel="training loss, mean of the epoch", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="on the validation images", ylim=(0, 1))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def compare(config: DetectConfig, seeds: Sequence[int], resumed: Path | None = None) -> Path:
    """Train the host's and the DSNet's detector with every seed and tabulate their figures; gives the folder.

    Raises:
        DenseShortcutError: as `train`; aggregate "identity", which is the host itself; no seed.
    """
    config = config.resolved()
    if config.aggregate == "identity":
        raise DenseShortcutError("--aggregate identity is the host itself: take stage, block or dense_identity.")
    if not seeds or len(set(seeds)) != len(seeds):
        raise DenseShortcutError("--seeds must be one or more different numbers.")
    accelerator = accelerator_for(config)
    data = load_data(config)
    networks = [twin(config), config]
    for each in networks:
        checked_model(each, data)
    folder = resumed or Path(config.output) / (config.name or default_name(config.detector, config.model))
    if accelerator.is_main_process and resumed is None:
        make_folder(folder, config, environment(config, COMPARE, seeds=list(seeds)))
    accelerator.wait_for_everyone()
    from rich.console import Console

    console = Console(quiet=not accelerator.is_main_process)
    for line in heading(config, data, folder, accelerator.device):
        console.print(line, highlight=False, soft_wrap=True)
    try:
        for seed in seeds:
            for each in networks:
                own = folder / f"seed{seed}" / network_label(each.shared())
                seeded = dataclasses.replace(each, seed=seed, output=str(own.parent), name=own.name)
                if accelerator.is_main_process and not own.is_dir():
                    make_folder(own, seeded, environment(seeded, TRAIN))
                accelerator.wait_for_everyone()
                console.print(f"seed {seed}", highlight=False)
                fit(seeded, build_detector(seeded, len(data.val.categories)), data, own, accelerator, console)
    except KeyboardInterrupt:
        raise RunInterrupted(folder) from None
    if accelerator.is_main_process:
        table = comparison(folder, [network_label(each.shared()) for each in networks], seeds)
        write_text(folder / "table.md", table)
        console.print(table, highlight=False, markup=False, soft_wrap=True)
    return folder


def comparison(folder: Path, labels: Sequence[str], seeds: Sequence[int]) -> str:
    """A table of AP, AP50 and AP75 of each network: mean, standard deviation, and each seed's figure."""
    rows = ["| backbone | figure | mean | standard deviation | seeds " + ", ".join(map(str, seeds)) + " |"]
    rows.append("| --- | --- | ---: | ---: | --- |")
    for name in labels:
        figures = [read_json(folder / f"seed{seed}" / name / FIGURES) for seed in seeds]
        for key in ("AP", "AP50", "AP75"):
            values = [f[key] for f in figures]
            spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
            each = ", ".join(f"{v:.3f}" for v in values)
            rows.append(f"| {name} | {key} | {statistics.mean(values):.3f} | {spread} | {each} |")
    return "\n".join(rows) + "\n"


def evaluate(
    checkpoint: Path,
    *,
    data_dir: str | None = None,
    split: str = "val",
    limit: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, print the twelve figures and write them as JSON.

    Args:
        checkpoint: a run's folder, or the model.safetensors in it.
        output: where the JSON goes; None is eval-SPLIT.json in the run's folder.
        data_dir, split, limit, batch_size, workers: what is None is the run's own.

    Raises:
        DenseShortcutError: no or a broken checkpoint, data with other categories.
    """
    folder = checkpoint_folder(checkpoint)
    model, card, config = read_detector(folder)
    given = {"data_dir": data_dir, "limit_val": limit, "batch_size": batch_size, "workers": workers}
    config = dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None}).resolved()  # type: ignore[arg-type]
    coco = read_split(Path(str(config.data_dir)), split, config.limit_val)
    if [{"id": i, "name": n} for i, n in coco.categories] != card["categories"]:
        raise DenseShortcutError(
            f"{folder} was trained on the categories {', '.join(c['name'] for c in card['categories'])} and this data "
            f"has {', '.join(coco.names)}: give --data-dir of the same categories."
        )
    accelerator = accelerator_for(config)
    from rich.console import Console

    console = Console(quiet=not accelerator.is_main_process)
    for line in report(coco.faults, split):
        console.print(line, highlight=False, soft_wrap=True)
    figures = score(model.to(accelerator.device), coco, config, accelerator, by_class=True)
    if accelerator.is_main_process:
        target = output or folder / f"eval-{split}.json"
        write_text(target, json.dumps(figures | {"images": len(coco.pictures)}, indent=2) + "\n")
        print_figures(figures, console)
        console.print(f"{len(coco.pictures):,} images; figures: {target}", highlight=False, soft_wrap=True)
    return figures
