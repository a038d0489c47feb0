"""The network of a configuration, and what its optimizer and loss are made of."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import DenseShortcutError
from ...surgery.param_groups import decayed_parameters
from ..command import dsnet
from .config import TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
PLUGGING_FIELDS = (
    *("norm", "groups", "center", "init", "inner", "inner_start"),
    *("weighting", "pattern", "window", "keep_identity"),
)
DENSENETS = ("densenet_cifar", "densenet_imagenet")
Loss = Callable[[Tensor, Tensor], Tensor]


def build_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network that a configuration names; the seed decides its weights, and a DSNet's host has its twin's.

    Raises:
        DenseShortcutError: a name that timm does not know, or a network that cannot be plugged into as asked.
    """
    import timm

    from ...models import list_models
    from ...surgery.plug import plug_in, unplug

    if not timm.is_model(config.model):
        raise DenseShortcutError(f"unknown model {config.model!r}: {_near_models(config.model)}.")
    ours = config.model in list_models()
    options = config.options() if config.aggregate != "identity" else {}
    settings: dict[str, Any] = {"num_classes": num_classes}
    if config.drop_path:
        settings["drop_path_rate"] = config.drop_path
    if config.zero_init_last is not None:
        settings["zero_init_last"] = config.zero_init_last
    sizes = {key: value for key in ("channels", "layers") if (value := getattr(config, key))}
    torch.manual_seed(config.seed)
    try:
        model: Any = timm.create_model(config.model, **settings, **sizes, **(options if ours else {}))
    except (TypeError, IndexError) as error:
        if not sizes:
            raise
        raise DenseShortcutError(
            f"{config.model} cannot be built with {' and '.join(sizes)} as given ({error}): "
            "these are for ResNets, a number for each stage."
        ) from error
    if ours and config.aggregate == "identity":
        unplug(model)
    elif not ours and config.aggregate != "identity":
        plug_in(model, **options)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def _near_models(name: str) -> str:
    import difflib

    import timm

    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    if near:
        return f"did you mean {', '.join(near)}"
    return f"`{dsnet('models')}` lists the DSNets, timm.list_models() the rest"


def network_label(config: TrainConfig) -> str:
    """A short name for the shortcut of a configuration, which also names its folder."""
    if config.model in DENSENETS:
        return "densenet"
    if config.aggregate in ("identity", "dense_identity"):
        return config.aggregate
    extras = [
        None if config.center else "uncentered",
        config.init,
        f"inner{config.inner_start or ''}" if config.inner else None,
        config.weighting if config.weighting != "channel" else None,
        config.pattern if config.pattern != "all" else None,
        f"window{config.window}" if config.window else None,
        "keep_identity" if config.keep_identity else None,
    ]
    return "-".join([config.aggregate, config.norm, *(extra for extra in extras if extra)])


def twin(config: Config) -> Config:
    """The same run, of training or detection, with the host network: no dense shortcuts, all else equal."""
    unasked = {field.name: field.default for field in dataclasses.fields(config) if field.name in PLUGGING_FIELDS}
    return dataclasses.replace(config, aggregate="identity", **unasked)


def densenet_twin(config: TrainConfig, num_classes: int) -> TrainConfig | None:
    """The same run with a DenseNet of as many parameters, a layer for each block; None for a host of other stages."""
    from ...models.small_images import densenet_of
    from ...surgery.plug import dense_stages

    if config.weights is not None:
        return None
    model: Any = build_network(config, num_classes)
    layers = [len(stage) for stage in dense_stages(model).values()]
    if not 3 <= len(layers) <= 5:
        return None
    first = getattr(model, "feature_info", None)
    small = first is not None and first[0]["reduction"] == 1  # of a stem that keeps the images' size
    name = DENSENETS[0] if small else DENSENETS[1]
    growth, depths = densenet_of(sum(p.numel() for p in model.parameters()), layers, name, num_classes)
    sizes: dict[str, Any] = {"channels": (growth,), "layers": depths}
    return dataclasses.replace(twin(config), model=name, zero_init_last=None, drop_path=0.0, **sizes)


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name, with weight decay on the weights of convolutions and linear layers only.

    Raises:
        DenseShortcutError: a name that timm does not know.
    """
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            parameter_groups(model, config.weight_decay), opt=config.opt, lr=config.lr, momentum=config.momentum
        )
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        raise DenseShortcutError(
            f"--opt {config.opt!r} does not work with these settings ({error}): try sgd or adamw."
        ) from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights of convolutions and linear layers, which decay, and all else (norms, biases, shortcuts)."""
    decayed = {id(p) for p in decayed_parameters(model)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """timm's schedule of the learning rate, by optimizer steps: `step_update(steps)` sets it."""
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        decay_milestones=list(config.milestones),
        decay_rate=config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def make_loss(config: TrainConfig, num_classes: int) -> tuple[Loss, Callable[..., tuple[Tensor, Tensor]] | None]:
    """timm's loss for training and its mixup/cutmix, None where both are off. Smoothing sits in one of the two."""
    from timm.data import Mixup
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    mixes = bool(config.mixup or config.cutmix)
    loss: Loss
    if config.loss == "bce":
        loss = BinaryCrossEntropy(0.0 if mixes else config.smoothing, config.bce_threshold)
    else:
        loss = SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(config.smoothing)
    smoothed = {"label_smoothing": config.smoothing, "num_classes": num_classes}
    return loss, Mixup(config.mixup, config.cutmix, **smoothed) if mixes else None
