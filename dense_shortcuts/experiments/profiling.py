"""What PyTorch's allocator and profiler tell of one call: its highest memory and its kernels."""

import gc
import os
from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType


def peak_bytes(step: Callable[[], Any], resident: Iterable[Tensor], device: torch.device) -> int:
    """Bytes held at the highest point of a step, what was there before it included.

    Args:
        step: one training step; it leaves no gradients behind.
        resident: all tensors that are there before and after it: weights, buffers, optimizer state, the batch.
        device: where it runs. On CUDA the allocator's own peak is taken. On a CPU it is the highest sum of what
            PyTorch's allocator gave and took back, in the order of time (torch.profiler).
    """
    held = sum(t.numel() * t.element_size() for t in resident)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)  # other networks may be on the device as well
        step()
        return held + torch.cuda.max_memory_allocated(device) - before
    seen = _profiled(step, device, profile_memory=True).profiler.kineto_results.events()
    # not what events say of themselves: what compiled code frees counts there at its end, all at once
    moves = sorted(((e.start_ns(), e.nbytes()) for e in seen if e.name() == "[memory]"), key=itemgetter(0))
    return held + max(accumulate((count for _, count in moves), initial=0))


def kernels(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that a call launched on a CUDA device; copies and fills by the driver are none."""
    events = _profiled(call, device, acc_events=True).events() or []
    on_device = [e for e in events if e.device_type == DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


def _profiled(step: Callable[[], Any], device: torch.device, **options: Any) -> Any:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports on stderr that there is no GPU
    own = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *own], **options) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profiler
