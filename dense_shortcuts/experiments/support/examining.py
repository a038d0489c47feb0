"""One network of an architecture, plugged in and looked at closely."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import checks
from .names import Place
from .planning import Planned
from .subject import make

LARGEST = 120e6  # parameters; a network above it is examined without its numbers, on the meta device


@dataclass(frozen=True)
class Row:
    """What was seen of one network.

    Attributes:
        library, family, name: where it comes from.
        checks: the result of each check: "yes", "no: ..." or "host: ..." where the host fails as well.
        multiply_adds: what plugging adds, as a share of the host's.
        shapes_alone: it was too large to be run, so that shapes alone were compared.
    """

    library: str
    family: str
    name: str
    checks: dict[str, str] = dataclasses.field(default_factory=dict)
    multiply_adds: float = 0.0
    shapes_alone: bool = False

    @property
    def place(self) -> Place:
        return Place(self.library, self.family, self.name)

    @property
    def verdict(self) -> str:
        """Failed, unchecked, shapes alone, but for the host (which cannot do a check itself), or plugged."""
        results = self.checks.values()
        if any(result.startswith("no") for result in results):
            return "failed"
        if not any(result == "yes" for result in results):
            return "unchecked"
        if self.shapes_alone:
            return "shapes alone"
        return "plugged" if all(result == "yes" for result in results) else "but for the host"


def examine(planned: Planned) -> Row:
    """Plug one network in and run every check, on small images and the CPU."""
    place, large = planned.place, planned.size > LARGEST
    row = Row(*place, shapes_alone=large)
    try:
        subject = make(place, torch.device("meta" if large else "cpu"))
        if subject is None:
            return dataclasses.replace(row, checks={"forward": "host: takes none of the images that were tried"})
        host, plugged = (multiply_adds(model, subject.x) for model in (subject.host, subject.plugged))
    except Exception as error:  # the sweep goes on and the table says what went wrong
        return dataclasses.replace(row, checks={"forward": f"no: {type(error).__name__} {str(error)[:100]}"})
    return dataclasses.replace(row, checks=checks.run(subject), multiply_adds=plugged / max(host, 1) - 1)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """What PyTorch counts in a forward pass, after one that does not count.

    The first pass of a traced block traces it anew, on tensors without data, which the counter would count as well.
    """
    model = copy.deepcopy(model).requires_grad_(False)  # the counter fails on modules that are given a parameter
    with torch.no_grad():
        model(x)
        with FlopCounterMode(display=False) as counter:
            model(x)
    return counter.get_total_flops()
