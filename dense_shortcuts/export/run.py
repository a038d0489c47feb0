"""From a checkpoint to a verified file: what `dsnet export` does."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import shipped
from ..errors import DenseShortcutError
from ..experiments.train.checkpoint import read_model
from ..experiments.train.run import checkpoint_folder
from ..extras import need
from ..files import write_text
from . import int8 as eight_bits
from .formats import FORMATS, Runner
from .graph import inference_form, warnings
from .images import PROOF, RunImages, batches, photographs, run_images, stack
from .proof import BATCHES, Check, all_or_nothing, proven

CALIBRATION = 256  # images that calibrate the ranges of int8
INT8 = ("onnx", "torch-export")


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the test images in %, of the exported file and of the int8 file."""

    images: int
    float32: float
    int8: float


@dataclass(frozen=True)
class Exported:
    """The files and findings of an export.

    Attributes:
        path: the file.
        checks: the comparisons with PyTorch.
        proof: a description of the images used for them.
        warnings: what to know about the network's norms.
        int8: the int8 file; None if it was not requested.
        accuracy: of both files; None without int8.
    """

    path: Path
    checks: list[Check]
    proof: str
    warnings: list[str]
    int8: Path | None = None
    accuracy: Accuracy | None = None

    @property
    def difference(self) -> float:
        """The largest difference of a score from PyTorch's."""
        return max(check.difference for check in self.checks)


def export(
    checkpoint: Path | str,
    to: str = "onnx",
    *,
    output: Path | str | None = None,
    int8: bool = False,
    data: str | None = None,
    data_dir: str | None = None,
    limit_test: int | None = None,
) -> Exported:
    """Write a trained network for another runtime, verified there on real images; on request in int8 as well.

    Args:
        checkpoint: a network's folder in a run, the model.safetensors in it, or `shipped`.
        to: "onnx", "torch-export", "executorch" or "openvino".
        output: the file; None means model.onnx, .pt2, .pte or .xml in the network's folder. The comparisons are written
            beside it, to the same name plus ".json", and the int8 file has "-int8" in its name.
        int8: quantise as well ("onnx" by onnxruntime, "torch-export" by torchao), and compare accuracies.
        data, data_dir, limit_test: the images to verify and measure with; None means the run's own. If those are
            missing, verification uses scikit-learn's two photographs.

    Raises:
        DenseShortcutError: an unknown format, a missing library, a network that cannot be traced, or a file whose
            runtime differs from PyTorch by more than 1e-4; it is then not kept.
    """
    if to not in FORMATS:
        raise DenseShortcutError(f"unknown format {to!r}: choose one of {', '.join(FORMATS)}.")
    if int8 and to not in INT8:
        raise DenseShortcutError(f"int8 is available for {' and '.join(INT8)}, not for {to}: leave it out.")
    form = FORMATS[to]
    form.check()
    need("an export", "train")
    if int8 and to == "torch-export":
        need("int8", "export", "torchao")
    folder = checkpoint_folder(Path(checkpoint))
    if output is None and folder == shipped.folder():
        raise DenseShortcutError("the network shipped with the package has no folder to write to: give --output.")
    model, card = read_model(folder)
    path = folder / f"model{form.suffix}" if output is None else Path(output)
    path = path if path.suffix == form.suffix else path.with_name(path.name + form.suffix)
    if not path.parent.is_dir():
        raise DenseShortcutError(f"{path.parent} is not a folder: make it, or give another --output.")

    given = {"data": data, "data_dir": data_dir, "limit_test": limit_test}
    own, images, proof = _proof_images(folder, card, given, must=int8 or data is not None or data_dir is not None)
    net = inference_form(model)
    checks = proven(net, images, path, form)
    done = Exported(path, checks, proof, warnings(model))
    if int8 and own is not None:
        target = path.with_stem(f"{path.stem}-int8")
        done = dataclasses.replace(done, int8=target, accuracy=_quantise(net, own, to, path, target))
    write_text(path.with_name(f"{path.name}.json"), json.dumps(_record(done, to), indent=2) + "\n")
    return done


def _proof_images(
    folder: Path, card: dict[str, Any], given: dict[str, Any], must: bool
) -> tuple[RunImages | None, Tensor, str]:
    """The run's images if they are available, five real images to verify with, and a description of these."""
    try:
        own = run_images(folder, card, given)
    except DenseShortcutError:
        if must:
            raise
        return None, photographs(card), "crops of scikit-learn's photographs, because the run's images are missing"
    images = stack(own.test, PROOF)
    if len(images) < PROOF:
        images = images.repeat(PROOF, 1, 1, 1)[:PROOF]
    return own, images, f"test images of {card['data']}"


def _quantise(net: torch.nn.Module, own: RunImages, to: str, source: Path, target: Path) -> Accuracy:
    """Write the int8 file, and measure the accuracy of both on the test images."""
    calibration = [images for images, _ in batches(own.calibration, BATCHES[-1], CALIBRATION)]
    with all_or_nothing(target, FORMATS[to]) as unproven:
        if to == "onnx":
            eight_bits.quantise_onnx(source, unproven, calibration)
        else:
            eight_bits.quantise_torch(net, unproven, calibration)
        before, after = (_accuracy(FORMATS[to].load(path), own) for path in (source, unproven))
    return Accuracy(len(own.test), before, after)


def _accuracy(run: Runner, own: RunImages, batch_size: int = 64) -> float:
    """Percentage of test images whose highest score is that of their label."""
    with torch.no_grad():
        right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in batches(own.test, batch_size))
    return 100 * right / len(own.test)


def _record(done: Exported, to: str) -> dict[str, Any]:
    """The content of the JSON file beside the export."""
    from ..experiments.environment import machine

    return {
        "format": to,
        "file": done.path.name,
        "proof": done.proof,
        "checks": [dataclasses.asdict(check) for check in done.checks],
        "warnings": done.warnings,
        "int8": done.int8.name if done.int8 else None,
        "accuracy": dataclasses.asdict(done.accuracy) if done.accuracy else None,
        "machine": machine(),
    }
