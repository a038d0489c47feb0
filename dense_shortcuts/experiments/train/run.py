"""A run and its folder: `compare` trains a host, its DSNet and a DenseNet, `train` one, `evaluate` scores one."""

import dataclasses
import datetime
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import ops, shipped
from ...errors import DenseShortcutError
from ...files import read_json, write_text
from ..command import dsnet
from ..environment import machine
from . import comparison, report
from .checkpoint import CARD, WEIGHTS, read_model
from .config import NetworkName, TrainConfig, absolute, read_yaml, write_yaml
from .data import Data, load_data
from .display import Display
from .fingerprint import file_fingerprint, fingerprints
from .log import run_log
from .loop import METRICS, make_loader, placed, read_metrics, test_network, train_network
from .measure import images_at_once, inference_speed, multiply_adds, parameters, training_step_memory
from .network import build_network, make_optimizer, network_label
from .pretrained import start_from, weights_file
from .processes import make_accelerator, repeatable, told_when_lost
from .states import read_predicted, remove
from .tracking import chosen_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console


class RunInterrupted(KeyboardInterrupt):
    """A run was interrupted; `folder` is where it can be resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted: {folder}")
        self.folder = folder


CONFIG, ENVIRONMENT, TABLE = "config.yaml", "environment.json", "table.md"

_logger = logging.getLogger(__name__)


def compare(
    config: TrainConfig, line: str = "", networks: Sequence[NetworkName] = (), seeds: Sequence[int] = ()
) -> Path:
    """Train host, DSNet and DenseNet with the same recipe and seeds; gives the run's folder.

    Args:
        line: the command as it was typed, for the run's folder.
        networks: which ones; none named is all that there can be.
        seeds: those of the networks in the folder itself, then those in folders of their own; none given is the
            configuration's and the next one.

    Raises:
        DenseShortcutError: bad input of any kind; a folder that exists already is left as it was.
    """
    if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
        raise DenseShortcutError("--seeds must be different whole numbers from 0 on.")
    seeds = list(seeds) or [config.seed, config.seed + 1]
    asked = {"networks": list(networks), "seeds": seeds}
    return execute(dataclasses.replace(config, seed=seeds[0]), "compare", resumed=None, line=line, asked=asked)


def train(config: TrainConfig, line: str = "") -> Path:
    """Train one network; gives the run's folder.

    Raises:
        DenseShortcutError: as `compare`.
    """
    return execute(config, "train", resumed=None, line=line)


def resume(folder: Path, command: str) -> Path:
    """Go on with a run that was interrupted; a finished network is not trained again.

    Args:
        folder: the run's folder.
        command: "compare" or "train", as the run was started.

    Raises:
        DenseShortcutError: not a run's folder, or that of the other command.
    """
    if not (folder / CONFIG).is_file():
        raise DenseShortcutError(f"{folder} is no run to resume, for it has no {CONFIG}: give the folder of a run.")
    about = read_json(folder / ENVIRONMENT)
    began = about.get("command")
    if began != command:
        raise DenseShortcutError(f"{folder} was started otherwise: go on with `{dsnet(began, '--resume', folder)}`.")
    return execute(read_yaml(folder / CONFIG), command, resumed=folder, asked=asked_of(about))


def asked_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison's environment.json says of its networks and seeds, none for a run with one network."""
    return {key: about[key] for key in ("networks", "seeds") if key in about}


def execute(
    config: TrainConfig, command: str, resumed: Path | None, line: str = "", asked: Mapping[str, Any] | None = None
) -> Path:
    """Check everything, make the folder, train what is not trained yet, and report.

    `asked` has the networks and seeds of a comparison.
    """
    asked = asked or {}
    config = config.resolved()
    if command == "compare" and config.aggregate == "identity":
        raise DenseShortcutError("--aggregate identity is the host itself: take stage, block or dense_identity.")
    chosen_tracker(config)
    accelerator = make_accelerator(config)
    data = load_data(config)
    networks = networks_of(config, command, asked, len(data.classes))
    for each in networks.values():  # what cannot work is refused before the folder is made
        model = build_network(each, len(data.classes))
        make_optimizer(each, model)
        if each.weights is not None and resumed is None:
            start_from(model, each.weights)
    make_loader(data.train, config, training=True)

    folder = resumed or Path(config.output) / (config.name or default_name(config.data, config.model))
    if accelerator.is_main_process and resumed is None:
        make_folder(folder, config, environment(config, command, line, data) | dict(asked))
    accelerator.wait_for_everyone()
    with run_log(folder, accelerator.process_index):
        _logger.info(
            "%s by `dsnet %s`: %s", "begun" if resumed is None else "resumed", command, setting(config, accelerator)
        )
        try:
            with repeatable(config), told_when_lost(accelerator):
                seeds = asked.get("seeds", [config.seed])
                train_and_report(config, networks, seeds, data, folder, accelerator)
        except KeyboardInterrupt:
            _logger.warning("interrupted by a signal")
            raise RunInterrupted(folder) from None
        except DenseShortcutError as error:
            _logger.warning("stopped: %s", error)
            raise
        _logger.info("the run is finished")
    return folder


def setting(config: TrainConfig, accelerator: "Accelerator") -> str:
    """What bits may depend on: device, threads, back end, processes; a resumed run may have others."""
    backend = ops.choose(torch.empty(1, 1, 1, 1, device=accelerator.device))
    parts = [
        f"{accelerator.num_processes} processes ({config.strategy})" if accelerator.num_processes > 1 else "1 process"
    ]
    parts += [f"on {accelerator.device.type}, {torch.get_num_threads()} threads, {backend} back end"]
    return ", ".join([*parts, *(["deterministic"] if config.deterministic else [])])


def train_and_report(
    config: TrainConfig,
    networks: Mapping[str, TrainConfig],
    seeds: Sequence[int],
    data: Data,
    folder: Path,
    accelerator: "Accelerator",
) -> None:
    """Train each network that is not finished, with each seed, then measure, compare and print."""
    from rich.console import Console

    labels = [network_label(each) for each in networks.values()]
    console = Console(quiet=not accelerator.is_main_process)
    console.print(heading(config, data, labels, folder, accelerator.device), highlight=False, soft_wrap=True)
    for seed in seeds:
        place = seed_folder(folder, config, seed)
        if accelerator.is_main_process and not place.is_dir():
            place.mkdir()
            write_text(place / CONFIG, write_yaml(dataclasses.replace(config, seed=seed, name=folder.name)))
        accelerator.wait_for_everyone()
        if len(seeds) > 1:
            console.print(f"seed {seed}", highlight=False)
        seeded = [dataclasses.replace(each, seed=seed) for each in networks.values()]
        train_all(seeded, data if seed == config.seed else load_data(seeded[0]), place, console)
    if accelerator.is_main_process:
        finish(config, networks, seeds, data, folder, accelerator.device, console)
    accelerator.wait_for_everyone()


def train_all(networks: Sequence[TrainConfig], data: Data, folder: Path, console: "Console") -> None:
    """Train the networks of one seed that are not finished, each in its folder in this one."""
    labels = [network_label(each) for each in networks]
    with Display(labels, networks[0].epochs, console) as display:
        for each, label in zip(networks, labels, strict=True):
            (folder / label).mkdir(exist_ok=True)
            if not (folder / label / CARD).is_file():
                _logger.info("%s: trains", label)
                train_network(each, data, folder / label, display)
            display.finished(label, f"{read_metrics(folder / label / METRICS)[-1]['test_top1']:.2f} % accuracy")


def seed_folder(folder: Path, config: TrainConfig, seed: int) -> Path:
    """Where the networks of a seed lie: in the run's folder for its own, in one like a run's for the others."""
    return folder if seed == config.seed else folder / f"seed-{seed}"


def networks_of(
    config: TrainConfig, command: str, asked: Mapping[str, Any], num_classes: int
) -> Mapping[str, TrainConfig]:
    """The configurations to train by name: a comparison's, else one without a name."""
    if command == "train":
        return {"": config}
    return comparison.compared_networks(config, asked["networks"], num_classes)


def default_name(*parts: str) -> str:
    """These parts and the time; every process of a run gets the first one's."""
    from accelerate.utils import broadcast_object_list

    name = f"{'-'.join(parts)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return broadcast_object_list([name])[0]


def make_folder(folder: Path, config: Any, about: dict[str, Any]) -> None:
    """Make a run's folder with its configuration, whole or not at all; one that exists is refused and left alone."""
    if folder.exists():
        raise DenseShortcutError(
            f"{folder} exists already: choose another --name, or go on with it by --resume {shlex.quote(str(folder))}."
        )
    begun = folder.with_name(f".{folder.name}.tmp")
    try:
        if begun.exists():  # of a process that was killed here
            remove(begun)
        begun.mkdir(parents=True)
        write_text(begun / ENVIRONMENT, json.dumps(about, indent=2) + "\n")
        write_text(begun / CONFIG, write_yaml(dataclasses.replace(config, name=folder.name)))
        os.replace(begun, folder)
    except OSError as error:
        raise DenseShortcutError(f"cannot make {folder} ({error.strerror}): choose another --output.") from error


def environment(config: TrainConfig, command: str, line: str, data: Data) -> dict[str, Any]:
    """What a run depends on besides its configuration."""
    about = {"command": command, "line": line, "seed": config.seed, **machine(), "data": fingerprints(data)}
    if config.weights is not None:
        file = weights_file(config.weights)
        about["weights"] = {"file": str(file), "content": file_fingerprint(file)}
    return about


def heading(config: TrainConfig, data: Data, labels: Sequence[str], folder: Path, device: torch.device) -> str:
    """A run's first lines."""
    part = "test" if config.validation is None else "validation"
    where = f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return (
        f"{config.model} ({' against '.join(reversed(labels))}), {config.epochs} epochs of {config.data} on {where}\n"
        f"{len(data.train):,} training and {len(data.test):,} {part} images of {config.img_size}x{config.img_size} "
        f"pixels, {len(data.classes)} classes\nrun folder: {folder}"
    )


def finish(
    config: TrainConfig,
    networks: Mapping[str, TrainConfig],
    seeds: Sequence[int],
    data: Data,
    folder: Path,
    device: torch.device,
    console: "Console",
) -> None:
    """Measure what the trained networks cost, write table and curves, and say what they are worth."""
    places = [seed_folder(folder, config, seed) for seed in seeds]
    labels = {name: network_label(each) for name, each in networks.items()}
    histories = {name: [read_metrics(place / label / METRICS) for place in places] for name, label in labels.items()}
    with console.status("measuring speed and memory"):
        rows = measured_rows(networks, folder, histories, len(data.test))
    note = report.footnote(device, images_at_once(config), len(data.test), len(seeds))
    note += f" {report.data_note([history for runs in histories.values() for history in runs])}"
    table: dict[str, Any] = {"networks": list(rows.values()), "note": note, "seeds": list(seeds)}
    if len(networks) > 1:
        true = torch.from_numpy(data.test.images.labels)
        predicted = {
            name: torch.stack([read_predicted(place / label) for place in places]) for name, label in labels.items()
        }
        pairs = {(a, b): comparison.paired(predicted[a], predicted[b], true) for a, b in combinations(networks, 2)}
        table["paired"] = [{"first": a, "second": b, **pair} for (a, b), pair in pairs.items()]
        table["verdict"] = comparison.verdict(rows, pairs)
        comparison.picture(folder / "curves.png", rows, histories)
    else:
        report.curves(folder / "curves.png", {label: histories[name][0] for name, label in labels.items()})
    sentences = table.get("verdict", [])
    write_text(folder / TABLE, report.markdown(table["networks"], note, sentences))
    write_text(folder / "table.json", json.dumps(table, indent=2) + "\n")

    console.print(report.rich_table(table["networks"]))
    console.print(note, style="dim", highlight=False)
    console.print(f"\ntable, curves, metrics and checkpoints: {folder}", highlight=False, soft_wrap=True)
    for sentence in sentences or [f"{table['networks'][0]['test_top1']:.2f} % accuracy."]:
        console.print(sentence, style="bold", highlight=False)
    if config.data in ("fashion", "digits"):
        real = dsnet("compare", "--recipe", "cifar100-cpu", "--data-dir", "DIR")
        console.print(f"with CIFAR-100 in a folder DIR: {real}", highlight=False, markup=False, soft_wrap=True)
    again = next_command(config, folder, seeds, "compare" if len(networks) > 1 else "train")
    console.print(f"next: {again}", highlight=False, markup=False, soft_wrap=True)


def measured_rows(
    networks: Mapping[str, TrainConfig],
    folder: Path,
    histories: Mapping[str, Sequence[report.History]],
    test_images: int,
) -> dict[str, report.Row]:
    """A row for each network, all measured side by side."""
    configs = list(networks.values())
    models = [read_model(folder / network_label(each))[0] for each in configs]
    speeds = inference_speed(models, configs[0])
    rows = {}
    for (name, each), model, speed in zip(networks.items(), models, speeds, strict=True):
        label = network_label(each)
        num_classes = read_json(folder / label / CARD)["num_classes"]
        costs = {
            "parameters": parameters(model),
            "multiply_adds": multiply_adds(model, each.img_size or 32),
            "infer_images_per_second": speed,
            "peak_bytes": training_step_memory(each, num_classes),
        }
        rows[name] = report.row(comparison.TITLES.get(name, label), label, histories[name], test_images, costs)
    return rows


def next_command(config: TrainConfig, folder: Path, seeds: Sequence[int], command: str) -> str:
    """The same run with other seeds, from any folder: a few seeds do not tell a gain from luck."""
    others = [max(seeds) + 1 + place for place in range(len(seeds))]
    name = f"{folder.name.removesuffix(f'-seed-{seeds[0]}')}-seed-{others[0]}"
    flag = "--seeds" if command == "compare" else "--seed"
    return dsnet(command, "--recipe", absolute(str(folder / CONFIG)), "--name", name, flag, *others)


def evaluate(checkpoint: Path, **given: Any) -> dict[str, Any]:
    """Score a checkpoint on test images.

    Args:
        checkpoint: a network's folder, or a file in it.
        **given: data, data_dir, limit_test, batch_size, workers; what is None or left out is the run's own, from the
            config.yaml of its folder.

    Returns:
        loss, top1 (%), top5 (%) with more than five classes, images, model, checkpoint.

    Raises:
        DenseShortcutError: no or a broken checkpoint, weights of another network, data with other classes.
    """
    folder = checkpoint_folder(checkpoint)
    model, card = read_model(folder)
    config, data = data_of(folder, card, **given)
    accelerator = make_accelerator(config)
    network, loader = accelerator.prepare(placed(model, config, accelerator.device), make_loader(data.test, config))
    figures, _ = test_network(network, loader, len(data.classes), accelerator)
    return {**figures, "images": len(data.test), "model": card["model"], "checkpoint": str(folder)}


def checkpoint_folder(checkpoint: Path) -> Path:
    """The folder of a network, from that, the weights in it, or `shipped` for the network in the package.

    Raises:
        DenseShortcutError: none of them.
    """
    checkpoint = shipped.checkpoint(checkpoint)
    if not checkpoint.is_dir() and (checkpoint.name != WEIGHTS or not checkpoint.is_file()):
        raise DenseShortcutError(f"{checkpoint} is no checkpoint: give a network's folder or the {WEIGHTS} in it.")
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def data_of(folder: Path, card: dict[str, Any], training: bool = False, **given: Any) -> tuple[TrainConfig, Data]:
    """The configuration and images of the run that a network's folder is part of.

    Args:
        folder: the network's folder.
        card: the network's.
        training: whether the training images are wanted too; else there is one of them.
        **given: as in `evaluate`.

    Raises:
        DenseShortcutError: the images are not there, or of other classes.
    """
    changes = {key: value for key, value in given.items() if value is not None}
    if changes.get("data", card["data"]) != card["data"]:
        changes = {"data_dir": None, "workers": None, "loader": "auto", "classes": None} | changes
    changes |= {"test_size": card["img_size"], "validation": None}
    config = dataclasses.replace(run_config(folder, card), **changes).resolved()
    data = load_data(config if training else dataclasses.replace(config, limit_train=1))
    if list(data.classes) != card["classes"]:
        raise DenseShortcutError(
            f"{folder} was trained on {card['num_classes']} classes of {card['data']} and these images have "
            f"{len(data.classes)} other ones: give --data and --data-dir of the same classes."
        )
    return config, data


def run_config(folder: Path, card: dict[str, Any]) -> TrainConfig:
    """The configuration of the run that a network's folder is part of, else one of the card's data."""
    path = folder.parent / CONFIG
    if path.is_file():
        return read_yaml(path)
    return TrainConfig(model=card["model"], data=card["data"], classes=card.get("class_numbers"))
