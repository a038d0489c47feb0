"""The Triton passes against the reference: on a GPU, or without one in Triton's interpreter (see conftest.py).

What the interpreter cannot show, that they compile for a GPU, is seen by compiling them for one that is not there.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_shortcuts.ops.backends import reference

kernels = pytest.importorskip("dense_shortcuts.ops.backends.triton", reason="triton is not installed")
GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="there is no CUDA device")

KERNELS = ("moments", "join", "pull", "mix", "dots")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# float32 sums of a few hundred terms; then one unit in the last place of a stored value (the interpreter rounds
# bfloat16 towards zero, GPUs to the nearest).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module", params=["cuda" if GPU else "cpu"], ids=["cuda" if GPU else "interpreter"])
def device(request):
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was launched."""
    count: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: tuple[int]) -> Callable[..., object]:
            count[self.name] += 1
            return self.kernel[grid]

    for name in ("_join_kernel", "_merge_kernel", "_pull_kernel", "_mix_kernel", "_dots_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name))
    return count


def tensors(count: int, shape: Sequence[int], dtype: torch.dtype, device: str, layout: str = "nchw") -> list[Tensor]:
    xs = torch.randn(count, *shape, dtype=torch.float64).to(device, dtype)
    return [x.contiguous(memory_format=LAYOUTS[layout]) for x in xs]


def call(kernel: str, backend: ModuleType, maps: list[Tensor], rows: int, others: int = 2) -> list[Tensor]:
    """One kernel on all of `maps`, with constants that depend on nothing but their number and shape."""
    shape, wide = maps[0].shape, reference.accumulation_dtype(maps[0].dtype)
    constants = torch.linspace(-1, 1, (len(maps) + 2) * rows * shape[1], dtype=wide, device=maps[0].device).sin_()
    stack = constants.view(-1, rows, shape[1])
    first, second, *scales = stack
    match kernel:
        case "moments":
            return [*backend.moments(maps[0])]
        case "join":
            y, mean, var = backend.join(maps[:1], maps[1:], stack[2 : 1 + len(maps)], first, True, True)
            # Moments are those of y as it is stored, so they are compared on their own.
            return [y, *(mine - of_y for mine, of_y in zip((mean, var), reference.moments(y), strict=True))]
        case "pull":
            later = len(maps) // 2
            arguments = (maps[0], maps[-1], first, second, maps[:later], scales[:later], maps[later:], rows, True)
            return [*backend.pull(*arguments)]
        case "mix":
            return backend.mix(maps, torch.stack([stack[2:] * (j + 1) for j in range(others)]))
        case "dots":
            return [backend.dots(maps[:others], maps, rows)]
    raise AssertionError(kernel)


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float | None = None) -> None:
    """Equal in shape, dtype and, up to a tolerance relative to the largest value, in numbers."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if tolerance is None:
            assert torch.equal(a, b)
        elif a.numel():
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def assert_laid_out(kernel: str, outs: Sequence[Tensor], maps: Sequence[Tensor]) -> None:
    """Whatever is a map has the strides of the map that the kernel names for it."""
    named = maps[-1] if kernel == "mix" else maps[0]
    assert {y.stride() for y in outs if y.shape == named.shape} <= {named.stride()}


SHAPES = [(2, 5, 3, 7), (1, 1, 1, 1), (3, 70, 5, 5), (2, 3, 40, 17), (2, 33, 1, 1), (3, 1, 4, 5), (2, 16, 1, 9)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches_reference_in_float64(kernel, shape, layout, device):
    maps = tensors(3, shape, torch.float64, device, layout)
    for rows in {1, shape[0]}:
        ours = call(kernel, kernels, maps, rows)
        assert_same(ours, call(kernel, reference, maps, rows), 1e-12)
        assert_laid_out(kernel, ours, maps)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_matches_reference_in_each_dtype(kernel, dtype, layout, device):
    """Sums come from float32 before anything is rounded: their tolerance is that of float32 whatever the maps are."""
    maps = tensors(4, (2, 24, 6, 6), dtype, device, layout)
    for rows in (1, 2):
        ours, theirs = call(kernel, kernels, maps, rows), call(kernel, reference, maps, rows)
        for a, b in zip(ours, theirs, strict=True):
            assert_same([a], [b], TOLERANCE[a.dtype])


@pytest.mark.parametrize("kernel", KERNELS)
def test_maps_of_one_list_may_differ_in_dtype(kernel, device):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for turn in range(3):
        first, *rest = (dtypes[(i + turn) % 3] for i in range(3))
        maps = [tensors(1, (2, 5, 3, 4), dtype, device)[0] for dtype in (first, *rest)]
        for a, b in zip(call(kernel, kernels, maps, 2), call(kernel, reference, maps, 2), strict=True):
            # The reference for `mix` rounds to the first map's dtype on its way to the last one's.
            assert_same([a], [b], max(TOLERANCE[a.dtype], TOLERANCE[first] if kernel == "mix" else 0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_maps_of_one_list_may_differ_in_layout(kernel, first, device):
    """One map names the layout of the outputs; the others may be strided or expanded views."""
    shape = (2, 6, 5, 4)
    a, b = (tensors(1, shape, torch.float64, device, layout)[0] for layout in LAYOUTS)
    first, other = (a, b) if first == "nchw" else (b, a)
    strided = tensors(1, (2, 12, 10, 4), torch.float64, device)[0][:, ::2, 1::2]
    expanded = tensors(1, (2, 6, 1, 1), torch.float64, device)[0].expand(shape)
    for maps in ([first, other, strided, expanded, first], [first, expanded, other, first]):
        ours = call(kernel, kernels, maps, 2)
        assert_same(ours, call(kernel, reference, maps, 2), 1e-12)
        assert_laid_out(kernel, ours, maps)


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 31, 32, 33, 37, 64, 65, 130])
def test_lists_of_any_length(depth, device, launches):
    n = 2 if depth <= 64 else 1
    maps = tensors(depth, (n, 3, 2, 2), torch.float64, device)
    scales = torch.randn(depth, n, 3, dtype=torch.float64, device=device)
    for backend_call in (
        lambda b: b.join([], maps, scales, None, False, False)[:1],
        lambda b: b.join(maps, maps[:1], scales[:1], None, False, False)[:1],
        lambda b: b.pull(maps[0], None, None, None, maps, [*scales], maps, n, False),
        lambda b: b.pull(maps[0], maps[0], None, None, maps, [*scales], [], n, True),
        lambda b: b.mix(maps, scales[None]),
        lambda b: [b.dots(maps, maps[:3], 1)],
        lambda b: [b.dots(maps[:1], maps, n)],
    ):
        assert_same(backend_call(kernels), backend_call(reference), 1e-12)
    if depth <= 37:
        assert launches == {
            "_join_kernel": 2,
            "_pull_kernel": 2,
            "_mix_kernel": 1,
            "_dots_kernel": -(-depth // 8) + 1,
        }


@pytest.mark.parametrize(("grads", "maps"), [(8, 8), (9, 17), (2, 33), (17, 2)])
def test_products_of_two_lists_are_cut_into_blocks(grads, maps, device, launches):
    shape = (2, 3, 2, 2)
    gs, xs = tensors(grads, shape, torch.float64, device), tensors(maps, shape, torch.float64, device)
    assert_same([kernels.dots(gs, xs, 2)], [reference.dots(gs, xs, 2)], 1e-12)
    assert launches == {"_dots_kernel": {(8, 8): 1, (9, 17): 6, (2, 33): 2, (17, 2): 3}[grads, maps]}


@pytest.mark.parametrize("outputs", [1, 3, 8, 9, 17])
def test_mix_has_any_number_of_outputs(outputs, device, launches):
    maps = tensors(3, (2, 5, 3, 3), torch.float64, device, "channels_last")
    for rows in (1, 2):
        scales = torch.randn(outputs, 3, rows, 5, dtype=torch.float64, device=device)
        assert_same(kernels.mix(maps, scales), reference.mix(maps, scales), 1e-12)
    assert launches == {"_mix_kernel": 2 * -(-outputs // 8)}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("later", [0, 2])
@pytest.mark.parametrize("earlier", [0, 2])
def test_every_part_of_pull_may_be_absent(relu, grad, moved, later, earlier, device):
    x, g, *maps = tensors(4, (2, 3, 3, 2), torch.float64, device)
    offset, slope, *scales = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    shift = (offset, slope) if moved else (None, None)
    arguments = (x, g if grad else None, *shift, maps[:later], scales[:later], maps[:earlier], 2, relu)
    assert_same(kernels.pull(*arguments), reference.pull(*arguments), 1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_constants_of_one_row_and_of_many_may_meet(rows, device):
    """Batch statistics in one block and group statistics in the next: (1, C) and (N, C) in one call."""
    x, *maps = tensors(3, (3, 4, 3, 2), torch.float64, device, "channels_last")
    one, many = (torch.randn(n, 4, dtype=torch.float64, device=device) for n in (1, 3))
    for offset, slope, scales in ((one, one, [one, many]), (many, many, [one, one]), (one, many, [one, one])):
        arguments = (x, None, offset, slope, maps, scales, maps, rows, True)
        assert_same(kernels.pull(*arguments), reference.pull(*arguments), 1e-12)
    for scale, bias in ((one, many), (many, one)):
        arguments = ([x], maps, torch.stack([scale, scale]), bias, True, True)
        assert_same(kernels.join(*arguments), reference.join(*arguments), 1e-12)


def test_views_of_constants_are_read_in_their_own_strides(device):
    x, *maps = tensors(3, (2, 4, 3, 2), torch.float64, device)
    wide = torch.randn(4, 2, 4, 2, dtype=torch.float64, device=device)
    scales, bias = wide[::2, :, :, 0], wide[1, :, :, 1]
    assert_same(
        kernels.join([x], maps, scales, bias, False, True), reference.join([x], maps, scales, bias, False, True), 1e-12
    )
    assert_same(
        kernels.mix(maps, wide.transpose(2, 3).unflatten(0, (2, 2))[:, :, :, 0]),
        reference.mix(maps, wide.transpose(2, 3).unflatten(0, (2, 2))[:, :, :, 0]),
        1e-12,
    )
    arguments = (x, None, bias, bias, maps, [*scales], maps, 2, True)
    assert_same(kernels.pull(*arguments), reference.pull(*arguments), 1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_dtype_and_strides(device, data):
    n, c, h, w = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 20), (1, 7), (1, 7)))
    kernel = data.draw(st.sampled_from(KERNELS))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    maps = []
    for _ in range(data.draw(st.integers(1, 4))):
        (x,) = tensors(1, (n, 2 * c, h + 1, w + 2), dtype, device, data.draw(st.sampled_from([*LAYOUTS])))
        x = x[:, ::2] if data.draw(st.booleans()) else x[:, :c]
        x = x[:, :, 1:, 2:]
        if data.draw(st.booleans()):
            x = x.contiguous(memory_format=LAYOUTS[data.draw(st.sampled_from([*LAYOUTS]))])
        maps.append(x)
    rows = data.draw(st.sampled_from([1, n]))
    ours, theirs = (call(kernel, backend, maps, rows, others=1) for backend in (kernels, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel():
            tolerance = TOLERANCE[a.dtype]
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_pass_as_in_torch(dtype, device):
    x, f = (torch.ones(2, 3, 2, 2, dtype=dtype, device=device) for _ in range(2))
    x[0, 0, 0, 0], x[0, 1, 0, 1], x[1, 2, 1, 1] = float("nan"), float("inf"), float("-inf")
    one = torch.ones(1, 1, 3, device=device)
    for relu in (False, True):
        y, mean, var = kernels.join([f], [x], one, None, relu, True)
        torch.testing.assert_close(y, reference.join([f], [x], one, None, relu, True)[0], equal_nan=True)
        assert y.isnan().sum() == 1
        finite = y.isfinite().all((2, 3))  # NaN or infinity for the rest: PyTorch's devices do not agree on which
        assert torch.equal(mean.isfinite(), finite) and torch.equal(var.isfinite(), finite)
    # A NaN in x is not <= 0, so its gradient passes; a NaN in one map stays in that map's sums.
    ours, theirs = (b.pull(x, f, None, None, [x], [one[0]], [f, x], 2, True) for b in (kernels, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for a, b in zip(
        kernels.mix([x, f], one.expand(2, 2, 1, 3)), reference.mix([x, f], one.expand(2, 2, 1, 3)), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)
    torch.testing.assert_close(kernels.dots([f], [x, f], 2), reference.dots([f], [x, f], 2), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 3), (37, 30)], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("ratio", [100, 3000])
def test_variance_is_right_where_the_mean_is_far_larger_than_the_deviation(ratio, size, layout, device):
    """E[x^2] - E[x]^2 would be wrong by 2^-24 * ratio^2, half of the variance at 3000."""
    (x,) = tensors(1, (2, 5, *size), torch.float32, device, layout)
    x += ratio
    mean, var = kernels.moments(x)
    joined = kernels.join([x], [], x.new_empty(0, 1, 5), None, True, True)
    expected_mean, expected_var = reference.moments(x.double())
    for ours in (mean, joined[1]):
        torch.testing.assert_close(ours.double(), expected_mean, rtol=1e-6, atol=0)
    for ours in (var, joined[2]):
        torch.testing.assert_close(ours.double(), expected_var, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_runs_are_bit_equal(kernel, device):
    maps = tensors(3, (2, 6, 12, 13), torch.float32, device, "channels_last")
    for rows in (1, 2):
        assert_same(call(kernel, kernels, maps, rows), call(kernel, kernels, maps, rows))


def test_every_function_launches_its_kernel_once(device, launches):
    """And the moments one more, which puts tiles together, where an image has several."""
    for size, merges in (((3, 3), 0), ((40, 41), 1)):
        maps = tensors(3, (1, 4, *size), torch.float32, device)
        for kernel in KERNELS:
            launches.clear()
            call(kernel, kernels, maps, 1)
            expected = {"_join_kernel" if kernel in ("moments", "join") else f"_{kernel}_kernel": 1}
            if merges and kernel in ("moments", "join"):
                expected["_merge_kernel"] = 1
            assert launches == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_share_no_memory(kernel, device):
    """What a registered operator has to promise: neither with one another nor with an input."""
    for rows, size in ((1, 3), (2, 3), (2, 40)):
        maps = tensors(3, (2, 4, size, 3), torch.float32, device)
        outs = call(kernel, kernels, maps, rows)
        places = [t.untyped_storage().data_ptr() for t in (*maps, *outs)]
        assert len(set(places)) == len(places) - 2  # the three maps are views of one tensor


COMPILE = """
import json, pathlib, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Absent:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Absent())
compiled, run = [], jit.JITFunction.run

def only_compile(self, *args, grid, warmup, **options):
    compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

jit.JITFunction.run = only_compile
from dense_shortcuts.ops.backends import triton as kernels

bf16, cuobjdump = torch.bfloat16, pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
empty = lambda *shape, **k: torch.empty(shape, **k)

def everything(batch, count, layout, dtype=bf16):
    x, grad, *maps = (empty(batch, 1024, 14, 14, dtype=dtype).to(memory_format=layout) for _ in range(count + 2))
    scales, bias = empty(count, 1, 1024), empty(1, 1024)
    kernels.moments(x)
    kernels.join([grad], maps, scales, bias, True, True)
    kernels.pull(x, grad, bias, bias, maps, [*scales], maps, 1, True)
    if count <= 8:
        kernels.mix(maps, scales.expand(count, -1, -1, -1))
        kernels.dots(maps, maps, 1)

def usage(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(kernel.asm["cubin"])
        said = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search("REG:([0-9]+) STACK:([0-9]+)", said)
    return [int(n) for n in found.groups()] if found else None

everything(64, 6, torch.channels_last)
everything(64, 37, torch.channels_last)
everything(64, 6, torch.contiguous_format)
everything(64, 3, torch.channels_last, torch.float32)
wide = [(name, "v4" in k.asm["ptx"]) for name, k in compiled]
atomics = [name for name, k in compiled if re.search("^[^/]*[ \\t](atom|red)[.]global", k.asm["ptx"], re.M)]
usages = [(name, usage(k)) for name, k in compiled]
before = len({id(k) for _, k in compiled})
for batch in (63, 62, 61, 37):
    everything(batch, 6, torch.channels_last)
after = len({id(k) for _, k in compiled})
print(json.dumps(dict(names=sorted({n for n, _ in compiled}), wide=wide, atomics=atomics, usages=usages, before=before,
                      after=after)))
"""


@pytest.mark.long
@pytest.mark.skipif(GPU, reason="the other tests of this file compile the kernels for the GPU that is here")
def test_kernels_compile_for_an_h100(tmp_path, monkeypatch):
    """Lists of 3, 6 and 37 maps: vector loads, no atomics, no spilled registers, no recompilation by batch size."""
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA devices")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["names"] == [f"_{name}_kernel" for name in ("dots", "join", "merge", "mix", "pull")]
    assert all(wide for name, wide in seen["wide"] if name in ("_join_kernel", "_pull_kernel"))
    assert not seen["atomics"]
    assert [(name, usage) for name, usage in seen["usages"] if usage is None or usage[1] > 0] == []
    assert seen["after"] == seen["before"]


@needs_gpu
def test_join_and_pull_are_captured_in_a_graph():
    x, f, g = tensors(3, (2, 24, 9, 9), torch.float32, "cuda", "channels_last")
    scales, bias = torch.randn(1, 2, 24, device="cuda"), torch.randn(2, 24, device="cuda")

    def step() -> list[Tensor]:
        y, *moments = kernels.join([f], [x], scales, bias, True, True)
        return [y, *moments, *kernels.pull(y, g, bias, bias, [f], [bias], [x], 2, True)]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_same(outs, step())


@needs_gpu
def test_maps_of_more_than_two_thousand_million_elements():
    x = torch.zeros(3, 16, 6912, 6912, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[2, 15] = 2
    mean, var = kernels.moments(x)
    assert mean[2, 15] == 2 and mean.sum() == 2 and var.sum() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    maps = tensors(3, (2, 5, 3, 3), torch.float64, "cuda:1")
    for kernel in KERNELS:
        assert_same(call(kernel, kernels, maps, 2), call(kernel, reference, maps, 2), 1e-12)
