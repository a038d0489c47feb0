"""Which form of the operator runs: chosen once a call, before autograd; a named one never falls back."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from ..errors import DenseShortcutError

BACKENDS = ("auto", "plain", "cpu")
VARIABLE = "DENSE_SHORTCUTS_BACKEND"

_logger = logging.getLogger(__name__)


def choose(x: Tensor, wanted: str = "auto") -> str:
    """The back end for a map: "plain" or "cpu".

    Args:
        x: a feature map, (N, C, H, W).
        wanted: "auto" or a back end by name; the environment variable DENSE_SHORTCUTS_BACKEND goes before "auto".

    Raises:
        DenseShortcutError: unknown name, or a named back end that cannot run on the map's device.
    """
    wanted = os.environ.get(VARIABLE, "auto") if wanted == "auto" else wanted
    if wanted not in BACKENDS:
        raise DenseShortcutError(f"unknown back end {wanted!r}: choose one of {', '.join(BACKENDS)}.")
    if wanted == "plain" or (wanted == "auto" and _is_traced(x)):
        return "plain"
    device = x.device.type
    own, reason = own_backend(device)
    if wanted == "auto":
        if not torch.compiler.is_compiling():  # a logger cannot be called from a compiled graph
            _log_once(device, own, reason)
        return own
    if wanted != own:
        raise DenseShortcutError(
            f"the back end {wanted!r} cannot run on {device} here ({reason}): choose 'auto' or 'plain'."
        )
    return wanted


def own_backend(device: str) -> tuple[str, str]:
    """The back end that "auto" takes for a device type, and why."""
    if device in ("cpu", "meta"):
        return "cpu", "in-place sums over pieces that stay in cache"
    return "plain", f"no kernels of our own for {device} yet"


def _is_traced(x: Tensor) -> bool:
    """Whether a graph for other runtimes is being recorded, where operators of our own would not be known."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or isinstance(x, torch.fx.Proxy)


@cache
def _log_once(device: str, backend: str, reason: str) -> None:
    level = logging.INFO if backend != "plain" else logging.WARNING
    _logger.log(level, "dense shortcuts on %s use the %s back end: %s", device, backend, reason)
