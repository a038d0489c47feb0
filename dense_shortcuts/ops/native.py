"""The kernels on the CPU, compiled: `native.cpp`, built once with the machine's own C++ compiler and kept in a cache.

Each map is read from memory once and each output written once, by as many threads as PyTorch uses. Maps are taken
channels_last or contiguous, in float32, float64, bfloat16 and (where the compiler knows it) float16, mixed if need be.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .forms import BATCH
from .reference import accumulation_dtype

CACHE_VARIABLE = "DENSE_SHORTCUTS_CACHE"

_FLAGS = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_LINK = ["-shared", "-fPIC"]
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SMALL = 2**15  # elements of a map below which a second thread costs more than it gains

_logger = logging.getLogger(__name__)


class _Map(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32))


class _Shape(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("last", ctypes.c_bool),
    )


_long, _pointer = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: dict[str, list[type]] = {
    "moments": [_Shape, _Map, _pointer, _pointer, ctypes.c_int],
    "join": [
        *(_Shape, _pointer, _long, _pointer, _long, _pointer, _long, _pointer),
        *(ctypes.c_bool, _pointer, ctypes.c_int32, _pointer, _pointer, ctypes.c_int),
    ],
    "pull": [
        *(_Shape, _Map, _pointer, _pointer, _pointer, _long, _pointer, _pointer, _pointer, _long, _pointer, _long),
        *(_long, ctypes.c_bool, _pointer, ctypes.c_int32, _pointer, _pointer, ctypes.c_int),
    ],
    "mix": [_Shape, _pointer, _long, _pointer, _long, _long, _pointer, ctypes.c_int32, ctypes.c_int],
    "dots": [_Shape, _pointer, _long, _pointer, _long, _long, _pointer, ctypes.c_int],
    "form": [_long, _long, _pointer, _pointer, _long, ctypes.c_double, *[_pointer] * 6],
    "form_backward": [
        *(_long, _long, _pointer, _pointer, _long, ctypes.c_double, _pointer, _pointer, _pointer, ctypes.c_double),
        *[_pointer] * 4,
    ],
    "coefficients": [*[_long] * 4, *[_pointer] * 7],
    "coefficients_backward": [*[_long] * 4, *[_pointer] * 3, ctypes.c_bool, *[_pointer] * 7],
}


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, or None, and why. The first call on a machine compiles them, which takes some seconds."""
    compiler = next((found for name in _compilers() if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "no C++ compiler found"
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        _logger.warning("the compiled kernels could not be built by %s: %s", compiler, told.strip())
        return None, f"{Path(compiler).name} could not build them"
    for name, arguments in _ARGUMENTS.items():
        for suffix in ("f32", "f64"):
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return loaded, f"compiled by {Path(compiler).name}"


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take maps of this dtype."""
    loaded, _ = library()
    if loaded is None or dtype not in _KINDS:
        return False
    return dtype != torch.float16 or bool(loaded.dense_shortcuts_has_half())


def _compilers() -> list[str]:
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def _built(compiler: str) -> Path:
    """Path of the shared library for this source, compiler and processor, built if it is not there yet."""
    source = Path(__file__).with_name("native.cpp")
    identity = "\n".join([source.read_text(), compiler, *_FLAGS, torch.__version__, _processor()])
    name = f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    target = folder / name
    if target.is_file():
        return target
    _logger.info("compiling the kernels for the CPU with %s into %s", compiler, folder)
    # Another process may be building the same file: each writes its own and the last one stands.
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        _compile(compiler, source, temporary)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _compile(compiler: str, source: Path, target: str) -> None:
    command = [compiler, *_FLAGS, *_LINK, str(source), "-o", target]
    try:
        subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError:  # Apple's compiler has no OpenMP: one thread then
        subprocess.run([*command, "-Wno-unknown-pragmas"], check=True, capture_output=True, text=True)


def _cache_folder() -> Path:
    """The user's cache, or where it cannot be written a folder of this process's own."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dense_shortcuts"
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dense_shortcuts-"))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.moments`."""
    x = _standard(x)
    mean = x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))
    var = torch.empty_like(mean)
    _call("moments", x, _shape(x), _Map(x.data_ptr(), _KINDS[x.dtype]), mean.data_ptr(), var.data_ptr())
    return mean, var


def join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.join`."""
    first = _standard((*addends, *maps)[0])
    addends, maps = _like(first, addends), _like(first, maps)
    scales, bias = scales.contiguous(), None if bias is None else bias.contiguous()
    y = first if out is first else torch.empty_like(first)
    mean = first.new_empty(first.shape[:2] if statistics else (0,), dtype=accumulation_dtype(first.dtype))
    var = torch.empty_like(mean)
    rows = scales.shape[1]
    moments_to = (mean.data_ptr(), var.data_ptr()) if statistics else (None, None)
    _call(
        "join",
        first,
        _shape(first),
        *_listed(addends),
        *_listed(maps),
        scales.data_ptr(),
        rows,
        _address(bias),
        relu,
        y.data_ptr(),
        _KINDS[y.dtype],
        *moments_to,
    )
    return y, mean, var


def pull(
    x: Tensor,
    grad: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    later_grads: Sequence[Tensor],
    later_scales: Sequence[Tensor],
    maps: Sequence[Tensor],
    rows: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pull`."""
    x = _standard(x)
    dtype = accumulation_dtype(x.dtype)
    later_grads, maps = _like(x, later_grads), _like(x, maps)
    grads = _like(x, [] if grad is None else [grad])
    offset, slope = (None if t is None else t.to(dtype).contiguous() for t in (offset, slope))
    later_scales = [a.to(dtype).contiguous() for a in later_scales]
    pulled = torch.empty_like(x)
    grad_scales = x.new_empty((len(maps), rows, x.shape[1]), dtype=dtype)
    grad_bias = x.new_empty((rows, x.shape[1]), dtype=dtype)
    _call(
        "pull",
        x,
        _shape(x),
        _Map(x.data_ptr(), _KINDS[x.dtype]),
        _listed(grads)[0] if grads else None,
        _address(offset),
        _address(slope),
        1 if offset is None else offset.shape[0],
        _listed(later_grads)[0],
        _addresses(later_scales),
        (ctypes.c_int64 * len(later_scales))(*(a.shape[0] for a in later_scales)),
        len(later_grads),
        *_listed(maps),
        rows,
        relu,
        pulled.data_ptr(),
        _KINDS[x.dtype],
        grad_scales.data_ptr(),
        grad_bias.data_ptr() if rows else None,
    )
    return pulled, grad_scales, grad_bias


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """See `reference.mix`."""
    last = _standard(maps[-1])
    maps, scales = _like(last, maps), scales.to(accumulation_dtype(last.dtype)).contiguous()
    outputs = [torch.empty_like(last) for _ in range(scales.shape[0])]
    rows, kind = scales.shape[2], _KINDS[last.dtype]
    listed, count = _listed(maps)
    _call("mix", last, _shape(last), listed, count, scales.data_ptr(), len(outputs), rows, _addresses(outputs), kind)
    return outputs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """See `reference.dots`."""
    first = _standard(maps[0])
    grads, maps = _like(first, grads), _like(first, maps)
    out = first.new_empty((len(grads), len(maps), rows, first.shape[1]), dtype=accumulation_dtype(first.dtype))
    _call("dots", first, _shape(first), *_listed(grads), *_listed(maps), rows, out.data_ptr())
    return out


def form(
    mean: Tensor, var: Tensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `forms.form`."""
    (n, c), mean, var = mean.shape, mean.contiguous(), var.contiguous()
    weight, bias = (None if t is None else t.to(mean.dtype).contiguous() for t in (weight, bias))
    rate = mean.new_empty((1 if groups == BATCH else n, c))
    pooled = mean.new_empty((1, c) if groups == BATCH else (n, groups))
    shift, variance = torch.empty_like(rate), torch.empty_like(pooled)
    _function("form", mean)(
        *(n, c, mean.data_ptr(), var.data_ptr(), groups, eps, _address(weight), _address(bias)),
        *(t.data_ptr() for t in (rate, shift, pooled, variance)),
    )
    return rate, shift, pooled, variance


def form_backward(
    pooled: Tensor,
    variance: Tensor,
    groups: int,
    eps: float,
    weight: Tensor | None,
    grad_rate: Tensor,
    grad_shift: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `forms.form_backward`."""
    grad_rate, grad_shift = grad_rate.contiguous(), grad_shift.contiguous()
    weight = None if weight is None else weight.to(grad_rate.dtype).contiguous()
    (rows, c), offset = grad_rate.shape, torch.empty_like(grad_rate)
    slope, grad_weight = torch.empty_like(offset), offset.new_empty(c)
    grad_bias = torch.empty_like(grad_weight)
    _function("form_backward", offset)(
        *(rows, c, pooled.data_ptr(), variance.data_ptr(), groups, eps, _address(weight)),
        *(grad_rate.data_ptr(), grad_shift.data_ptr(), count),
        *(t.data_ptr() for t in (offset, slope, grad_weight, grad_bias)),
    )
    return offset, slope, grad_weight, grad_bias


def coefficients(
    weight: Tensor,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    first: int,
    branch: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """See `forms.coefficients`."""
    rates, shifts = [t.contiguous() for t in rates], [t.contiguous() for t in shifts]
    (rows, c), dtype = rates[0].shape, rates[0].dtype
    weight = weight.to(dtype).contiguous()
    branch_rate, branch_shift = branch or (None, None)
    scales = rates[0].new_empty((len(rates) - first + (branch is not None), rows, c))
    bias = rates[0].new_empty((rows, c))
    _function("coefficients", bias)(
        *(rows, c, len(rates), first, weight.data_ptr(), _addresses(rates), _addresses(shifts)),
        *(_address(branch_rate), _address(branch_shift), scales.data_ptr(), bias.data_ptr()),
    )
    return scales, bias


def coefficients_backward(
    weight: Tensor,
    rates: Sequence[Tensor],
    shifts: Sequence[Tensor],
    first: int,
    has_branch: bool,
    grad_scales: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """See `forms.coefficients_backward`."""
    rates, shifts = [t.contiguous() for t in rates], [t.contiguous() for t in shifts]
    rows, c = rates[0].shape
    wide = weight.to(grad_bias.dtype).contiguous()
    grad_weight = torch.empty_like(wide)
    grad_rates = grad_bias.new_empty((len(rates) - first, rows, c))
    grad_shifts = grad_bias.new_empty((len(rates), rows, c))
    to_branch = grad_bias.new_empty((2, 1 if has_branch else 0, c))
    _function("coefficients_backward", grad_bias)(
        *(rows, c, len(rates), first, wide.data_ptr(), _addresses(rates), _addresses(shifts), has_branch),
        *(grad_scales.data_ptr(), grad_bias.data_ptr(), grad_weight.data_ptr(), grad_rates.data_ptr()),
        *(grad_shifts.data_ptr(), to_branch[0].data_ptr(), to_branch[1].data_ptr()),
    )
    return grad_weight.to(weight.dtype), list(grad_rates), list(grad_shifts), to_branch[0], to_branch[1]


def _function(name: str, like: Tensor) -> "ctypes._FuncPointer":
    """The compiled function for maps, or numbers per channel, of a dtype."""
    loaded, reason = library()
    assert loaded is not None, reason
    found: ctypes._FuncPointer = getattr(loaded, f"{name}_{'f64' if like.dtype == torch.float64 else 'f32'}")
    return found


def _call(name: str, like: Tensor, *arguments: object) -> None:
    threads = torch.get_num_threads() if like.numel() > _SMALL else 1
    _function(name, like)(*arguments, threads)


def _standard(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _like(first: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps in the layout of `first`."""
    layout = torch.channels_last if _is_last(first) else torch.contiguous_format
    return [x.contiguous(memory_format=layout) for x in maps]


def _is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _shape(x: Tensor) -> _Shape:
    return _Shape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], _is_last(x))


def _listed(maps: Sequence[Tensor]) -> tuple[ctypes.Array[_Map], int]:
    return (_Map * len(maps))(*(_Map(x.data_ptr(), _KINDS[x.dtype]) for x in maps)), len(maps)


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
