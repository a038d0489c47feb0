"""The five passes on the CPU, by the compiled library (`native.cpp`) that is built when the package is installed.

Each map is read from memory once and each output written once, with as many threads as PyTorch uses. Maps may be
contiguous or channels_last, in float32, float64, bfloat16 and float16, also mixed; other layouts are copied first.
"""

import ctypes
import importlib.machinery
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import accumulation_dtype

KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SMALL = 2**15  # elements of a map up to which a second thread costs more than it gains

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


def _fields(**kinds: Any) -> list[tuple[str, Any]]:
    return list(kinds.items())


class Map(ctypes.Structure):
    _fields_ = _fields(data=_ADDRESS, kind=_INT)


class Term(ctypes.Structure):
    _fields_ = _fields(map=Map, scale=_ADDRESS, rows=_INT)


_MAPS, _TERMS = ctypes.POINTER(Map), ctypes.POINTER(Term)
_SHAPE = _fields(threads=_INT, images=_INT, channels=_INT, pixels=_INT, channels_last=_INT)


class MomentsArgs(ctypes.Structure):
    _fields_ = [*_SHAPE, *_fields(x=Map, mean=_ADDRESS, var=_ADDRESS)]


class JoinArgs(ctypes.Structure):
    _fields_ = [
        *_SHAPE,
        *_fields(terms=_TERMS, num_terms=_INT, bias=_ADDRESS, bias_rows=_INT, relu=_INT),
        *_fields(out=Map, mean=_ADDRESS, var=_ADDRESS),
    ]


class PullArgs(ctypes.Structure):
    _fields_ = [
        *_SHAPE,
        *_fields(x=Map, grad=Map, offset=_ADDRESS, slope=_ADDRESS, moved_rows=_INT),
        *_fields(later=_TERMS, num_later=_INT, maps=_MAPS, num_maps=_INT, rows=_INT, relu=_INT),
        *_fields(out=_ADDRESS, grad_scales=_ADDRESS, grad_bias=_ADDRESS),
    ]


class MixArgs(ctypes.Structure):
    _fields_ = [
        *_SHAPE,
        *_fields(maps=_MAPS, num_maps=_INT, outputs=_MAPS, num_outputs=_INT, scales=_ADDRESS, rows=_INT),
    ]


class DotsArgs(ctypes.Structure):
    _fields_ = [*_SHAPE, *_fields(grads=_MAPS, num_grads=_INT, maps=_MAPS, num_maps=_INT, rows=_INT, out=_ADDRESS)]


_array = cache(lambda cls, count: cls * count)  # ctypes would make the class anew at each call


def schema() -> str:
    """Every structure with its size and field offsets, in the format of the library's `dense_shortcuts_schema`."""
    structures: tuple[Any, ...] = (Map, Term, MomentsArgs, JoinArgs, PullArgs, MixArgs, DotsArgs)
    lines = []
    for cls in structures:
        fields = " ".join(f"{name}@{getattr(cls, name).offset}" for name, _ in cls._fields_)
        lines.append(f"{cls.__name__} {ctypes.sizeof(cls)} {fields}\n")
    return "".join(lines)


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library for this processor's instruction set, and which one it is; or None, and why there is none."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    names = {"avx512": ["avx512", "avx2", "base"], "avx2": ["avx2", "base"]}.get(widest, ["base"])
    files = (f"native_{name}{suffix}" for name in names for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in map(Path(__file__).with_name, files) if path.is_file()), None)
    if path is None:
        return None, "the package was installed without a C++ compiler: install it again where there is one"
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.dense_shortcuts_schema.restype = ctypes.c_char_p
        if loaded.dense_shortcuts_schema().decode() != schema():
            return None, f"{path.name} was built from other sources: install the package again"
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}): install the package again"
    return loaded, f"compiled for {path.name.removeprefix('native_').split('.')[0]}"


def supports(dtype: torch.dtype) -> bool:
    """Whether the library supports maps of this dtype."""
    loaded, _ = library()
    half = dtype == torch.float16
    return loaded is not None and dtype in KINDS and (not half or bool(loaded.dense_shortcuts_has_half()))


class _Call:
    """The arguments that all passes share, and the tensors behind the addresses, to keep them alive during the call."""

    def __init__(self, first: Tensor) -> None:
        n, c, h, w = first.shape
        last = not first.is_contiguous()
        self.shape, self.dtype = first.shape, accumulation_dtype(first.dtype)
        self.layout = torch.channels_last if last else torch.contiguous_format
        threads = torch.get_num_threads() if first.numel() > _SMALL else 1
        self.sizes = (threads, n, c, h * w, last)
        self.kept: list[Tensor] = []

    def map(self, x: Tensor | None) -> Map:
        if x is None:
            return Map(None, 0)
        if x.shape != self.shape:
            raise ValueError(f"maps of shapes {tuple(self.shape)} and {tuple(x.shape)} cannot be summed.")
        return Map(self.address(x.contiguous(memory_format=self.layout)), KINDS[x.dtype])

    def maps(self, maps: Sequence[Tensor]) -> Any:
        return _array(Map, len(maps))(*map(self.map, maps))

    def terms(self, maps: Sequence[Tensor], scales: Tensor | Sequence[Tensor], addends: Sequence[Tensor] = ()) -> Any:
        """Terms of addends, and of maps with coefficients, (maps, 1 or N, C) or (1 or N, C) for each."""
        if isinstance(scales, Tensor):
            address, rows = self.rows(scales)
            step = rows * self.shape[1] * self.dtype.itemsize
            found = [(address + i * step, rows) for i in range(len(scales))]
        else:
            found = [self.rows(a) for a in scales]
        terms = [Term(self.map(x), None, 1) for x in addends]
        terms += [Term(self.map(x), *each) for x, each in zip(maps, found, strict=True)]
        return _array(Term, len(terms))(*terms)

    def optional_rows(self, x: Tensor | None) -> tuple[int | None, int]:
        """`rows`, or a null pointer."""
        return (None, 1) if x is None else self.rows(x)

    def rows(self, x: Tensor) -> tuple[int, int]:
        """Address and number of rows of coefficients (1 or N, C)."""
        if x.shape[-1] != self.shape[1] or x.shape[-2] not in (1, self.shape[0]):
            raise ValueError(f"coefficients of shape {tuple(x.shape)} do not fit maps of shape {tuple(self.shape)}.")
        return self.address(x.to(self.dtype).contiguous()), x.shape[-2]

    def address(self, x: Tensor) -> int:
        """The address of a tensor, which is kept alive."""
        if not x.is_cpu:
            raise ValueError(f"a tensor on the device {x.device} was given to the kernels for the CPU.")
        self.kept.append(x)
        return x.data_ptr()

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def run(self, name: str, args: Any) -> None:
        loaded, reason = library()
        assert loaded is not None, reason
        getattr(loaded, f"{name}_{'f64' if self.dtype == torch.float64 else 'f32'}")(ctypes.byref(args))


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.moments`."""
    call = _Call(x := _dense(x))
    given = call.map(x)
    mean, var = call.new(*x.shape[:2]), call.new(*x.shape[:2])
    call.run("moments", MomentsArgs(*call.sizes, given, mean.data_ptr(), var.data_ptr()))
    return mean, var


def join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.join`; with `overwrite`, y is written over the first addend or map."""
    first = _dense((*addends, *maps)[0])
    call = _Call(first)
    terms = call.terms(maps, scales, addends)
    y = first if overwrite else torch.empty_like(first)
    mean, var = (call.new(*first.shape[:2]) if statistics else call.new(0) for _ in range(2))
    found = (mean.data_ptr(), var.data_ptr()) if statistics else (None, None)
    call.run("join", JoinArgs(*call.sizes, terms, len(terms), *call.optional_rows(bias), relu, call.map(y), *found))
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
    call = _Call(x := _dense(x))
    given, later, earlier = call.map(x), call.terms(later_grads, later_scales), call.maps(maps)
    if offset is not None and slope is not None:
        offset, slope = torch.broadcast_tensors(offset, slope)
    moved = (call.optional_rows(offset)[0], *call.optional_rows(slope))
    pulled = torch.empty_like(x)
    scales, bias = call.new(len(maps), rows, x.shape[1]), call.new(rows, x.shape[1])
    told = (given, call.map(grad), *moved, later, len(later), earlier, len(maps), rows, relu)
    call.run("pull", PullArgs(*call.sizes, *told, pulled.data_ptr(), scales.data_ptr(), bias.data_ptr()))
    return pulled, scales, bias


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """See `reference.mix`."""
    call = _Call(last := _dense(maps[-1]))
    outputs = [torch.empty_like(last) for _ in scales]
    given = (call.maps(maps), len(maps), call.maps(outputs), len(outputs))
    call.run("mix", MixArgs(*call.sizes, *given, *call.rows(scales)))
    return outputs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """See `reference.dots`."""
    call = _Call(_dense(maps[0]))
    given = (call.maps(grads), len(grads), call.maps(maps), len(maps))
    out = call.new(len(grads), len(maps), rows, maps[0].shape[1])
    call.run("dots", DotsArgs(*call.sizes, *given, rows, out.data_ptr()))
    return out
