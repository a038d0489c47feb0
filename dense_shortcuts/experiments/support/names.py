"""Which networks timm and torchvision have, and how one is built."""

import fnmatch
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

# Families no network of which adds a block's input to a branch, and what they have instead. In torchvision a family is
# a file, so the last part of its name counts.
NOT_RESIDUAL = {
    "alexnet": "a chain of convolutions",
    "densenet": "concatenations in place of shortcuts",
    "googlenet": "concatenations of branches",
    "inception": "concatenations of branches",
    "inception_v3": "concatenations of branches",
    "inception_v4": "concatenations of branches",
    "rdnet": "concatenations in place of shortcuts",
    "s3d": "concatenations of branches",
    "selecsls": "concatenations of branches",
    "shufflenetv2": "concatenations of halves in place of shortcuts",
    "squeezenet": "concatenations of branches",
    "vgg": "a chain of convolutions",
}
# torchvision's networks around the backbone of another family: the part that is plugged, for the whole takes more than
# images or gives more than maps. They are planned and examined, and are no families of their own.
AROUND = {"detection": "backbone", "segmentation": "backbone"}
OWN = ("dsnet", "cifar", "small_images")  # modules of this package that register networks


class Place(NamedTuple):
    """Where a network comes from: "timm" or "torchvision", the family, which is the file it is in, and its name."""

    library: str
    family: str
    name: str


def is_residual(family: str) -> bool:
    """Whether a family's networks have blocks that add their input to a branch."""
    return family.rpartition(".")[2] not in NOT_RESIDUAL


def places(pattern: str = "*") -> list[Place]:
    """Every network that a wildcard names, in the order of library, family and name."""
    return sorted(place for place in (*_timm(), *_torchvision()) if fnmatch.fnmatch(place.name, pattern))


def _timm() -> Iterator[Place]:
    import timm
    from timm.models import list_modules
    from timm.models._registry import _module_to_models

    listed = set(timm.list_models())  # old names of networks are not in it
    for family in list_modules():
        if family not in OWN:
            yield from (Place("timm", family, name) for name in _module_to_models[family] & listed)


def _torchvision() -> Iterator[Place]:
    """All that torchvision registers: for images and videos, to quantize, and with a detector or the like around."""
    import torchvision

    for name in torchvision.models.list_models():
        family = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        task = family.partition(".")[0]
        yield Place("torchvision", task if task in AROUND else family, name)


def build(place: Place, device: torch.device, **settings: Any) -> nn.Module:
    """The network, or the part of it that is plugged, without trained weights and in evaluation mode."""
    import timm

    with device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if place.library == "timm":
            return timm.create_model(place.name, **settings).eval()
        return _torchvision_network(place).eval()


def _torchvision_network(place: Place) -> nn.Module:
    import torchvision

    builder = torchvision.models.get_model_builder(place.name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if place.name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # which takes minutes
    network = builder(**options)
    if place.family == "optical_flow.raft":
        return network.feature_encoder  # the whole takes two images and returns a list
    return network.get_submodule(AROUND[place.family]) if place.family in AROUND else network
