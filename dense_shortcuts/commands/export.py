"""`dsnet export`: a trained network for other runtimes."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .arguments import Positional


@dataclass(frozen=True)
class Export:
    """Write a trained network for another runtime, once that runtime agrees with PyTorch on real images."""

    checkpoint: Positional[Path]
    """A network's folder in a run, or the model.safetensors in it; `shipped` is the network in the package."""
    to: Literal["onnx", "torch-export", "executorch", "openvino", "hub"]
    """Format; `hub` is a folder for the Hugging Face hub, with a model card."""
    output: Path | None = None
    """File, or folder for `hub`; None is model.onnx (.pt2, .pte, .xml) or hub/ in the network's folder."""
    int8: bool = False
    """In int8 as well, by onnxruntime or torchao, with the accuracy before and after."""
    data: str | None = None
    """digits, cifar100 or imagefolder; None is what it was trained on."""
    data_dir: str | None = None
    """Folder of the data; None is the run's own."""
    limit_test: int | None = None
    """Use only so many test images; None is the run's own."""

    def run(self, line: str) -> None:
        from .. import export

        if self.to == "hub":
            folder = export.save_for_hub(self.checkpoint, self.output)
            print(f"{folder}: upload it with `hf upload OWNER/NAME {shlex.quote(str(folder))}`")
            return
        fields = {name: value for name, value in vars(self).items() if name != "checkpoint"}
        done = export.export(self.checkpoint, **fields)
        for warning in done.warnings:
            print(f"note: {warning}")
        sizes = sorted({(check.height, check.width) for check in done.checks})
        print(
            f"{done.path} agrees with PyTorch on batches of 1, 2 and 5 {done.proof} at "
            f"{' and '.join(f'{width}x{height}' for height, width in sizes)}: greatest difference {done.difference:.1e}"
        )
        if done.accuracy is not None:
            print(
                f"{done.int8}: accuracy {done.accuracy.int8:.2f} % in int8, {done.accuracy.float32:.2f} % in float32, "
                f"on {done.accuracy.images:,} test images"
            )
