"""The compiled kernels, `native.cpp`, and how they are called.

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
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

CACHE_VARIABLE = "DENSE_SHORTCUTS_CACHE"

_FLAGS = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_LINK = ["-shared", "-fPIC"]
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_INTEGER, _DOUBLE = struct.Struct("q"), struct.Struct("d")
_SMALL = 2**15  # elements of a map below which a second thread costs more than it gains

_logger = logging.getLogger(__name__)


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


@cache
def _function(name: str, double: bool) -> "ctypes._FuncPointer":
    loaded, reason = library()
    assert loaded is not None, reason
    found: ctypes._FuncPointer = getattr(loaded, f"{name}_{'f64' if double else 'f32'}")
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    return found


def call(name: str, dtype: torch.dtype, words: Sequence[int]) -> None:
    """Run a function of `native.cpp` that accumulates in a dtype.

    Args:
        words: the number of threads, then what the function takes, each a whole number, an address, or the bits of a
            float (`bits`). One row of numbers is far quicker to make than structures are.
    """
    row = array("q", words)
    _function(name, dtype == torch.float64)(row.buffer_info()[0], None)


class Call:
    """`call` for any number of times, with other tensors each time.

    The words, which are kept, hold a place in a table wherever an address is due, or what `behind` gives. In the table
    come 0, the address of two blocks of memory or 0, and then any others.
    """

    def __init__(self, name: str, dtype: torch.dtype, words: Sequence[int]) -> None:
        self.words = array("q", words)
        self.function, self.address = _function(name, dtype == torch.float64), self.words.buffer_info()[0]

    def __call__(self, table: "array[int]") -> None:
        self.function(self.address, table.buffer_info()[0])


def behind(count: int, block: int = 0) -> int:
    """The word for the address so many bytes into the first or second block of memory of a table."""
    return -1 - (2 * count + block)


@lru_cache(256)
def bits(value: float) -> int:
    """A float as the whole number with the same 64 bits."""
    return int(_INTEGER.unpack(_DOUBLE.pack(value))[0])


def address_of(x: Tensor | None, dtype: torch.dtype, kept: list[Tensor]) -> int:
    """Where numbers of a dtype stand one after the other, x's own or a copy's, which are kept; 0 for none."""
    if x is None:
        return 0
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    kept.append(x)
    return x.data_ptr()


def shape_words(x: Tensor) -> list[int]:
    """Threads that work on a map, its images, channels and pixels, and whether it is channels_last.

    There are as many threads as PyTorch uses, one for a small map.
    """
    n, c, h, w = x.shape
    count = torch.get_num_threads() if x.numel() > _SMALL else 1
    return [count, n, c, h * w, is_last(x)]


class LaidOut:
    """Something prepared for maps that are laid out as x, (N, C, H, W), for as many threads as there are now."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.layout, self.words = x.shape, (x.dtype, x.stride()), shape_words(x)

    def takes(self, x: Tensor) -> bool:
        """Whether a map is laid out so."""
        return type(x) is Tensor and x.shape == self.shape and (x.dtype, x.stride()) == self.layout

    def serves(self, x: Tensor) -> bool:
        """Whether a pass may begin with x."""
        return self.takes(x) and shape_words(x) == self.words


def is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
