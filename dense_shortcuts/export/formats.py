"""The formats: how a graph is written to a file, and how the format's own runtime runs that file."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..extras import need

Runner = Callable[[Tensor], Tensor]

INPUT, OUTPUT = "images", "scores"
LARGEST = (8, 512)  # ExecuTorch plans its memory for the largest batch and side


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: of the file.
        write: writes a program to a path.
        load: what runs the file, from images (N, 3, H, W) to scores (N, classes).
        libraries: the modules that it needs, of `extra`.
        beside: suffixes of files written beside it.
        largest: largest batch and side; None for any.
    """

    suffix: str
    write: Callable[[ExportedProgram, Path], None]
    load: Callable[[Path], Runner]
    libraries: tuple[str, ...] = ()
    extra: str = "export"
    beside: tuple[str, ...] = ()
    largest: tuple[int, int] | None = None

    def check(self) -> None:
        """Check that all libraries are installed, before any work is done.

        Raises:
            DenseShortcutError: one is not installed.
        """
        if self.libraries:
            need(f"a {self.suffix} file", self.extra, *self.libraries)


def write_onnx(program: ExportedProgram, path: Path) -> None:
    with quiet():
        torch.onnx.export(
            program,
            (),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )


def load_onnx(path: Path) -> Runner:
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def load_torch(path: Path) -> Runner:
    module: Any = torch.export.load(path).module()
    return module


def write_openvino(program: ExportedProgram, path: Path) -> None:
    import openvino

    graph = path.with_suffix(".onnx")
    try:
        write_onnx(program, graph)
        model = openvino.convert_model(str(graph))
        openvino.save_model(model, str(path), compress_to_fp16=False)  # the default is fp16
    finally:
        graph.unlink(missing_ok=True)


def load_openvino(path: Path) -> Runner:
    import openvino

    core = openvino.Core()
    # Where a CPU has bf16 it would compute in that.
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def write_executorch(program: ExportedProgram, path: Path) -> None:
    from executorch import exir
    from executorch.backends.xnnpack.partition import xnnpack_partitioner as xnnpack

    known = {torch.ops.aten.var_mean.correction: _var_and_mean}
    program = program.run_decompositions({**torch.export.default_decompositions(), **known})
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def _var_and_mean(x: Tensor, dim: Any, *, correction: Any, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """aten::var_mean as var and mean, because ExecuTorch only has these."""
    return torch.var(x, dim, correction=correction, keepdim=keepdim), torch.mean(x, dim, keepdim=keepdim)


def load_executorch(path: Path) -> Runner:
    from executorch.runtime import Runtime

    runtime = Runtime.get()
    method = runtime.load_program(str(path)).load_method("forward")
    return lambda images: method.execute([images.contiguous()])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's progress output; errors are raised as usual."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


_ONNX = ("onnx", "onnxscript")

FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx, libraries=(*_ONNX, "onnxruntime")),
    "torch-export": Format(".pt2", write_torch, load_torch),
    "executorch": Format(
        ".pte",
        write_executorch,
        load_executorch,
        libraries=("executorch",),
        extra="executorch",
        largest=LARGEST,
    ),
    "openvino": Format(".xml", write_openvino, load_openvino, libraries=(*_ONNX, "openvino"), beside=(".bin",)),
}
