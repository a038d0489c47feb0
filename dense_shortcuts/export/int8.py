"""int8: convolutions and linear layers with weights and inputs of eight bits, calibrated on training images."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .formats import INPUT, quiet
from .graph import BATCH, any_size, capture

OPERATORS = ["Conv", "Gemm", "MatMul"]  # the shortcuts' sums and statistics stay in float32


def quantise_onnx(source: Path, target: Path, calibration: Sequence[Tensor]) -> None:
    """onnxruntime's static quantisation of an ONNX file (QDQ, per-channel weights).

    Args:
        source, target: files.
        calibration: batches of images, (N, 3, S, S) each.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends preprocessing that the exporter has done
    try:
        quantization.quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    finally:
        logger.setLevel(level)


def quantise_torch(net: nn.Module, target: Path, calibration: Sequence[Tensor]) -> None:
    """torchao's static quantisation of a fused network, saved as an exported program.

    Args:
        net: a result of `graph.inference_form`.
        target: file.
        calibration: batches of images, (N, 3, S, S) each.
    """
    from torchao.quantization.pt2e import quantize_pt2e as pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    side = calibration[0].shape[-1]
    with torch.no_grad(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # deprecations between PyTorch and torchao
        prepared = pt2e.prepare_pt2e(capture(net, side).module(), quantizer)
        for batch in calibration:
            prepared(batch)
        converted = pt2e.convert_pt2e(prepared)
        program = torch.export.export(converted, (torch.zeros(BATCH, 3, side, side),), dynamic_shapes=(any_size(),))
        torch.export.save(program, target)
