"""The configuration of a detection run: one flat dataclass that is also the command line and the YAML recipe."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import DenseShortcutError
from ..train.config import DATA_FOLDER_VARIABLE, TrainConfig, flag, read_fields


@dataclass(frozen=True)
class DetectConfig:
    """What is trained, on what, and how. The defaults are the usual ones for COCO on a GPU."""

    detector: Literal["fasterrcnn", "retinanet", "fcos", "maskrcnn"] = "fasterrcnn"
    """torchvision's detector over a feature pyramid; maskrcnn needs data with segmentation."""
    model: str = "dsnet50"
    """Backbone: any timm name with features_only, a DSNet or a host such as resnet50."""
    aggregate: Literal["stage", "block", "dense_identity", "identity"] = "stage"
    """What a dense shortcut sums; `identity` is the host network without dense shortcuts."""
    norm: Literal["group", "batch", "layer", "instance", "none"] = "group"
    """Normalisation of each summed feature map."""
    groups: int | None = None
    """Groups of the group norm; None takes at most 32, four channels each at least."""
    init: Literal["nearest", "uniform", "ones", "zeros", "random"] | None = None
    """Start of the shortcut weights; None is `nearest`, or `zeros` with keep-identity."""
    inner: bool | None = None
    """DS2: a shortcut inside each bottleneck too; None is the model's own."""
    keep_identity: bool = False
    """Keep the host's identity shortcut beside the dense one: a pretrained backbone then starts as it was."""

    pretrained: bool = False
    """Start from timm's pretrained weights of the backbone (a host's; take keep-identity with them)."""
    backbone_weights: str | None = None
    """Start from the backbone's, or its host's, weights in this .safetensors file."""
    out_indices: tuple[int, ...] = ()
    """Levels of the backbone that the pyramid takes, as timm counts them; none given takes those from stride 4 on
    (8 for retinanet and fcos)."""
    frozen_stages: int = -1
    """Freeze the stem (0), the first stage too (1), and so on, as far as they were loaded; -1 freezes nothing."""
    norm_eval: bool = False
    """Batch norms of the backbone keep the statistics that were loaded."""
    sync_bn: bool = False
    """Batch norms take their statistics over all processes."""
    fpn_channels: int = 256
    """Width of the feature pyramid; the heads follow it."""

    data_dir: str | None = None
    """Folder in COCO's layout: annotations/instances_train2017.json with train2017/ (2014 likewise), or
    instances_train.json with train/, and the same for val. None is $DENSE_SHORTCUTS_DATA/coco."""
    img_size: tuple[int, ...] = (800,)
    """Shorter side of an image in pixels; several are drawn from in training, and the last one is tested with."""
    max_size: int | None = None
    """Longest side; None is 5/3 of the largest image size."""
    limit_train: int | None = None
    """Use only so many training images (a fixed sample)."""
    limit_val: int | None = None
    """Use only so many validation images (a fixed sample)."""
    empty_images: bool = False
    """Train on images without boxes too, as background; left out is what COCO's tools do."""
    workers: int = min(4, (os.cpu_count() or 1) - 1)
    """Worker processes that prepare images."""
    flip: bool = True
    """Mirror half of the training images and their boxes."""
    photometric: bool = False
    """Distort brightness, contrast, hue and saturation, as SSD does."""
    iou_crop: bool = False
    """Random crops that keep some boxes by their overlap, as SSD does."""

    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 16
    """Images a step, over all processes together."""
    opt: str = "sgd"
    """Optimizer, by timm's name (sgd is SGD with Nesterov momentum)."""
    lr: float = 0.02
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum, for optimizers that have one."""
    weight_decay: float = 1e-4
    """Weight decay on weights of convolutions and linear layers, and on nothing else."""
    sched: Literal["cosine", "multistep"] = "multistep"
    """Learning rate after the warm-up: cosine to zero, or a cut at each milestone."""
    milestones: tuple[int, ...] = (8, 11)
    """Epochs at which `multistep` cuts the learning rate."""
    decay_rate: float = 0.1
    """Factor of each cut."""
    warmup_steps: int = 500
    """Steps over which the learning rate rises linearly."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    eval_every: int = 1
    """Score the validation images after every so many epochs, and after the last."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; `no` is float32."""
    channels_last: bool = True
    """Keep feature maps with the channels last in memory."""

    seed: int = 0
    """Seed of weights, order and augmentation."""
    name: str | None = None
    """Name of the run; None makes one from detector, model and time."""
    output: str = "runs"
    """Folder in which the run's folder is made."""

    def resolved(self) -> "DetectConfig":
        """The same with absolute paths.

        Raises:
            DenseShortcutError: settings that cannot work.
        """
        check(self)
        root = os.environ.get(DATA_FOLDER_VARIABLE)
        data_dir = self.data_dir or (str(Path(root) / "coco") if root else None)
        if data_dir is None:
            raise DenseShortcutError("detection needs images in COCO format: give --data-dir DIR.")
        weights = self.backbone_weights
        return dataclasses.replace(
            self,
            data_dir=str(Path(data_dir).expanduser().resolve()),
            backbone_weights=str(Path(weights).expanduser().resolve()) if weights is not None else None,
        )

    def shared(self) -> TrainConfig:
        """What this run has in common with the training of a classifier, for the functions made for that."""
        names = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(TrainConfig)}
        own = ("data_dir", "img_size", "limit_train", "workers")  # of the same name but about other data
        return TrainConfig(**{name: getattr(self, name) for name in names.difference(own)})


def check(config: DetectConfig) -> None:
    """Refuse settings that cannot work."""
    positive = ("groups", "lr", "epochs", "batch_size", "fpn_channels", "max_size", "limit_train", "limit_val")
    for field in (*positive, "eval_every", "clip_grad"):
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise DenseShortcutError(f"{flag(field)} is {value}: it must be above 0.")
    for field in ("workers", "warmup_steps", "weight_decay", "momentum", "seed"):
        if not getattr(config, field) >= 0:
            raise DenseShortcutError(f"{flag(field)} is {getattr(config, field)}: it must be 0 or above.")
    if not config.img_size or min(config.img_size) < 32:
        raise DenseShortcutError("--img-size must be one or more sides of 32 pixels or above.")
    if config.detector == "fcos" and (config.fpn_channels % 32 or config.fpn_channels < 64):
        raise DenseShortcutError(
            f"--fpn-channels {config.fpn_channels} does not suit fcos, whose norms have 32 groups: take 64, 96 or more."
        )
    if config.sched == "multistep" and not config.milestones:
        raise DenseShortcutError("--sched multistep needs --milestones: the epochs at which to cut the learning rate.")
    if config.pretrained and config.backbone_weights is not None:
        raise DenseShortcutError("--pretrained and --backbone-weights are two starts: give one of them.")
    if config.name is not None and (config.name in ("", ".", "..") or Path(config.name).name != config.name):
        raise DenseShortcutError(f"--name {config.name!r} is not a plain folder name: choose one without slashes.")


def read_recipe(path: Path) -> DetectConfig:
    """The configuration in a YAML file; keys that it leaves out keep their defaults.

    Raises:
        DenseShortcutError: as `train.config.read_yaml`.
    """
    config = read_fields(path, DetectConfig)
    check(config)
    return config
