"""Verification: a file is only kept if its own runtime agrees with PyTorch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DenseShortcutError
from .formats import Format, Runner
from .graph import capture

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One comparison with PyTorch: batch, height and width of the images, and the largest difference of a score."""

    batch: int
    height: int
    width: int
    difference: float


def cases(images: Tensor) -> Iterator[Tensor]:
    """Batches of 1, 2 and 5 images, each at their own size and at 3/2 of the height and twice the width.

    Args:
        images: at least five, (N, 3, S, S).
    """
    side = images.shape[-1]
    larger = F.interpolate(images, (side * 3 // 2, side * 2), mode="bilinear", antialias=True)
    for batch in BATCHES:
        yield images[:batch]
        yield larger[:batch]


@torch.no_grad()
def prove(net: nn.Module, run: Runner, images: Tensor) -> list[Check]:
    """Compare a file's runtime with the network on real images.

    Args:
        net: the network in evaluation mode.
        run: the function that the file computes.
        images: at least five, (N, 3, S, S).

    Raises:
        DenseShortcutError: a score differs by more than 1e-4 + 1e-4 * |score|, or is not finite.
    """
    checks = []
    for batch in cases(images):
        expected, got = net(batch), run(batch)
        if got.shape != expected.shape:
            raise DenseShortcutError(
                f"its scores are {tuple(got.shape)} and PyTorch's {tuple(expected.shape)}: no file was kept."
            )
        difference = (got - expected).abs()
        if not (difference <= TOLERANCE + TOLERANCE * expected.abs()).all():
            raise DenseShortcutError(
                f"its scores differ from PyTorch's by {difference.max():.2g} on {batch.shape[0]} images of "
                f"{batch.shape[3]}x{batch.shape[2]}, more than {TOLERANCE:g}: no file was kept."
            )
        checks.append(Check(batch.shape[0], batch.shape[2], batch.shape[3], float(difference.max())))
    return checks


def proven(net: nn.Module, images: Tensor, path: Path, form: Format) -> list[Check]:
    """Write a network to a file, which is only kept if its own runtime agrees with PyTorch.

    Args:
        net: a result of `graph.inference_form`.
        images: at least five real images, (N, 3, S, S).
        path: the file.
        form: its format.

    Raises:
        DenseShortcutError: a missing library, a network that cannot be traced, a runtime that differs. `path` is then
            unchanged.
    """
    form.check()
    program = capture(net, images.shape[-1], largest=form.largest)
    with all_or_nothing(path, form) as unproven:
        form.write(program, unproven)
        try:
            return prove(net, form.load(unproven), images)
        except DenseShortcutError as error:
            raise DenseShortcutError(f"{path.name} was refused: {error}") from None


class all_or_nothing:
    """A temporary path, whose files replace `path` on exit; after an error they are removed."""

    def __init__(self, path: Path, form: Format) -> None:
        self.path, self.suffixes = path, (form.suffix, *form.beside)
        self.unproven = path.with_name(f".unproven-{path.name}")

    def __enter__(self) -> Path:
        return self.unproven

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for suffix in self.suffixes:
            written = self.unproven.with_suffix(suffix)
            if kind is None:
                os.replace(written, self.path.with_suffix(suffix))
            else:
                written.unlink(missing_ok=True)
