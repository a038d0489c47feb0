"""The compiled kernels and what they are called with: `native.cpp` and the structures in it.

They are built once with the machine's own C++ compiler and kept in a cache.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
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
    command = next((given for given in _compilers() if given and shutil.which(given[0])), None)
    if command is None:
        given = os.environ.get("CXX")
        return None, f"no C++ compiler found{f': CXX is {given!r}' if given else ''}"
    compiler = shlex.join([Path(command[0]).name, *command[1:]])
    try:
        loaded = _loaded(command)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        _logger.warning("the compiled kernels could not be built by %s: %s", compiler, told.strip())
        return None, f"{compiler} could not build them"
    for name, arguments in _ARGUMENTS.items():
        for suffix in ("f32", "f64"):
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return loaded, f"compiled by {compiler}"


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take maps of this dtype."""
    loaded, _ = library()
    if loaded is None or dtype not in KINDS:
        return False
    return dtype != torch.float16 or bool(loaded.dense_shortcuts_has_half())


def _compilers() -> list[list[str]]:
    """Commands to try, in words: CXX may hold options, or a cache before the compiler."""
    given = os.environ.get("CXX")
    if not given:
        return [["c++"], ["g++"], ["clang++"]]
    try:
        return [shlex.split(given)]
    except ValueError:  # a quotation that does not end
        return [[given]]


def _loaded(command: list[str]) -> ctypes.CDLL:
    """The shared library, built where there is none that is whole and loads."""
    source = Path(__file__).with_name("native.cpp")
    identity = "\n".join(
        [source.read_text(), str(shutil.which(command[0])), *command[1:], *_FLAGS, torch.__version__, _processor()]
    )
    name = f"native-{_digest(identity.encode())}"
    chosen = _chosen_folder()
    if (whole := _whole(chosen, name)) is not None:
        try:
            return ctypes.CDLL(str(whole))
        except OSError as error:
            _logger.warning("%s cannot be loaded (%s) and is built anew", whole, error)
    return ctypes.CDLL(str(_built(command, source, _writable(chosen), name)))


def _whole(folder: Path, name: str) -> Path | None:
    """The library of that name in a folder, if its content is what was written: a part of one kills its process."""
    try:
        found = [
            path for path in sorted(folder.glob(f"{name}-*.so")) if path.stem == f"{name}-{_digest(path.read_bytes())}"
        ]
    except OSError:
        return None
    return found[0] if found else None


def _built(command: list[str], source: Path, folder: Path, name: str) -> Path:
    """Build the library; its file's name ends in a digest of its content."""
    _logger.info("compiling the kernels for the CPU with %s into %s", shlex.join(command), folder)
    # Another process may be building the same: each writes its own file, and any whole one will do.
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        _compile(command, source, temporary)
        with open(temporary, "rb+") as file:
            target = folder / f"{name}-{_digest(file.read())}.so"
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compile(command: list[str], source: Path, target: str) -> None:
    whole = [*command, *_FLAGS, *_LINK, str(source), "-o", target]
    try:
        subprocess.run([*whole, "-fopenmp"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError:  # Apple's compiler has no OpenMP: one thread then
        subprocess.run([*whole, "-Wno-unknown-pragmas"], check=True, capture_output=True, text=True)


def _chosen_folder() -> Path:
    """Where libraries are kept: the user's cache, or the folder that the environment names."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dense_shortcuts"
    return folder.expanduser()


def _writable(folder: Path) -> Path:
    """The folder, made where it is missing; where it cannot be written, one of this process's own, gone at its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    _logger.warning(
        "%s cannot be written, so every process compiles the kernels anew: name another folder in %s",
        folder,
        CACHE_VARIABLE,
    )
    own = tempfile.mkdtemp(prefix="dense_shortcuts-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


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
