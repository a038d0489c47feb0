"""Chooses the back end of the operator, once per call and before autograd; a named one never falls back."""

import importlib
import importlib.util
import logging
import os
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling, is_exporting

from ..errors import DenseShortcutError
from .backends import native

BACKENDS = ("auto", "plain", "native", "triton")
VARIABLE = "DENSE_SHORTCUTS_BACKEND"

_logger = logging.getLogger(__name__)


def choose(x: Tensor, wanted: str = "auto", *, tiled: bool = False) -> str:
    """The back end for a map: "plain", "native" or "triton".

    Args:
        x: a feature map, (N, C, H, W).
        wanted: "auto" or a back end by name; the environment variable DENSE_SHORTCUTS_BACKEND, unless it is empty,
            overrides "auto".
        tiled: whether the stage has partial sums for groups of blocks, which the plain path does not use.

    Raises:
        DenseShortcutError: unknown name, or a named back end that cannot run on this machine, on this map or in this
            transform. An empty map needs no kernel and takes the plain path under any name.
    """
    named, where = (wanted, "") if wanted != "auto" else (os.environ.get(VARIABLE) or "auto", f" in {VARIABLE}")
    if named not in BACKENDS:
        raise DenseShortcutError(f"unknown back end {named!r}{where}: choose one of {', '.join(BACKENDS)}.")
    transformed = _are_functorch_transforms_active() or forward_ad._current_level >= 0
    recorded = torch.jit.is_tracing() or _is_exporting()  # for other runtimes, which know no custom operators
    if named == "plain" or (named == "auto" and (transformed or recorded)):
        return "plain"
    if transformed:
        raise DenseShortcutError(
            f"the back end {named!r} has no rules for torch.func's transforms and forward-mode gradients: "
            "choose 'auto' or 'plain'."
        )
    device = x.device.type
    if named != "auto" and (fault := unusable(named, device, x.dtype)) is not None:
        raise DenseShortcutError(f"the back end {named!r} cannot run here ({fault}): choose 'auto' or 'plain'.")
    if named == "auto" and device == "cpu" and is_compiling() and not tiled:
        return "plain"  # Inductor fuses these passes, without a Python call per block
    chosen = _automatic(device, x.dtype) if named == "auto" else named
    return chosen if x.numel() else "plain"


@cache
def kernels(backend: str) -> Any:
    """The module with a back end's kernels, imported at first use because Triton may be missing."""
    return importlib.import_module(f".backends.{'reference' if backend == 'plain' else backend}", __package__)


def own_backend(device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The back end that "auto" chooses for maps on a device type, and why."""
    name = "native" if device in ("cpu", "meta") else "triton"
    fault = unusable(name, device, dtype)
    if fault is not None:
        return "plain", fault
    return name, f"kernels {native.library()[1]}" if name == "native" else "kernels by Triton"


@torch.compiler.assume_constant_result  # the search for the library cannot be compiled
def unusable(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a back end cannot run on maps of this device type and dtype; None if it can."""
    if backend == "plain":
        return None
    if dtype not in native.KINDS:
        return f"maps are in {dtype}"
    if backend == "triton":
        return _without_triton(device)
    if device not in ("cpu", "meta"):
        return f"maps are on {device}"
    if native.supports(dtype):
        return None
    built, reason = native.library()
    return reason if built is None else f"the compiler of the kernels does not know {dtype}"


def _without_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cuda" and torch.version.hip is None:
        return None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels are for NVIDIA GPUs, and maps are on {'ROCm' if torch.version.hip else device}"


@torch.compiler.assume_constant_result  # which the compiler knows of a plain function only, not of a cached one
def _automatic(device: str, dtype: torch.dtype) -> str:
    return _automatic_once(device, dtype)


@cache
def _automatic_once(device: str, dtype: torch.dtype) -> str:
    own, reason = own_backend(device, dtype)
    level = logging.INFO if own != "plain" else logging.WARNING
    _logger.log(level, "dense shortcuts on %s in %s use the %s back end: %s", device, dtype, own, reason)
    return own


@torch.compiler.assume_constant_result  # PyTorch 2.9 would compile it to True
def _is_exporting() -> bool:
    return bool(is_exporting())
