"""Networks to look into, by name or from a run's folder, with how they want to see images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ... import shipped
from ...errors import DenseShortcutError


@dataclass(frozen=True)
class Network:
    """A classifier in evaluation mode.

    Attributes:
        label: the name or folder it was asked for by.
        classes: names of its classes.
        size: side of its square input, pixels.
        crop_pct: part of the resized image's shorter side that the middle crop keeps.
        mean, std, interpolation: as timm's transforms take them.
        trained: False where the weights are those of a random start.
    """

    label: str
    model: nn.Module
    classes: tuple[str, ...]
    size: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    trained: bool


@dataclass(frozen=True)
class View:
    """An image as a network sees it.

    Attributes:
        picture: resized and cropped, (S, S, 3) uint8.
        tensor: the same normalised, (1, 3, S, S) float32.
        boxes: (B, 4) as x0, y0, x1, y1 in the picture's pixels, clipped to it; one that the crop left out is empty.
    """

    picture: np.ndarray
    tensor: Tensor
    boxes: np.ndarray


def read_network(name: str, *, pretrained: bool = False) -> Network:
    """The network of a run's folder (or the model.safetensors in it), `shipped`, else the timm model of that name.

    Args:
        pretrained: load timm's weights, which may have to be downloaded; else a timm model starts at random, seed 0.

    Raises:
        DenseShortcutError: neither a folder nor a name of timm, a broken checkpoint, no weights to be had.
    """
    from ..train.checkpoint import WEIGHTS, read_model

    path = shipped.checkpoint(Path(name))
    if path.is_dir() or path.name == WEIGHTS:
        model, card = read_model(path if path.is_dir() else path.parent)
        return _from_card(name, model, card)
    return _from_timm(name, pretrained)


def view(network: Network, image: Image.Image, boxes: Sequence[Sequence[float]] = ()) -> View:
    """The image, of any mode, as the network's own test transform gives it, and boxes (x0, y0, x1, y1) moved along."""
    from torchvision import tv_tensors
    from torchvision.transforms import InterpolationMode, v2

    rgb = image.convert("RGB")
    geometry = v2.Compose(
        [
            v2.Resize(int(network.size / network.crop_pct), InterpolationMode(network.interpolation)),
            v2.CenterCrop(network.size),
        ]
    )
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    where = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(rgb.height, rgb.width))
    picture, moved = geometry(rgb, where)
    pixels = np.asarray(picture)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255)
    normalised = v2.functional.normalize(tensor, list(network.mean), list(network.std))
    return View(pixels, normalised[None], moved.numpy())


@torch.no_grad()
def probabilities(network: Network, seen: View) -> Tensor:
    """Probability of each class, (K,)."""
    return network.model(seen.tensor).float().softmax(1)[0]


def top(network: Network, chances: Tensor, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest classes with their probabilities, the first one first."""
    values, places = chances.topk(min(count, len(chances)))
    return [(network.classes[place], value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]


def class_place(network: Network, name: str) -> int:
    """The class of a name or number.

    Raises:
        DenseShortcutError: the network has no such class.
    """
    if name in network.classes:
        return network.classes.index(name)
    if name.isdecimal() and int(name) < len(network.classes):
        return int(name)
    raise DenseShortcutError(
        f"{network.label} has no class {name!r}: give one of its {len(network.classes)} names "
        f"({', '.join(network.classes[:5])}, ...) or a number from 0."
    )


def _from_card(name: str, model: nn.Module, card: dict[str, Any]) -> Network:
    from ..train.checkpoint import crop_of

    return Network(
        label=name,
        model=model.eval(),
        classes=tuple(card["classes"]),
        size=card["img_size"],
        crop_pct=crop_of(card),
        mean=tuple(card["mean"]),
        std=tuple(card["std"]),
        interpolation=card["interpolation"],
        trained=True,
    )


def _from_timm(name: str, pretrained: bool) -> Network:
    import timm
    from timm.data import resolve_model_data_config

    from ..train.network import _near_models

    if not timm.is_model(name):
        raise DenseShortcutError(
            f"{name!r} is neither a folder of a trained network nor a model of timm: {_near_models(name)}."
        )
    if pretrained and not timm.is_model_pretrained(name):
        raise DenseShortcutError(f"timm has no trained weights for {name}: give the folder of a run, or another model.")
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained=pretrained).eval()
    except (OSError, RuntimeError) as error:  # no network, no space
        raise DenseShortcutError(
            f"the weights of {name} cannot be fetched ({_first_line(error)}): go online."
        ) from error
    look = resolve_model_data_config(model)
    return Network(
        label=name,
        model=model,
        classes=_timm_classes(model),
        size=look["input_size"][-1],
        crop_pct=look["crop_pct"],
        mean=look["mean"],
        std=look["std"],
        interpolation=look["interpolation"],
        trained=pretrained,
    )


def _timm_classes(model: Any) -> tuple[str, ...]:
    """ImageNet's names where there are a thousand classes, else numbers."""
    from timm.data import ImageNetInfo

    if model.num_classes == 1000:
        return tuple(text.split(",")[0] for text in ImageNetInfo().label_descriptions())
    return tuple(str(place) for place in range(model.num_classes))


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(". ")
