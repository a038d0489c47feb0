"""The compiled kernels and what they are called with: `native.cpp` and the structures in it.

They are built once with the machine's own C++ compiler and kept in a cache.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHE_VARIABLE = "DENSE_SHORTCUTS_CACHE"

_FLAGS = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_LINK = ["-shared", "-fPIC"]
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SMALL = 2**15  # elements of a map below which a second thread costs more than it gains

_logger = logging.getLogger(__name__)


class Map(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32))


class Shape(ctypes.Structure):
    _fields_ = (
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("last", ctypes.c_bool),
    )


_long, _pointer, _int = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32


class Form(ctypes.Structure):
    _fields_ = (
        ("groups", _long),
        ("eps", ctypes.c_double),
        *((name, _pointer) for name in ("weight", "bias", "rate", "shift", "pooled", "variance")),
    )


class Through(ctypes.Structure):
    _fields_ = (
        ("groups", _long),
        ("eps", ctypes.c_double),
        *((name, _pointer) for name in ("weight", "pooled", "variance", "grad_rate", "grad_shift")),
        ("count", ctypes.c_double),
        ("rows", _long),
        *((name, _pointer) for name in ("offset", "slope", "grad_weight", "grad_bias")),
    )


class Pairs(ctypes.Structure):
    _fields_ = (
        ("maps", _pointer),
        ("count", _long),
        ("branch", ctypes.c_bool),
        ("weight", _pointer),
        ("total", _long),
        *((name, _pointer) for name in ("rates", "shifts", "branch_rate", "branch_shift")),
        ("rows", _long),
        ("scales", _pointer),
        ("bias", _pointer),
    )


class PairGradients(ctypes.Structure):
    _fields_ = tuple(
        (name, _pointer) for name in ("scales", "bias", "weight", "rates", "shifts", "branch_rate", "branch_shift")
    )


class Pull(ctypes.Structure):
    _fields_ = (
        ("x", Map),
        ("grad", _pointer),
        ("own", Through),
        *((name, _pointer) for name in ("later", "later_scales", "later_rows")),
        ("later_count", _long),
        ("relu", ctypes.c_bool),
        ("out", _pointer),
        ("kind", _int),
    )


class Nested(ctypes.Structure):
    _fields_ = (
        *((name, _long) for name in ("images", "channels", "groups")),
        *((name, ctypes.c_double) for name in ("eps", "outer_eps")),
        *((name, _pointer) for name in ("mean", "var", "weight", "bias")),
        *((name, _pointer) for name in ("rate", "shift", "pooled", "variance", "outer_mean", "outer_var")),
    )


_FORM, _PULL, _PAIRS = (ctypes.POINTER(struct) for struct in (Form, Pull, Pairs))
_ARGUMENTS: dict[str, list[type]] = {
    "enter": [Shape, Map, _FORM, _FORM, ctypes.c_int],
    "block": [Shape, _pointer, _long, _FORM, _PAIRS, ctypes.c_bool, _pointer, _int, _FORM, ctypes.c_int],
    "pull": [Shape, _PULL, _pointer, _long, _long, _pointer, _pointer, ctypes.c_int],
    "pull_block": [
        *(Shape, _PULL, _PAIRS, ctypes.POINTER(PairGradients), ctypes.POINTER(Through), _pointer, ctypes.c_int)
    ],
    "mix": [Shape, _pointer, _long, _pointer, _long, _long, _pointer, _int, ctypes.c_int],
    "dots": [Shape, _pointer, _long, _pointer, _long, _long, _pointer, ctypes.c_int],
    "running": [_long, _FORM],
    "nested": [ctypes.POINTER(Nested)],
    "nested_backward": [ctypes.POINTER(Nested), *[_pointer] * 6],
    "move": [_long, *[_pointer] * 2, *[ctypes.c_double] * 2, *[_pointer] * 2],
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
    if loaded is None or dtype not in KINDS:
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


def kernel(name: str, like: Tensor) -> "ctypes._FuncPointer":
    """The compiled function for maps, or numbers per channel, of a dtype."""
    loaded, reason = library()
    assert loaded is not None, reason
    found: ctypes._FuncPointer = getattr(loaded, f"{name}_{'f64' if like.dtype == torch.float64 else 'f32'}")
    return found


def threads(like: Tensor) -> int:
    """How many threads work on a map: as many as PyTorch uses, one for a small one."""
    return torch.get_num_threads() if like.numel() > _SMALL else 1


def address_of(x: Tensor | None, dtype: torch.dtype, kept: list[Any]) -> int | None:
    """Where numbers of a dtype stand one after the other, x's own or a copy's, which is kept; None for none."""
    if x is None:
        return None
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    kept.append(x)
    return x.data_ptr()


def shape_of(x: Tensor) -> Shape:
    return Shape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], is_last(x))


def is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
