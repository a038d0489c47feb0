"""The configuration of a run: one flat dataclass that is also the command line and the YAML recipe."""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ...errors import DenseShortcutError
from ..command import dsnet

Config = TypeVar("Config")
DATA_FOLDER_VARIABLE = "DENSE_SHORTCUTS_DATA"
DataName = Literal[
    "fashion", "digits", "cifar10", "cifar100", "tiny-imagenet", "imagefolder", "parquet", "streaming", "webdataset"
]
NetworkName = Literal["host", "dsnet", "densenet"]  # what a comparison trains

STREAMS = ("streaming", "webdataset")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, and how. Values left at None are chosen by the data set (`resolved`)."""

    model: str = "dsnet32"
    """Any timm name: a DSNet (`dsnet models` lists them) or a host such as resnet50."""
    aggregate: Literal["stage", "block", "dense_identity", "identity"] = "stage"
    """What a dense shortcut sums: feature maps of the stage, outputs of residual branches, or maps as they are;
    `identity` is the host network without dense shortcuts."""
    norm: Literal["group", "batch", "layer", "instance", "none", "auto"] = "auto"
    """Normalisation of each summed feature map; `auto` is layer norm for tokens, such as a ViT's, else batch norm."""
    groups: int | None = None
    """Groups of the group norm; None takes at most 32, four channels each at least."""
    center: bool = True
    """Whether the norm subtracts the mean, as in the paper; else it divides by the root mean square alone."""
    init: Literal["nearest", "uniform", "ones", "zeros", "random"] | None = None
    """Start of the shortcut weights; None is `uniform`, or `zeros` with keep-identity."""
    inner: bool | None = None
    """DS2: a shortcut inside each bottleneck too; None is the model's own."""
    inner_start: float = 0.0
    """Start of the weights of DS2's inner shortcuts."""
    weighting: Literal["channel", "softmax", "gate", "attention"] = "channel"
    """How the weights of earlier maps come about: the paper's, or those of its relatives."""
    pattern: Literal["all", "powers"] = "all"
    """Which earlier maps a block sums: all, or those a power of two back."""
    window: int | None = None
    """Sum so many of the nearest maps only; None is no limit."""
    keep_identity: bool = False
    """Keep the host's identity shortcut beside the dense one."""
    zero_init_last: bool | None = None
    """Start the last norm of each residual branch at zero; None is the model's own: timm's ResNets do, DSNets
    do not."""
    channels: tuple[int, ...] = ()
    """Width of each stage before expansion, for ResNets of another width; () is the model's own."""
    layers: tuple[int, ...] = ()
    """Blocks of each stage, for ResNets of another depth; () is the model's own."""
    weights: str | None = None
    """Weights to start from: a run's folder, a network's in it, or a safetensors file. A host's go into its DSNet too,
    and a classifier of another size is left out. They are read where training begins, not by --resume."""

    data: DataName = "fashion"
    """A part of Fashion-MNIST that comes with the package, scikit-learn's handwritten digits, CIFAR-10 and -100, Tiny
    ImageNet, a folder with train/ and val/ or test/, parquet files as on the Hugging Face hub (in memory, or streamed),
    or WebDataset shards: docs/data.md."""
    data_dir: str | None = None
    """Folder of the data; None is the folder of that name in $DENSE_SHORTCUTS_DATA for CIFAR and Tiny ImageNet."""
    hub: str | None = None
    """With `streaming`: a data set on the Hugging Face hub, such as ILSVRC/imagenet-1k, in place of a folder."""
    train_files: str | None = None
    """Training files in the data folder, as a pattern such as train-{000..146}.tar; None is train*."""
    test_files: str | None = None
    """Test files in the data folder, as a pattern; None is validation*, valid*, val* or test*, in this order."""
    image_column: str | None = None
    """Column of parquet files that holds the images; None finds it."""
    label_column: str | None = None
    """Column of parquet files that holds the labels; None finds it."""
    train_images: int | None = None
    """Images of an epoch, for WebDataset shards without an index _info.json."""
    num_classes: int | None = None
    """Number of classes, for WebDataset shards without classes.txt."""
    shuffle_buffer: int = 2000
    """Images among which each process that reads a stream (`streaming`, `webdataset`) draws the next one."""
    img_size: int | None = None
    """Side of the square training images in pixels; None is the data's own."""
    test_size: int | None = None
    """Side of the square test images; None is that of the training images."""
    crop_pct: float | None = None
    """Share of a test image's side that the crop in its middle keeps; None is 0.875 for photographs, else 1."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How images are resized; None is bicubic for photographs, else bilinear."""
    classes: str | None = None
    """Use only these classes, by their numbers, such as 0-79 or 3,5,8-9; they are numbered anew from 0. None is all."""
    limit_train: int | None = None
    """Use only so many training images (a fixed sample; of a stream, so many an epoch)."""
    limit_test: int | None = None
    """Use only so many test images (a fixed sample)."""
    validation: int | None = None
    """Hold out so many training images (a fixed sample) and test on them in place of the test images: for
    choosing settings."""
    loader: Literal["auto", "device", "workers"] = "auto"
    """Where images are prepared: `device` keeps them there as bytes and crops, flips and normalises them there,
    `workers` are processes; `auto` takes the device for sets of small images that fit, without auto-augment."""
    workers: int | None = None
    """Worker processes that prepare images; None is 0 for images in the package, else one less than the cores, 8 at
    most."""
    max_broken: float = 0.001
    """Share of the images of a set that may be broken files (one may always be, unless this is 0)."""

    epochs: int = 3
    """Passes over the training images; a few, for a first look: recipes have those of a whole training."""
    batch_size: int = 64
    """Images a step, over all processes together."""
    opt: str = "sgd"
    """Optimizer, by timm's name (sgd is SGD with Nesterov momentum)."""
    lr: float = 0.1
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum, for optimizers that have one."""
    weight_decay: float = 5e-4
    """Weight decay on weights of convolutions and linear layers, and on nothing else."""
    sched: Literal["cosine", "multistep"] = "cosine"
    """Learning rate after the warm-up: cosine to zero, or a cut at each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `multistep` cuts the learning rate."""
    decay_rate: float = 0.1
    """Factor of each cut."""
    warmup_epochs: int | None = None
    """Epochs over which the learning rate rises linearly; None is 1, or 0 where there is only one epoch."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""

    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or binary cross-entropy of each class."""
    bce_threshold: float | None = None
    """With `bce`: mixed targets above it count as 1 and the others as 0; None leaves them as they are."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    auto_augment: str | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5."""
    aug_repeats: int = 1
    """Copies of each image in an epoch, each augmented anew; the epoch keeps its length."""
    flip: bool | None = None
    """Mirror half of the training images; None is no for digits, else yes."""
    crop_padding: int | None = None
    """Random crop from the image padded by so many pixels, 0 is no crop; None is the data's own: 2 for images in the
    package, 4 for CIFAR, 8 for Tiny ImageNet, a random resized crop for photographs."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth, rising linearly with depth."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, test it and save it; None is off."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; `no` is float32."""
    channels_last: bool = True
    """Keep feature maps with the channels last in memory."""
    compile: bool = False
    """Compile the network with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute feature maps in the backward pass, which saves memory and costs time."""

    accumulate: int = 1
    """Parts in which each step's batch is computed one after the other, which saves memory."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With many processes: each holds the whole network (ddp), or a part of its weights (fsdp)."""
    sync_bn: bool = False
    """Batch norms, those of the shortcuts too, take their statistics over the images of all processes."""
    timeout: int = 600
    """Seconds after which a process that waits for another one gives up."""
    deterministic: bool = False
    """Only operations that give the same bits on every run; slower on a GPU."""

    seed: int = 0
    """Seed of weights, order and augmentation."""
    name: str | None = None
    """Name of the run; None makes one from data, model and time."""
    output: str = "runs"
    """Folder in which the run's folder is made."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] | None = None
    """Where the metrics of each epoch go beside metrics.jsonl; None is TensorBoard where it is installed, else none."""

    def resolved(self) -> "TrainConfig":
        """The same with nothing left open: what the data set decides is filled in and the data folder is absolute.

        Raises:
            DenseShortcutError: settings that cannot work.
        """
        _check(self)
        own = DATA_DEFAULTS[self.data]
        chosen = {key: value for key, value in own.items() if getattr(self, key) is None}
        if self.warmup_epochs is None:
            chosen["warmup_epochs"] = int(self.epochs > 1)
        weights = absolute(self.weights) if self.weights is not None else None
        return dataclasses.replace(self, **chosen, data_dir=_data_dir(self), weights=weights)

    def options(self) -> dict[str, Any]:
        """The keywords of `plug_in`; those at None are left out."""
        options = {
            "aggregate": self.aggregate,
            "norm": self.norm,
            "keep_identity": self.keep_identity,
        }
        open_options = {"groups": self.groups, "init": self.init, "inner": self.inner, "window": self.window}
        usual = {"center": True, "inner_start": 0.0, "weighting": "channel", "pattern": "all"}
        changed = {key: getattr(self, key) for key, value in usual.items() if getattr(self, key) != value}
        return options | changed | {key: value for key, value in open_options.items() if value is not None}


WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))
SMALL = {"flip": True, "workers": WORKERS, "crop_pct": 1.0, "interpolation": "bilinear"}
CIFAR = SMALL | {"img_size": 32, "crop_padding": 4}
PHOTOGRAPHS = {"img_size": 224, "flip": True, "workers": WORKERS, "crop_pct": 0.875, "interpolation": "bicubic"}
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "fashion": SMALL | {"img_size": 16, "crop_padding": 2, "workers": 0},
    "digits": SMALL | {"img_size": 16, "flip": False, "crop_padding": 2, "workers": 0},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "tiny-imagenet": SMALL | {"img_size": 64, "crop_padding": 8},
    "imagefolder": PHOTOGRAPHS,
    "parquet": PHOTOGRAPHS,
    "streaming": PHOTOGRAPHS,
    "webdataset": PHOTOGRAPHS,
}


@dataclass(frozen=True)
class TuneConfig:
    """How a network that was changed is trained on; everything else is as in its own run."""

    epochs: int = 0
    """Passes over the training images; 0 leaves the network as it was changed."""
    lr: float = 0.02
    """Highest learning rate; it falls to zero by a cosine."""
    name: str | None = None
    """Name of the new run; None is the run's own name and what was changed."""
    output: Path = Path("runs")
    """Folder in which the run's folder is made."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    limit_train: int | None = None
    """Use only so many training images; None is the run's own."""
    limit_test: int | None = None
    """Use only so many test images; None is the run's own."""


def _data_dir(config: TrainConfig) -> str | None:
    if config.data_dir is not None:
        return absolute(config.data_dir)
    root = os.environ.get(DATA_FOLDER_VARIABLE)
    named = config.data in ("cifar10", "cifar100", "tiny-imagenet")
    return str(Path(absolute(root)) / config.data) if root and named else None


def absolute(path: str) -> str:
    """A path that stands for the same place in every working folder."""
    return str(Path(path).expanduser().resolve())


def class_numbers(text: str) -> tuple[int, ...]:
    """The numbers, rising, in a text such as 0-79 or 3,5,8-9.

    Raises:
        DenseShortcutError: another form, a range that falls, or a single class.
    """
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part is not None]
    if None in parts or not all(ranges):
        raise DenseShortcutError(f"--classes {text!r} is not of the form 0-79 or 3,5,8-9: give numbers and ranges.")
    numbers = tuple(sorted({number for each in ranges for number in each}))
    if len(numbers) < 2:
        raise DenseShortcutError(f"--classes {text!r} is one class: give at least two, there is nothing to tell apart.")
    return numbers


def _check(config: TrainConfig) -> None:
    sizes = ("img_size", "test_size", "crop_pct", "limit_train", "limit_test", "train_images", "num_classes")
    others = ("shuffle_buffer", "epochs", "batch_size", "accumulate", "timeout", "groups", "lr", "clip_grad")
    for field in (*sizes, *others, "aug_repeats", "validation"):
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be above 0.")
    for field in ("workers", "warmup_epochs", "mixup", "cutmix", "weight_decay", "momentum", "crop_padding", "seed"):
        value = getattr(config, field)
        if value is not None and not value >= 0:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be 0 or above.")
    for field in ("smoothing", "drop_path", "ema_decay", "max_broken", "bce_threshold"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < 1:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be from 0 to below 1.")
    if config.strategy == "fsdp" and config.compile:
        raise DenseShortcutError("--strategy fsdp does not go with --compile here: take one of them.")
    if config.warmup_epochs and config.warmup_epochs >= config.epochs:
        raise DenseShortcutError(
            f"--warmup-epochs {config.warmup_epochs} leaves nothing of {config.epochs} epochs: take fewer of them."
        )
    if config.sched == "multistep" and not config.milestones:
        raise DenseShortcutError("--sched multistep needs --milestones: the epochs at which to cut the learning rate.")
    if config.crop_pct is not None and config.crop_pct > 1:
        raise DenseShortcutError(f"--crop-pct {config.crop_pct} is above 1: the crop cannot be larger than the image.")
    if config.hub is not None and (config.data != "streaming" or config.data_dir is not None):
        raise DenseShortcutError("--hub goes with --data streaming and stands in for --data-dir: give one of them.")
    if config.validation is not None and config.data in STREAMS:
        raise DenseShortcutError(f"--validation does not go with --data {config.data}: put the images in files.")
    if config.classes is not None:
        class_numbers(config.classes)
        if config.data in STREAMS:
            raise DenseShortcutError(
                f"--classes does not go with --data {config.data}, whose labels are known only as they come: "
                "leave the other classes out of the files, or take --data parquet or imagefolder."
            )
    if config.bce_threshold is not None and config.loss != "bce":
        raise DenseShortcutError("--bce-threshold goes with --loss bce: give both or none.")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise DenseShortcutError(f"--batch-size {config.batch_size} is odd: mixup and cutmix need an even one.")
    if config.name is not None and (config.name in ("", ".", "..") or Path(config.name).name != config.name):
        raise DenseShortcutError(f"--name {config.name!r} is not a plain folder name: choose one without slashes.")


def flag(field: str) -> str:
    """The command line's spelling of a field."""
    return "--" + field.replace("_", "-")


def read_yaml(path: Path) -> TrainConfig:
    """The configuration in a YAML file; keys that it leaves out keep their defaults.

    Raises:
        DenseShortcutError: no such file, not a mapping, an unknown key, or a value of the wrong kind.
    """
    return from_settings(read_settings(path), str(path))


def read_fields(path: Path, cls: type[Config]) -> Config:
    """A dataclass of settings from a YAML file, as `read_yaml`, without a check of what they mean together."""
    return _from_values(read_settings(path), str(path), cls)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        DenseShortcutError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DenseShortcutError(f"cannot read {path}: {_reason(error)}.") from error
    except yaml.YAMLError as error:
        raise DenseShortcutError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise DenseShortcutError(f"{path} must hold lines of the form `epochs: 20`.")
    return values


def from_settings(values: Mapping[str, Any], where: str) -> TrainConfig:
    """The configuration with these values; `where` says in errors whence they come.

    Raises:
        DenseShortcutError: an unknown key, a value of the wrong kind, or settings that cannot work.
    """
    config = _from_values(values, where, TrainConfig)
    _check(config)
    return config


def _from_values(values: Mapping[str, Any], where: str, cls: type[Config]) -> Config:
    kinds = typing.get_type_hints(cls)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            raise DenseShortcutError(f"{where} has the unknown key {key!r}: {_advice(near)}.")
    return cls(**{key: _convert(value, kinds[key], f"{key} in {where}") for key, value in values.items()})


def write_yaml(config: Any) -> str:
    """The text that `read_yaml` (`read_fields` for settings of another class) reads back as an equal configuration."""
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)


def _advice(near: list[str]) -> str:
    return f"did you mean {near[0]!r}" if near else f"remove it (`{dsnet('train', '--help')}` lists the keys)"


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, one of the annotations used above; YAML reads 5e-4 as a string."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value is False and "no" in options:  # YAML reads a bare `no` as false
            value = "no"
        if value not in options:
            raise DenseShortcutError(f"{where} is {value!r}: choose one of {', '.join(options)}.")
        return value
    if type(None) in options:
        inner = next(option for option in options if option is not type(None))
        return None if value is None else _convert(value, inner, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise DenseShortcutError(f"{where} is {value!r}: it must be a list.")
        return tuple(_convert(item, options[0], where) for item in value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not kind:
        raise DenseShortcutError(f"{where} is {value!r}: it must be {_KIND_NAMES[kind]}.")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
