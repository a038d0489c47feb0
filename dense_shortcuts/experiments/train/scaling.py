"""How long a training would take on many GPUs, and what it would cost: an estimate from one GPU's measured speed.

One optimizer step on n GPUs takes b / x seconds of computing (b images a GPU, x images a second) and the exchange of
the gradients. A ring all-reduce of G bytes sends 2 (n - 1) / n G through every link, one after the other in 2 (n - 1)
small steps of a fixed latency. Links between machines are shared by the GPUs of a machine, but a ring that goes around
the machines passes each of them once, so the slowest link of the ring sets its pace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import DenseShortcutError
from ...nn.affine_form import is_batch_norm
from ...surgery.plug import shortcut_norms

GRADIENT_BYTES = 4  # float32, also under mixed precision: DDP exchanges gradients in the dtype of the weights
BUCKET_BYTES = 25 * 2**20  # DDP's own; each bucket is one all-reduce
HOST_EXCHANGES = 2  # of PyTorch's synchronised batch norm in a step: statistics forwards, their gradients backwards
OWN_EXCHANGES = 5  # of a shortcut's: count, mean and variance forwards, gradients of two of them backwards


@dataclass(frozen=True)
class Cluster:
    """Machines and what an hour of a GPU costs. Speeds are of one direction of a link, in gigabytes a second."""

    gpus_per_machine: int
    inside: float
    between: float
    latency: float
    price_per_hour: float


@dataclass(frozen=True)
class Messages:
    """What each GPU exchanges in a step: gradients in bytes, and how many all-reduces there are."""

    gradients: int
    buckets: int
    small: int

    @property
    def count(self) -> int:
        return self.buckets + self.small


@dataclass(frozen=True)
class Estimate:
    """A row of the table.

    Attributes:
        step, exchange: seconds of computing, and of exchange, in a step.
        hidden, exposed: hours of the training with the exchange wholly hidden behind computing, where there is room
            for it, and with none of it hidden.
        cost: price of the `exposed` hours of all GPUs.
        efficiency: speed of each GPU beside a single one, with nothing hidden.
    """

    gpus: int
    batch: int
    step: float
    exchange: float
    hidden: float
    exposed: float
    cost: float
    efficiency: float


def messages(model: nn.Module, *, sync_bn: bool) -> Messages:
    """What a network's training step exchanges; every batch norm is synchronised, or none."""
    size = GRADIENT_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = sum(map(is_batch_norm, shortcut_norms(model)))
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    small = HOST_EXCHANGES * (norms - own) + OWN_EXCHANGES * own
    return Messages(size, -(-size // BUCKET_BYTES), small if sync_bn else 0)


def exchange_seconds(found: Messages, gpus: int, cluster: Cluster) -> float:
    """Seconds of a step's all-reduces on a ring of so many GPUs."""
    if gpus == 1:
        return 0.0
    link = cluster.inside if gpus <= cluster.gpus_per_machine else cluster.between
    return 2 * (gpus - 1) / gpus * found.gradients / (link * 1e9) + 2 * (gpus - 1) * cluster.latency * found.count


def estimates(
    found: Messages,
    counts: Sequence[int],
    cluster: Cluster,
    *,
    images_per_second: float,
    batch_per_gpu: int,
    images: int,
) -> list[Estimate]:
    """An estimate for each number of GPUs, the same number of images on each.

    Args:
        images: images of the whole training, epochs times the size of the set.

    Raises:
        DenseShortcutError: numbers that cannot be.
    """
    numbers = {
        "--gpus": min(counts, default=0),
        "--images-per-second": images_per_second,
        "--batch-per-gpu": batch_per_gpu,
        "--inside": cluster.inside,
        "--between": cluster.between,
        "--gpus-per-machine": cluster.gpus_per_machine,
    }
    for flag, number in numbers.items():
        if not number > 0:
            raise DenseShortcutError(f"{flag} is {number}: it must be above 0.")
    rows = []
    for gpus in counts:
        step, exchange = batch_per_gpu / images_per_second, exchange_seconds(found, gpus, cluster)
        steps = images / (batch_per_gpu * gpus)
        hidden, exposed = steps * max(step, exchange) / 3600, steps * (step + exchange) / 3600
        cost = exposed * gpus * cluster.price_per_hour
        rows.append(
            Estimate(gpus, batch_per_gpu * gpus, step, exchange, hidden, exposed, cost, step / (step + exchange))
        )
    return rows


def markdown(rows: Sequence[Estimate]) -> str:
    """The table."""
    lines = [
        "| GPUs | images a step | computing, ms | exchange, ms | hours, exchange hidden | hours, not hidden | cost |"
        " efficiency |",
        "|" + " ---: |" * 8,
    ]
    for row in rows:
        cells: list[Any] = [row.gpus, f"{row.batch:,}", f"{1e3 * row.step:.1f}", f"{1e3 * row.exchange:.2f}"]
        cells += [f"{row.hidden:.2f}", f"{row.exposed:.2f}", f"{row.cost:,.0f}", f"{row.efficiency:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
