"""What a plan says of each network: rows of blocks, or the reason of a refusal. Takes no memory for weights."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...errors import DenseShortcutError
from ...surgery.plug import plan
from .names import Place, build


@dataclass(frozen=True)
class Planned:
    """What a plan says of one network.

    Attributes:
        library, family, name: where it comes from.
        size: its number of parameters.
        blocks: the classes of the blocks that get dense shortcuts, in one text.
        stages: rows of such blocks; 0 where there are none.
        parameters: what plugging adds, as a share of the host's.
        refusal: the reason of a refusal, in one line.
        error: what planning raised that is no refusal.
    """

    library: str
    family: str
    name: str
    size: int = 0
    blocks: str = ""
    stages: int = 0
    parameters: float = 0.0
    refusal: str = ""
    error: str = ""

    @property
    def place(self) -> Place:
        return Place(self.library, self.family, self.name)

    @property
    def verdict(self) -> str:
        return "failed" if self.error else "refused" if self.refusal else "planned"

    @property
    def architecture(self) -> tuple[str, ...]:
        """The same for all networks of a family with blocks of the same classes, or refused for the same reason."""
        why = re.sub(r" at \S+:|\d+", "", self.refusal or self.error)
        return (self.library, self.family, self.blocks, why)


def plan_one(place: Place) -> Planned:
    """The plan of one network, on the meta device where it can be built there."""
    row = Planned(*place)
    try:
        try:
            network = build(place, torch.device("meta"))
        except Exception:  # some networks compute their buffers, which needs data
            network = build(place, torch.device("cpu"))
        size = sum(p.numel() for p in network.parameters())
        row = Planned(*place, size=size)
        planned = plan(network)
    except DenseShortcutError as refusal:
        return Planned(*place, size=row.size, refusal=reason(str(refusal)))
    except Exception as error:  # the sweep goes on and the table says what went wrong
        return Planned(*place, size=row.size, error=f"{type(error).__name__} {' '.join(str(error).split())[:100]}")
    classes = sorted({f"{stage.blocks.__module__}.{stage.blocks.__qualname__}" for stage in planned.stages})
    share = planned.parameters / size
    return Planned(*place, size, ", ".join(classes), stages=len(planned.stages), parameters=share)


def reason(refusal: str) -> str:
    """What a refusal says of the block that came nearest, without what was searched and how to teach it."""
    text = " ".join(refusal.partition("\n\n")[0].split())
    found = re.search(r"([\w.]+) at (\S+) has no adapter; .*?: (.*?)\. If it is a residual block", text)
    if found:
        return f"{found[1].rpartition('.')[2]} at {found[2]}: {found[3]}"
    return (text.partition(" has nothing to plug into. ")[2] or text).rstrip(".")


def architectures(rows: Iterable[Planned]) -> list[list[Planned]]:
    """The networks of each architecture, the smallest first."""
    alike: dict[tuple[str, ...], list[Planned]] = defaultdict(list)
    for row in rows:
        alike[row.architecture].append(row)
    return sorted(
        (sorted(members, key=lambda row: (row.size, row.name)) for members in alike.values()),
        key=lambda members: members[0].place,
    )
