"""The measurement: networks in turn on the same input, so that whatever else the machine does hits all alike."""

import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import DenseShortcutError
from ...inference.fuse import fuse
from ...surgery.plug import dense_stages
from ..profiling import kernels, peak_bytes
from .config import BenchConfig, Mode
from .models import Comparison, Entry
from .traffic import ShortcutBytes, operators, shortcut_bytes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_OWN = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 2**16}  # what glibc comes to by itself at the most
LEAST_SECONDS = 0.3  # a turn is as many calls as fill this time
WARM_CALLS = 2
TIME_IS_UP = "the time of --gpu was up"


@dataclass
class Row:
    """One network's figures.

    Attributes:
        seconds: of one call, for each round in turn, by "train" and "infer".
        launched: kernels (CUDA) or operators (CPU) of forward and backward pass, and of inference, by the same; empty
            where they cannot be counted.
        peak_bytes: of a training step, weights, gradients, optimizer state and batch included.
        shortcut_bytes: of a training step's shortcuts; None where there are none that `traffic` knows, and compiled.
    """

    name: str
    parameters: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    launched: dict[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    shortcut_bytes: ShortcutBytes | None = None


@dataclass
class Result:
    """A comparison's rows, the peer first, and what could not be measured with the reason."""

    label: str
    mode: Mode
    peer: str
    shape: tuple[int, int, int, int]
    depth: int | None
    rows: list[Row]
    left_out: dict[str, str]


class Contender:
    """A network that is timed: its step, its input and how many calls make a turn."""

    def __init__(self, entry: Entry, mode: Mode, images: Tensor, labels: Tensor, config: BenchConfig) -> None:
        self.entry, self.compiled = entry, mode == "compiled"
        self.images, self.labels, self.precision = images, labels, config.precision
        self.device = images.device
        self.model = self._placed(folded(entry.build()) if config.folded else entry.build())
        self.network: Any = torch.compile(self.model) if self.compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        self.calls: dict[str, int] = {}
        self.row = Row(entry.name, sum(p.numel() for p in self.model.parameters()))

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).to(memory_format=torch.channels_last)

    def train(self) -> None:
        """One training step: forward, loss, backward, update."""
        self._forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, network: Any = None) -> None:
        with self._autocast():
            output = (network or self.network)(self.images)
        F.cross_entropy(output.float(), self.labels).backward()

    def infer(self) -> None:
        with torch.inference_mode(), self._autocast():
            self.network(self.images)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def call(self, what: str) -> Callable[[], None]:
        """The call that is timed, with the network put into its mode."""
        self.model.train(what == "train")
        return self.train if what == "train" else self.infer

    def warm_up(self, what: str) -> None:
        """First calls, which compile and allocate; the last one decides how many calls make a turn."""
        call = self.call(what)
        for _ in range(WARM_CALLS):
            seconds = timed(call, 1, self.device)
        self.calls[what] = max(1, math.ceil(LEAST_SECONDS / seconds))
        self.row.seconds[what] = []

    def measure_once(self, what: str) -> None:
        """What needs no repetition: launches, and of a training step its memory and the bytes of its shortcuts."""
        call = self.call(what)
        launching = self._forward_backward if what == "train" else call
        if self.device.type == "cuda":
            self.row.launched[what] = kernels(launching, self.device)
        elif not self.compiled:  # what Inductor compiles for a CPU is a single call
            self.row.launched[what] = operators(launching).calls
        self.optimizer.zero_grad(set_to_none=True)
        if what == "infer":
            return
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        resident = [*self.model.parameters(), *self.model.buffers(), *state, self.images, self.labels]
        self.row.peak_bytes = peak_bytes(call, resident, self.device)
        if not self.compiled and self.entry.build_host is not None:
            host = self._placed(self.entry.build_host()).train()
            self.row.shortcut_bytes = shortcut_bytes(self.model, host, self._forward_backward)
            self.optimizer.zero_grad(set_to_none=True)

    def turn(self, what: str) -> None:
        """One round's measurement, behind a call that settles allocator and caches after another network."""
        call = self.call(what)
        call()
        self.row.seconds[what].append(timed(call, self.calls[what], self.device))


def folded(model: nn.Module) -> nn.Module:
    """A copy for inference alone, with batch norms in the convolutions before them."""
    from torch.fx.experimental.optimization import fuse as fold

    return fuse(model) if dense_stages(model) else fold(model.eval())


def timed(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of one of so many calls in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - started) / calls


def compare(
    comparison: Comparison,
    mode: Mode,
    size: int,
    config: BenchConfig,
    device: torch.device,
    tell: Callable[[str], Any],
    until: float = math.inf,
) -> Result:
    """Measure the networks of a comparison in turn, round by round.

    Args:
        comparison: what takes part.
        mode: eager or compiled.
        size: side of the input in pixels.
        config: a resolved configuration.
        device: where to measure.
        tell: takes a line about what is done.
        until: time of `time.monotonic` after which no network but the peer is begun.

    Raises:
        DenseShortcutError: the peer cannot run; any other network that cannot is left out with the reason.
    """
    shape = (comparison.batch_size, comparison.channels, size, size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(comparison.classes, shape[:1], generator=generator).to(device)

    contenders, left_out = [], {}
    with settled(device, config.keep_heap):
        for entry in comparison.entries:
            if time.monotonic() > until and entry.name != comparison.peer:
                left_out[entry.name] = TIME_IS_UP
                continue
            tell(f"warming up {entry.name}")
            try:
                contenders.append(warmed_up(entry, mode, images, labels, config))
            # out of memory, no compiler, no such kernel; timm asserts that an image has a transformer's own size
            except (RuntimeError, AssertionError, DenseShortcutError) as error:
                left_out[entry.name] = reason(error)
            if comparison.peer in left_out:
                raise DenseShortcutError(
                    f"the peer {entry.name} cannot run here ({left_out[entry.name]}): take another --batch-size or "
                    "--image-size, or other --models."
                )

        for number in range(config.rounds or 1):
            tell(f"round {number + 1} of {config.rounds}")
            first = number % len(contenders)  # nobody always comes behind the same network
            for what in config.what:
                for contender in contenders[first:] + contenders[:first]:
                    contender.turn(what)
    rows = [contender.row for contender in contenders]
    return Result(comparison.label, mode, comparison.peer, shape, comparison.depth, rows, left_out)


def reason(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def warmed_up(entry: Entry, mode: Mode, images: Tensor, labels: Tensor, config: BenchConfig) -> Contender:
    """A network ready for its turns, with what is measured only once."""
    torch.manual_seed(0)
    contender = Contender(entry, mode, images, labels, config)
    for what in config.what:
        contender.warm_up(what)
        contender.measure_once(what)
    return contender


@contextlib.contextmanager
def settled(device: torch.device, keeps_heap: bool) -> Iterator[None]:
    """PyTorch as a benchmark needs it: convolutions tuned, memory kept, and every network with its own compiled code.

    Dynamo keeps compiled code by the class of a network and by default runs the ninth one of a class uncompiled.
    """
    import torch._dynamo

    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    limits = {"recompile_limit": 512, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True),
        torch._dynamo.config.patch(limits),
        kept_heap() if keeps_heap else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Has this process keep the memory that it frees, where its allocator is glibc's.

    It would give large pieces back to the system and get them anew, page by page, at every call: for one network and
    not for another, as the pieces happen to lie, which moves a ratio by a tenth from one process to the next.
    """
    _set_allocator(_KEPT)
    try:
        yield
    finally:
        _set_allocator(_OWN)


def _set_allocator(settings: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in settings.items():
            mallopt(option, value)
