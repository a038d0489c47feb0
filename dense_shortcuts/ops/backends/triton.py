"""The five passes in Triton, for CUDA devices, as specified in `reference`.

In every kernel but that of `dots`, a program processes one tile of pixels x channels of one image in registers, so each
map is read once and each output written once. For sums over pixels, a program writes one partial result per channel,
(image, tile, channel); these are added in a fixed order afterwards: no atomics, the same bits in every run. A kernel
takes lists of maps as a tuple of pointers, each with its own dtype, and its loops over them are unrolled.
"""
# mypy: disable-error-code="no-untyped-def,assignment"
# no-untyped-def: the arguments of kernels have no Python types. assignment: their tuples grow in unrolled loops.

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import accumulation_dtype

# Tensors of one kind (addends and maps of a sum, later gradients, maps of a dot product) in one launch. Longer lists
# need several launches, which pass a float32 sum on; CUDA's 4 KiB of kernel arguments would hold about 500 pointers.
_LIST = 64
# Outputs of one `mix` launch, and products of one `dots` launch, limited by the registers of a thread. Eight outputs
# suffice for the best tiling of a stage of 64 blocks; with sixteen, Triton 3.5 spills and compiles for half a minute.
_OUTPUTS = 8
_PRODUCTS = 64
# Programs that fill a GPU: four for each of the 132 multiprocessors of an H100; smaller problems get smaller tiles.
_PROGRAMS = 528
_WARPS = 4
_THREADS = 32 * _WARPS


@triton.jit
def _where(
    channels, pixels, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The tile of this program: image, index among the (image, tile) pairs, first pixel, first channel; and sizes.

    UNIT divides the extent that is contiguous in memory. The compiler sees that from the multiplication and uses vector
    loads, without a specialisation for each size.
    """
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
    else:
        pixels = pixels // UNIT * UNIT
    pixel_tiles = tl.cdiv(pixels, BLOCK_P)
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    if CHANNELS_LAST:  # neighbours in memory are neighbours in the grid
        channel_tile = program % channel_tiles
        part = program // channel_tiles
        image = part // pixel_tiles
        pixel_tile = part % pixel_tiles
    else:
        pixel_tile = program % pixel_tiles
        image = program // pixel_tiles // channel_tiles
        channel_tile = program // pixel_tiles % channel_tiles
        part = image * pixel_tiles + pixel_tile
    return image, part, pixel_tile * BLOCK_P, channel_tile * BLOCK_C, channels, pixels


@triton.jit
def _offsets(
    image, pixel, channel, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The offset of a tile in a map (64 bits: maps may have over 2**31 elements), and offsets within the tile."""
    p = tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    if CHANNELS_LAST:
        return (image.to(tl.int64) * pixels + pixel) * channels + channel, p * channels + c
    return (image.to(tl.int64) * channels + channel) * pixels + pixel, p + c * pixels


@triton.jit
def _per_channel(pointer, row, channel, channels, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row `row` of a (rows, C) tensor, for the channels of a tile: (1, BLOCK_C)."""
    c = channel + tl.arange(0, BLOCK_C)
    return tl.load(pointer + row * channels + c, mask=c < channels, other=0).to(ACC)[None, :]


@triton.jit
def _put_sums(pointer, tile, part, channel, channels, BLOCK_C: tl.constexpr):
    """Sum a tile over its pixels into row `part` of a (parts, C) tensor."""
    c = channel + tl.arange(0, BLOCK_C)
    tl.store(pointer + part.to(tl.int64) * channels + c, tl.sum(tile, 0), mask=c < channels)


@triton.jit(do_not_specialize=["rows", "channels", "pixels"])
def _join_kernel(
    tensors,  # addends, then maps
    scales,  # (maps, rows, C)
    bias,  # (rows, C) or None
    rows,
    out,  # or None for the moments only
    means,  # (parts, C) or None
    variances,
    channels,
    pixels,
    ADDENDS: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, part, pixel, channel, channels, pixels = _where(channels, pixels, CHANNELS_LAST, UNIT, BLOCK_P, BLOCK_C)
    start, inner = _offsets(image, pixel, channel, channels, pixels, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    inside = pixel + tl.arange(0, BLOCK_P)[:, None] < pixels
    mask = inside & (channel + tl.arange(0, BLOCK_C)[None, :] < channels)
    row = image if PER_IMAGE else 0

    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for i in tl.static_range(ADDENDS):
        total += tl.load(tensors[i] + start + inner, mask=mask, other=0).to(ACC)
    if bias is not None:
        total += _per_channel(bias, row, channel, channels, ACC, BLOCK_C)
    for i in tl.static_range(ADDENDS, len(tensors)):
        x = tl.load(tensors[i] + start + inner, mask=mask, other=0).to(ACC)
        total += x * _per_channel(scales, (i - ADDENDS) * rows + row, channel, channels, ACC, BLOCK_C)
    if RELU:
        total = tl.where(total <= 0, 0, total)  # not maximum(): NaN stays NaN, as in torch.relu

    if out is not None:
        stored = total.to(out.dtype.element_ty)
        tl.store(out + start + inner, stored, mask=mask)
        total = stored.to(ACC)
    if means is not None:
        count = tl.minimum(pixels - pixel, BLOCK_P).to(ACC)
        mean = tl.sum(tl.where(inside, total, 0), 0) / count
        deviation = tl.where(inside, total - mean[None, :], 0)  # two passes over registers avoid cancellation
        c = channel + tl.arange(0, BLOCK_C)
        at = part.to(tl.int64) * channels + c
        tl.store(means + at, mean, mask=c < channels)
        tl.store(variances + at, tl.sum(deviation * deviation, 0) / count, mask=c < channels)


@triton.jit(do_not_specialize=["channels", "pixels", "tile"])
def _merge_kernel(
    means,  # (images, tiles, C), as variances
    variances,
    mean_out,  # (images, C)
    variance_out,
    channels,
    pixels,
    tile,  # pixels of every tile but the last
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of an image from those of its tiles, by the formula of Chan, Golub and LeVeque."""
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // channel_tiles).to(tl.int64)
    c = tl.program_id(0) % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(pixels, tile)
    first = image * tiles * channels

    sums = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & (c < channels)[None, :]
        mean = tl.load(means + first + t[:, None] * channels + c[None, :], mask=mask, other=0)
        sums += mean * tl.minimum(pixels - t * tile, tile).to(ACC)[:, None]
    whole = tl.sum(sums, 0) / pixels.to(ACC)

    sums = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & (c < channels)[None, :]
        at = first + t[:, None] * channels + c[None, :]
        between = tl.load(means + at, mask=mask, other=0) - whole[None, :]
        within = tl.load(variances + at, mask=mask, other=0)
        count = tl.minimum(pixels - t * tile, tile).to(ACC)[:, None]
        sums += tl.where(mask, (within + between * between) * count, 0)
    tl.store(mean_out + image * channels + c, whole, mask=c < channels)
    tl.store(variance_out + image * channels + c, tl.sum(sums, 0) / pixels.to(ACC), mask=c < channels)


@triton.jit(do_not_specialize=["channels", "pixels", "parts"])
def _pull_kernel(
    tensors,  # x, then grad if GRADS is 1, then the later gradients, then the maps
    scales,  # one (rows, C) per later gradient, or None if there are none
    offset,  # (rows, C) or None, as slope
    slope,
    out,
    sums,  # (parts, C), or None if only out is needed
    products,  # (maps, parts, C), or None without maps
    channels,
    pixels,
    parts,
    GRADS: tl.constexpr,
    LATER: tl.constexpr,
    MOVED_PER_IMAGE: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, part, pixel, channel, channels, pixels = _where(channels, pixels, CHANNELS_LAST, UNIT, BLOCK_P, BLOCK_C)
    start, inner = _offsets(image, pixel, channel, channels, pixels, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    mask = (pixel + tl.arange(0, BLOCK_P)[:, None] < pixels) & (channel + tl.arange(0, BLOCK_C)[None, :] < channels)
    row = image if PER_IMAGE else 0

    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    if GRADS:
        total += tl.load(tensors[1] + start + inner, mask=mask, other=0).to(ACC)
    if RELU or slope is not None:
        x = tl.load(tensors[0] + start + inner, mask=mask, other=0).to(ACC)
    if slope is not None:
        moved_row = image if MOVED_PER_IMAGE else 0
        total += _per_channel(offset, moved_row, channel, channels, ACC, BLOCK_C)
        total += x * _per_channel(slope, moved_row, channel, channels, ACC, BLOCK_C)
    for i in tl.static_range(LATER):
        later = tl.load(tensors[1 + GRADS + i] + start + inner, mask=mask, other=0).to(ACC)
        total += later * _per_channel(scales[i], row, channel, channels, ACC, BLOCK_C)
    if RELU:
        total = tl.where(x <= 0, 0, total)
    total = tl.where(mask, total, 0)
    tl.store(out + start + inner, total.to(out.dtype.element_ty), mask=mask)

    FIRST: tl.constexpr = 1 + GRADS + LATER
    if products is None:
        if sums is not None:
            _put_sums(sums, total, part, channel, channels, BLOCK_C)
    else:
        # A sum over pixels synchronises the threads of a program; the next map is loaded meanwhile.
        following = tl.load(tensors[FIRST] + start + inner, mask=mask, other=0)
        _put_sums(sums, total, part, channel, channels, BLOCK_C)
        for i in tl.static_range(FIRST, len(tensors)):
            product = total * following.to(ACC)
            if i + 1 < len(tensors):
                following = tl.load(tensors[i + 1] + start + inner, mask=mask, other=0)
            _put_sums(products, product, (i - FIRST) * parts + part, channel, channels, BLOCK_C)


@triton.jit(do_not_specialize=["rows", "channels", "pixels"])
def _mix_kernel(
    maps,
    scales,  # (outputs, maps, rows, C)
    outs,
    rows,
    channels,
    pixels,
    PER_IMAGE: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, _part, pixel, channel, channels, pixels = _where(channels, pixels, CHANNELS_LAST, UNIT, BLOCK_P, BLOCK_C)
    start, inner = _offsets(image, pixel, channel, channels, pixels, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    mask = (pixel + tl.arange(0, BLOCK_P)[:, None] < pixels) & (channel + tl.arange(0, BLOCK_C)[None, :] < channels)
    row = image if PER_IMAGE else 0

    totals = ()
    for _ in tl.static_range(len(outs)):
        totals = totals + (tl.zeros((BLOCK_P, BLOCK_C), ACC),)  # noqa: RUF005 (Triton does not unpack here)
    for i in tl.static_range(len(maps)):
        x = tl.load(maps[i] + start + inner, mask=mask, other=0).to(ACC)
        grown = ()
        for j in tl.static_range(len(outs)):
            scale = _per_channel(scales, (j * len(maps) + i) * rows + row, channel, channels, ACC, BLOCK_C)
            grown = grown + (totals[j] + x * scale,)  # noqa: RUF005
        totals = grown
    for j in tl.static_range(len(outs)):
        tl.store(outs[j] + start + inner, totals[j].to(outs[j].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["channels", "pixels", "tiles", "parts", "first", "columns"])
def _dots_kernel(
    tensors,  # grads, then maps
    products,  # (all grads, all maps, parts, C)
    channels,
    pixels,
    tiles,  # tiles of pixels per program
    parts,
    first,  # index of the first product of this launch among all of them
    columns,  # number of all maps
    GRADS: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program loops over the pixels of its chunk and sums over threads only once, after the loop.

    A tile has G x M products: a sum over threads for each of them would cost more than reading the G + M tensors.
    """
    if CHANNELS_LAST:
        channels = channels // UNIT * UNIT
    else:
        pixels = pixels // UNIT * UNIT
    chunk = tiles * BLOCK_P
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % channel_tiles * BLOCK_C
    part = tl.program_id(0) // channel_tiles
    chunks = tl.cdiv(pixels, chunk)
    image = part // chunks
    begin = part % chunks * chunk
    MAPS: tl.constexpr = len(tensors) - GRADS

    sums = ()
    for _ in tl.static_range(GRADS * MAPS):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), ACC),)  # noqa: RUF005
    for pixel in range(begin, tl.minimum(begin + chunk, pixels), BLOCK_P):
        start, inner = _offsets(image, pixel, channel, channels, pixels, CHANNELS_LAST, BLOCK_P, BLOCK_C)
        mask = (pixel + tl.arange(0, BLOCK_P)[:, None] < pixels) & (channel + tl.arange(0, BLOCK_C)[None, :] < channels)
        loaded = ()
        for i in tl.static_range(len(tensors)):
            loaded = loaded + (tl.load(tensors[i] + start + inner, mask=mask, other=0).to(ACC),)  # noqa: RUF005
        grown = ()
        for k in tl.static_range(GRADS * MAPS):
            grown = grown + (sums[k] + loaded[k // MAPS] * loaded[GRADS + k % MAPS],)  # noqa: RUF005
        sums = grown
    for k in tl.static_range(GRADS * MAPS):
        product = first + k // MAPS * columns + k % MAPS
        _put_sums(products, sums[k], product * parts + part, channel, channels, BLOCK_C)


class _Tiling(NamedTuple):
    """How a launch splits (images, channels, pixels) into tiles."""

    images: int
    channels: int
    pixels: int
    channels_last: bool
    block_p: int
    block_c: int

    @property
    def tiles(self) -> int:
        """Tiles of pixels in an image."""
        return triton.cdiv(self.pixels, self.block_p)

    @property
    def parts(self) -> int:
        return self.images * self.tiles

    @property
    def programs(self) -> int:
        return self.parts * triton.cdiv(self.channels, self.block_c)

    def constants(self, dtype: torch.dtype, vector: int = 16) -> dict[str, Any]:
        """The compile-time arguments that all kernels share; a thread loads at most `vector` elements at once."""
        return {
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "CHANNELS_LAST": self.channels_last,
            "UNIT": math.gcd(self.channels if self.channels_last else self.pixels, vector),
            "BLOCK_P": self.block_p,
            "BLOCK_C": self.block_c,
        }


def _tiling(x: Tensor, elements: int, together: bool) -> _Tiling:
    """Tiles of at most `elements` pixels x channels of the map x.

    Args:
        x: a map that is contiguous in its layout, (N, C, H, W).
        elements: elements of a tile, a power of two.
        together: whether images may be merged. The pixels of a channels_last batch then count as one large image,
            so maps of 7 x 7 leave no tile half empty.
    """
    images, channels, height, width = x.shape
    pixels, channels_last = height * width, _is_channels_last(x)
    if together and channels_last:
        images, pixels = 1, images * pixels
    while True:
        if channels_last:
            block_c = min(128 // x.element_size(), elements, triton.next_power_of_2(channels))
            block_p = min(elements // block_c, triton.next_power_of_2(pixels))
        else:
            block_p = min(256, elements, triton.next_power_of_2(pixels))
            block_c = min(elements // block_p, triton.next_power_of_2(channels))
        tiling = _Tiling(images, channels, pixels, channels_last, block_p, block_c)
        if tiling.programs >= _PROGRAMS or elements <= 2 * _THREADS:
            return tiling
        elements //= 2


def _is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost; a map that is in both layouts (one channel or one pixel) counts as NCHW."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    return x.stride(1) < x.stride(3 if x.shape[3] > 1 else 2)


def _vector(x: Tensor) -> int:
    """Elements of a map that a thread can load at once: 16 bytes, or less if rows in memory are not aligned."""
    _, channels, height, width = x.shape
    return math.gcd(channels if _is_channels_last(x) else height * width, 16 // x.element_size())


def _laid_out(tensors: Sequence[Tensor], first: Tensor) -> list[Tensor]:
    """The maps in the layout of `first`; maps that already have it are not copied."""
    layout = torch.channels_last if _is_channels_last(first) else torch.contiguous_format
    return [x.contiguous(memory_format=layout) for x in tensors]


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    """The accumulation dtype of a kernel: float64 if any tensor is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _warps(tensors: int) -> int:
    """Warps of a program that adds up `tensors` maps: ptxas may load all at once, 200 registers with four warps."""
    return _WARPS if tensors <= 16 else 2 * _WARPS


def _power(number: int) -> int:
    return triton.next_power_of_2(max(number, 1))


def _same_rows(tensors: Sequence[Tensor], images: int) -> tuple[list[Tensor], bool]:
    """Per-channel tensors (1 or N, C), contiguous and expanded to the same number of rows, and whether that is N."""
    per_image = any(t.shape[0] != 1 for t in tensors)
    rows = images if per_image else 1
    return [t.expand(rows, t.shape[1]).contiguous() for t in tensors], per_image


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.moments`."""
    _, mean, variance = _launch_join([x], [], None, None, False, True, None)
    return mean, variance


def join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.join`."""
    first = (*addends, *maps)[0]
    addends, maps = _laid_out(addends, first), _laid_out(maps, first)
    wide = _dtype_of([*addends, *maps])
    while len(addends) + len(maps) > _LIST:
        terms = max(_LIST - len(addends), 0)
        some = _launch_join(addends[:_LIST], maps[:terms], scales[:terms], None, False, False, wide)[0]
        addends, maps, scales = [some, *addends[_LIST:]], maps[terms:], scales[terms:]
    return _launch_join(addends, maps, scales, bias, relu, statistics, first.dtype)


def _launch_join(
    addends: Sequence[Tensor],
    maps: Sequence[Tensor],
    scales: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    statistics: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`join` in one launch, into out_dtype; with None, no map is written and the first tensor is returned."""
    tensors = _laid_out([*addends, *maps], (*addends, *maps)[0])
    x = tensors[0]
    wide = _dtype_of(tensors)
    scales = scales if maps else None
    rows = max(1 if t is None else t.shape[-2] for t in (scales, bias))
    if scales is not None:
        scales = scales.expand(-1, rows, -1).contiguous()
    if bias is not None:
        bias = bias.expand(rows, -1).contiguous()
    tiling = _tiling(x, _THREADS * min(32, max(8, 4 * _vector(x))), together=rows == 1 and not statistics)
    out = None if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    mean = variance = None
    if statistics:
        mean, variance = (x.new_empty((tiling.parts, tiling.channels), dtype=wide) for _ in range(2))

    with torch.cuda.device_of(x):
        _join_kernel[(tiling.programs,)](
            tuple(tensors),
            scales,
            bias,
            rows,
            out,
            mean,
            variance,
            tiling.channels,
            tiling.pixels,
            ADDENDS=len(addends),
            PER_IMAGE=rows > 1,
            RELU=relu,
            **tiling.constants(wide),
            num_warps=_warps(len(tensors)),
        )
        if mean is not None and variance is not None and tiling.tiles > 1:
            mean, variance = _merge(mean, variance, tiling, wide)
    dtype = accumulation_dtype(x.dtype if out is None else out.dtype)
    y = x if out is None else out
    if mean is None or variance is None:
        return y, x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    return y, mean.to(dtype), variance.to(dtype)


def _merge(mean: Tensor, variance: Tensor, tiling: _Tiling, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Moments of each image, (N, C), from those of its tiles, (N * tiles, C)."""
    block_t = min(32, _power(tiling.tiles))
    block_c = min(32, _power(tiling.channels))
    merged = [mean.new_empty((tiling.images, tiling.channels)) for _ in range(2)]
    _merge_kernel[(tiling.images * triton.cdiv(tiling.channels, block_c),)](
        mean,
        variance,
        *merged,
        tiling.channels,
        tiling.pixels,
        tiling.block_p,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=_WARPS,
    )
    return merged[0], merged[1]


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
    """`reference.pull`."""
    x, *later_grads = _laid_out([x, *later_grads], x)
    grads = [] if grad is None else _laid_out([grad], x)
    maps = _laid_out(maps, x)
    wide = _dtype_of([x, *grads, *later_grads, *maps])
    while len(later_grads) > _LIST:
        some, _ = _same_rows(later_scales[: _LIST - 1], x.shape[0])
        grads = [_launch_join(grads, later_grads[: _LIST - 1], torch.stack(some), None, False, False, wide)[0]]
        later_grads, later_scales = later_grads[_LIST - 1 :], later_scales[_LIST - 1 :]

    moved, moved_per_image = _same_rows([] if offset is None or slope is None else [offset, slope], x.shape[0])
    later_scales, per_image = _same_rows(later_scales, x.shape[0])
    some_maps, other_maps = maps[:_LIST], maps[_LIST:]
    together = rows <= 1 and not per_image and not moved_per_image
    tiling = _tiling(x, _THREADS * min(32, max(8, 4 * _vector(x))), together)
    out = torch.empty_like(x, dtype=wide if other_maps else x.dtype)
    partial = x.new_empty((1 + len(some_maps), tiling.parts, tiling.channels), dtype=wide)  # added up in one call
    with torch.cuda.device_of(x):
        _pull_kernel[(tiling.programs,)](
            (x, *grads, *later_grads, *some_maps),
            tuple(later_scales) or None,
            moved[0] if moved else None,
            moved[1] if moved else None,
            out,
            partial[0] if rows else None,
            partial[1:] if some_maps else None,
            tiling.channels,
            tiling.pixels,
            tiling.parts,
            GRADS=len(grads),
            LATER=len(later_grads),
            MOVED_PER_IMAGE=moved_per_image,
            PER_IMAGE=per_image,
            RELU=relu,
            **tiling.constants(wide),
            num_warps=_warps(len(later_grads) + len(some_maps)),
        )
    dtype = accumulation_dtype(x.dtype)
    if not rows:
        return out.to(x.dtype), x.new_empty((0, 0, x.shape[1]), dtype=dtype), x.new_empty((0, x.shape[1]), dtype=dtype)
    sums = _over_parts(partial, rows, dtype)
    bias_grad, scale_grads = sums[0].clone(), sums[1:]  # outputs of an operator must not share memory
    if other_maps:
        scale_grads = torch.cat([scale_grads, dots([out], other_maps, rows)[0].to(dtype)])
    return out.to(x.dtype), scale_grads, bias_grad


def _over_parts(partial: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(K, rows, C) from the partial sums (K, parts, C)."""
    count, parts, channels = partial.shape
    if parts != rows:
        partial = partial.view(count, rows, parts // rows, channels).sum(2)
    return partial.to(dtype)


def mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """`reference.mix`, reading the maps once for every 8 outputs."""
    last = maps[-1]
    maps = _laid_out(maps, last)
    if len(maps) > _LIST:
        return [join([], maps, row, None, False, False)[0].to(last.dtype) for row in scales]
    outs: list[Tensor] = []
    for some in scales.split(_OUTPUTS):
        outs += _launch_mix(maps, some.contiguous())
    return outs


def _launch_mix(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """`mix` in one launch."""
    last, outputs, rows = maps[-1], len(scales), scales.shape[2]
    wide = _dtype_of(maps)
    outs = [torch.empty_like(last) for _ in range(outputs)]
    # A thread holds its elements of every output, in 64 registers, and the coefficients of its channels.
    held = min(32, 8 * _OUTPUTS // _power(outputs)) // (1 if wide == torch.float32 else 2)
    if not _is_channels_last(last):
        held = min(held, 2 * _vector(last))
    tiling = _tiling(last, _THREADS * held, together=rows == 1)
    with torch.cuda.device_of(last):
        _mix_kernel[(tiling.programs,)](
            tuple(maps),
            scales,
            tuple(outs),
            rows,
            tiling.channels,
            tiling.pixels,
            PER_IMAGE=rows > 1,
            # With few channels and many pixels, a thread uses each of the outputs x maps coefficients more often.
            **tiling.constants(wide, vector=2 if tiling.channels_last else 16),
            num_warps=_WARPS,
        )
    return outs


def dots(grads: Sequence[Tensor], maps: Sequence[Tensor], rows: int) -> Tensor:
    """`reference.dots`. Up to 64 products read every tensor once; more are split into launches of up to 8 gradients."""
    grads, maps = _laid_out(grads, maps[0]), _laid_out(maps, maps[0])
    wide = _dtype_of([*grads, *maps])
    block_g = min(len(grads), 8)
    block_m = min(len(maps), _PRODUCTS // block_g)
    # A thread holds its elements of every product, in at most 128 registers.
    held = min(8, 2 * _PRODUCTS // _power(block_g * block_m)) // (1 if wide == torch.float32 else 2)
    tiling = _tiling(maps[0], _THREADS * held, together=rows == 1)
    programs = tiling.images * triton.cdiv(tiling.channels, tiling.block_c)
    chunks = min(triton.cdiv(2 * _PROGRAMS, programs), tiling.tiles)
    tiles = triton.cdiv(tiling.tiles, chunks)
    chunks = triton.cdiv(tiling.tiles, tiles)
    parts = tiling.images * chunks
    products = maps[0].new_empty((len(grads), len(maps), parts, tiling.channels), dtype=wide)
    with torch.cuda.device_of(products):
        for g in range(0, len(grads), block_g):
            for m in range(0, len(maps), block_m):
                some_grads = grads[g : g + block_g]
                _dots_kernel[(programs * chunks,)](
                    (*some_grads, *maps[m : m + block_m]),
                    products,
                    tiling.channels,
                    tiling.pixels,
                    tiles,
                    parts,
                    g * len(maps) + m,
                    len(maps),
                    GRADS=len(some_grads),
                    **tiling.constants(wide),
                    num_warps=_WARPS,
                )
    dtype = accumulation_dtype(maps[0].dtype)
    return _over_parts(products.flatten(0, 1), rows, dtype).unflatten(0, products.shape[:2])
