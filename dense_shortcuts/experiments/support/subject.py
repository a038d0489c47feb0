"""A network made ready for the checks: random numbers in all that starts at a constant, and images that it takes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.plug import plug_in, shortcut_parameters
from .names import Place, build

_SIDES = (64, 96, 128, 224, 256, 512)
_CLIPS = ((16, 112, 112), (16, 224, 224))


@dataclass(frozen=True)
class Subject:
    """A network to look at.

    Attributes:
        place: where it comes from.
        host: the network as it was, in evaluation mode.
        plugged: a copy that is plugged in.
        x: two images or clips that it takes.
    """

    place: Place
    host: nn.Module
    plugged: nn.Module
    x: Tensor

    @property
    def on_meta(self) -> bool:
        """Whether its tensors have shapes alone."""
        return self.x.is_meta


def make(place: Place, device: torch.device) -> Subject | None:
    """A network with random numbers; None where it takes none of the images that are tried."""
    torch.manual_seed(0)
    host = build(place, device)
    x = _input(host, device)
    if x is None:
        return None
    randomise(host, x)
    plugged = plug_in(copy.deepcopy(host))
    with torch.no_grad():
        for _, parameter in shortcut_parameters(plugged):
            parameter.normal_(std=0.5)
    return Subject(place, host, plugged, x)


@torch.no_grad()
def randomise(host: nn.Module, x: Tensor) -> None:
    """Random numbers in every parameter that starts at a constant, and the statistics of `x` in every batch norm.

    A last norm or layer scale that starts at zero hides a branch, and then a check of it would see nothing. Statistics
    are measured, not drawn, for with others a deep network overflows.
    """
    for parameter in host.parameters():
        if parameter.is_meta or not parameter.numel() or not (parameter == parameter.flatten()[0]).all():
            continue
        scale = (parameter.flatten()[0] == 1).item()
        parameter.copy_(0.5 + torch.rand_like(parameter) if scale else 0.3 * torch.randn_like(parameter))
    norms = [m for m in host.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.5  # half of what was there, so that mean and variance are nobody's start
    host.train()(x)
    host.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _input(host: nn.Module, device: torch.device) -> Tensor | None:
    """Two images of the smallest size that the host takes, else two clips."""
    config: Any = getattr(host, "default_cfg", {})
    channels, own = (config.get("input_size") or (3, 224, 224))[:2]
    shapes: list[Sequence[int]] = [(channels, side, side) for side in (*_SIDES[:3], own, *_SIDES[3:])]
    for shape in (*shapes, *((channels, *clip) for clip in _CLIPS)):
        x = torch.randn(2, *shape, device=device)
        try:
            with torch.no_grad():
                host(x)
        except Exception:  # a size that the host does not take
            continue
        return x
    return None
