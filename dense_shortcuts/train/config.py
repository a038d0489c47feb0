"""The configuration of a run: one flat dataclass that is also the command line and the YAML recipe."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import DenseShortcutError

DATA_FOLDER_VARIABLE = "DENSE_SHORTCUTS_DATA"


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, and how. Values left at None are chosen by the data set (`resolved`)."""

    model: str = "dsnet20"
    """Any timm name: a DSNet (`dsnet models` lists them) or a host such as resnet50."""
    aggregate: Literal["stage", "block", "dense_identity", "identity"] = "stage"
    """What a dense shortcut sums: feature maps of the stage, outputs of residual branches, or maps as they are;
    `identity` is the host network without dense shortcuts."""
    norm: Literal["group", "batch", "layer", "instance", "none"] = "group"
    """Normalisation of each summed feature map."""
    groups: int | None = None
    """Groups of the group norm; None takes at most 32, four channels each at least."""
    init: Literal["nearest", "uniform", "ones", "zeros"] | None = None
    """Start of the shortcut weights; None is `nearest`, or `zeros` with keep-identity."""
    inner: bool | None = None
    """DS2: a shortcut inside each bottleneck too; None is the model's own."""
    keep_identity: bool = False
    """Keep the host's identity shortcut beside the dense one."""
    zero_init_last: bool | None = None
    """Start the last norm of each residual branch at zero; None is the host's own (timm's ResNets do)."""
    channels: tuple[int, ...] = ()
    """Width of each stage before expansion, for ResNets of another width; () is the model's own."""
    layers: tuple[int, ...] = ()
    """Blocks of each stage, for ResNets of another depth; () is the model's own."""

    data: Literal["digits", "cifar100", "imagefolder"] = "digits"
    """scikit-learn's handwritten digits, CIFAR-100, or a folder with train/ and val/ or test/."""
    data_dir: str | None = None
    """Folder of the data; None is $DENSE_SHORTCUTS_DATA/cifar100 for CIFAR-100."""
    img_size: int | None = None
    """Side of the square images in pixels; None is the data's own."""
    limit_train: int | None = None
    """Use only so many training images (a fixed sample)."""
    limit_test: int | None = None
    """Use only so many test images (a fixed sample)."""
    workers: int | None = None
    """Worker processes that prepare images; None is 0 for digits, else one less than the cores, 8 at most."""

    epochs: int = 30
    """Passes over the training images."""
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
    warmup_epochs: int = 1
    """Epochs over which the learning rate rises linearly."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""

    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    auto_augment: str | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5."""
    flip: bool | None = None
    """Mirror half of the training images; None is no for digits, else yes."""
    crop_padding: int | None = None
    """Random crop from the image padded by so many pixels, 0 is no crop; None is the data's own: 2 for digits, 4 for
    CIFAR-100, a random resized crop for folders of images."""
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
        return dataclasses.replace(self, **chosen, data_dir=_data_dir(self))

    def options(self) -> dict[str, Any]:
        """The keywords of `plug_in`; those at None are left out."""
        options = {
            "aggregate": self.aggregate,
            "norm": None if self.norm == "none" else self.norm,
            "keep_identity": self.keep_identity,
        }
        open_options = {"groups": self.groups, "init": self.init, "inner": self.inner}
        return options | {key: value for key, value in open_options.items() if value is not None}


DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"img_size": 16, "flip": False, "crop_padding": 2, "workers": 0},
    "cifar100": {"img_size": 32, "flip": True, "crop_padding": 4, "workers": max(1, min(8, (os.cpu_count() or 1) - 1))},
    "imagefolder": {"img_size": 224, "flip": True, "workers": max(1, min(8, (os.cpu_count() or 1) - 1))},
}


def _data_dir(config: TrainConfig) -> str | None:
    if config.data_dir is not None:
        return str(Path(config.data_dir).expanduser().resolve())
    root = os.environ.get(DATA_FOLDER_VARIABLE)
    return str(Path(root).expanduser().resolve() / "cifar100") if root and config.data == "cifar100" else None


def _check(config: TrainConfig) -> None:
    for field in ("img_size", "limit_train", "limit_test", "epochs", "batch_size", "groups", "lr", "clip_grad"):
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be above 0.")
    for field in ("workers", "warmup_epochs", "mixup", "cutmix", "weight_decay", "momentum", "crop_padding", "seed"):
        value = getattr(config, field)
        if value is not None and not value >= 0:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be 0 or above.")
    for field in ("smoothing", "drop_path", "ema_decay"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < 1:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be from 0 to below 1.")
    if config.warmup_epochs and config.warmup_epochs >= config.epochs:
        raise DenseShortcutError(
            f"--warmup-epochs {config.warmup_epochs} leaves nothing of {config.epochs} epochs: take fewer of them."
        )
    if config.sched == "multistep" and not config.milestones:
        raise DenseShortcutError("--sched multistep needs --milestones: the epochs at which to cut the learning rate.")
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
    kinds = typing.get_type_hints(TrainConfig)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            raise DenseShortcutError(f"{where} has the unknown key {key!r}: {_advice(near)}.")
    config = TrainConfig(**{key: _convert(value, kinds[key], f"{key} in {where}") for key, value in values.items()})
    _check(config)
    return config


def write_yaml(config: TrainConfig) -> str:
    """The text that `read_yaml` reads back as an equal configuration."""
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)


def _advice(near: list[str]) -> str:
    return f"did you mean {near[0]!r}" if near else "remove it (`dsnet train --help` lists the keys)"


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
