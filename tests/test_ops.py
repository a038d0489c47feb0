"""The fused operator against the plain one: forward and every gradient, all back ends, odd shapes and dtypes."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import dense_shortcuts as ds
from dense_shortcuts import ops
from dense_shortcuts.nn.tiling import Tiling
from dense_shortcuts.ops import compiled, cpu, forms, fused, native, reference, tiles
from dense_shortcuts.ops.sums import Sum


def maps(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("kernels", ["cpu", "cpu in pieces", "native"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 2), (1, 1, 1, 1), (4, 6, 3, 3), (0, 3, 2, 2), (2, 70, 9, 1), (2, 3, 29, 37), (2, 515, 2, 2)]
)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_kernels_match_the_plain_form(shape, rows, dtype, tolerance, channels_last, kernels, monkeypatch):
    if kernels == "native" and not compiled.supports(dtype):
        pytest.skip(f"no compiled kernels for {dtype}: {compiled.library()[1]}")
    monkeypatch.setattr(cpu, "PIECE_BYTES", 1 if kernels == "cpu in pieces" else 2**21)
    k = native if kernels == "native" else cpu
    layout = torch.channels_last if channels_last else torch.contiguous_format
    branch, extra, *earlier = (x.contiguous(memory_format=layout) for x in maps(5, shape, dtype))
    n = 1 if rows == "one" else shape[0]
    wide, pixels = ops.accumulation_dtype(dtype), max(1, shape[2] * shape[3])
    scales, bias = torch.randn(3, n, shape[1], dtype=wide), torch.randn(n, shape[1], dtype=wide)

    def close(ours: Tensor, theirs: Tensor, size: float = 1.0) -> None:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size)

    for addends, relu, b in (([branch], True, bias), ([branch, extra], False, None), ([], True, bias)):
        y, mean, var = k.join(addends, earlier, scales, b, relu, True)
        close(y, reference.join(addends, earlier, scales, b, relu, False)[0], 4)
        for ours, theirs in zip((mean, var), reference.moments(y), strict=True):
            close(ours, theirs, 4)
        if shape[0] and shape[1] > 1:
            assert y.is_contiguous(memory_format=layout)
    for ours, theirs in zip(k.moments(branch), reference.moments(branch), strict=True):
        close(ours, theirs)

    grad, *later = (x.contiguous(memory_format=layout) for x in maps(3, shape, dtype, seed=1))
    for moment_rows in {1, shape[0]}:
        offset, slope = torch.randn(2, moment_rows, shape[1], dtype=wide)
        arguments = (y, grad, offset, slope, later, list(torch.randn(2, n, shape[1], dtype=wide)), earlier, n, True)
        for ours, theirs in zip(k.pull(*arguments), reference.pull(*arguments), strict=True):
            close(ours, theirs, 4 * pixels)
    arguments = (y, None, None, None, later, list(torch.randn(2, n, shape[1], dtype=wide)), [], 0, False)
    close(k.pull(*arguments)[0], reference.pull(*arguments)[0], 4)

    tile = torch.randn(4, 3, n, shape[1], dtype=wide)
    for ours, theirs in zip(k.mix(earlier, tile), reference.mix(earlier, tile), strict=True):
        close(ours, theirs, 4)
    close(k.dots(later, earlier, n), reference.dots(later, earlier, n), 4 * pixels)


@pytest.mark.parametrize("kernels", [cpu, native])
def test_variance_of_a_map_far_from_zero_does_not_cancel(kernels):
    x = 100 + torch.randn(2, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        _, var = kernels.moments(x.contiguous(memory_format=layout))
        torch.testing.assert_close(var.double(), x.double().var((2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernels", [cpu, native])
def test_nan_passes_the_activation_and_infinities_stay(kernels):
    branch = torch.tensor([float("nan"), -1.0, float("inf"), 2.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3).contiguous()
    y, _, _ = kernels.join([branch], [], torch.empty(0, 1, 4), None, True, False)
    assert torch.equal(y.isnan(), branch.isnan()) and torch.equal(y[:, 1:], branch[:, 1:].relu())


@pytest.mark.parametrize("kernels", [cpu, native])
def test_a_result_may_take_the_place_of_its_first_operand(kernels):
    branch, *earlier = maps(4, (3, 6, 5, 5), torch.float32)
    scales, bias = torch.randn(3, 1, 6), torch.randn(1, 6)
    expected = reference.join([branch], earlier, scales, bias, True, False)[0]
    y, _, _ = kernels.join([branch], earlier, scales, bias, True, False, branch)
    assert y.data_ptr() == branch.data_ptr()
    torch.testing.assert_close(y, expected)


def test_compiled_kernels_give_the_same_bits_with_any_number_of_threads():
    branch, *earlier = maps(4, (3, 40, 30, 29), torch.float32)
    scales, bias = torch.randn(3, 3, 40), torch.randn(3, 40)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            joined = native.join([branch], earlier, scales, bias, True, True)
            found.append((*joined, *native.pull(branch, None, None, None, earlier, list(scales), earlier, 3, True)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("groups", [ops.NONE, ops.RAW, ops.BATCH, 1, 2, 6])
@pytest.mark.parametrize("before", ["addend", "branch", "plain branch", "fixed branch"])
def test_compiled_operator_at_one_go_matches_its_parts(before, groups, dtype, tolerance):
    """What is made of statistics and weights inside the compiled kernels, and its gradients, with maps left out too."""
    shape, c = (3, 6, 5, 4), 6
    branch, *maps_of = maps(4, shape, dtype)
    small = torch.Generator().manual_seed(2)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=small, dtype=torch.float64).to(dtype)

    rows = 1 if groups == ops.BATCH else 3
    affine = [numbers(c), numbers(c)] if before == "branch" else []
    fixed = [numbers(1, c), numbers(1, c)] if before == "fixed branch" else []
    rates, shifts = ([numbers(rows, c) for _ in range(3)] for _ in range(2))
    weight = numbers(3, c)
    for summed, relu, missing in ((maps_of, True, 0), (maps_of[1:], False, 1), (maps_of[2:], True, 2)):
        head = ([branch], None) if before == "addend" else ([], branch)
        given = Sum(*head, affine, fixed, 1e-3, summed, weight, rates, shifts, relu, groups, 1e-3)
        y, own, theirs = native.block(given, None)
        expected = fused._block_by_parts(reference, given, None, "plain")
        for ours, wanted in zip(([y], own, theirs), ([expected[0]], *expected[1:]), strict=True):
            assert_all_close(ours, wanted, tolerance)

        grads = [None, numbers(*own[0].shape), numbers(*own[1].shape)]
        grads[missing] = None
        later = maps(2, shape, dtype, seed=3)
        arguments = (
            *(y, own, later[0] if missing else None, *grads[1:], later, [numbers(rows, c), numbers(rows, c)], theirs),
            *given[1:],
        )
        if groups == ops.NONE:
            arguments = (*arguments[:3], None, None, *arguments[5:])
        # the back end "cpu" goes the way of parts, with forms.py
        wanted = fused.run_pull_block(*arguments, "cpu")
        for ours, theirs_too in zip(fused.run_pull_block(*arguments, "native"), wanted, strict=True):
            listed = isinstance(ours, list)
            found, right = (ours, theirs_too) if listed else ([ours], [theirs_too])
            assert_all_close(found, right, 100 * tolerance)


def assert_all_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [ops.BATCH, 2])
def test_the_written_gradient_of_a_norms_form_is_that_of_autograd(groups):
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 8, dtype=torch.float64).requires_grad_().unbind()
    rate, shift, pooled, variance = forms.form(*reference.moments(x), groups, 1e-3, weight, bias)
    grads = (torch.randn_like(rate), torch.randn_like(shift))
    expected = torch.autograd.grad((rate, shift), (x, weight, bias), grads)
    count = 20 * (3 if groups == ops.BATCH else 4)
    offset, slope, *to_affine = forms.form_backward(pooled, variance, groups, 1e-3, weight, *grads, count)
    found = (offset[:, :, None, None] + slope[:, :, None, None] * x, *to_affine)
    assert_all_close(found, expected, 1e-10)


def turned(x: Tensor) -> Tensor:
    """The same numbers, with rows and columns of pixels the other way round in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def images_inside(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize(
    ("groups", "later", "form"),
    [(groups, later, Tensor.contiguous) for groups in (ops.NONE, ops.RAW, ops.BATCH, 1, 3) for later in (0, 2)]
    + [(groups, 2, form) for groups in (ops.BATCH, 3) for form in (turned, images_inside)],
)
def test_the_registered_operators_pass_opcheck(groups, later, form, backend):
    branch, x, other = (form(t).requires_grad_() for t in maps(3, (2, 3, 4, 2), torch.float32))
    rows = 1 if groups == ops.BATCH else 2
    affine = list(torch.randn(2, 3).requires_grad_().unbind())
    weight = torch.randn(2, 3, requires_grad=True)
    rates, shifts = ([torch.randn(rows, 3, requires_grad=True) for _ in range(2)] for _ in range(2))
    for before, norm, fixed in ((None, [], []), (branch, affine, []), (branch, [], affine_rows(affine))):
        addends = [other] if before is None else []
        link = links_to(x, rows)
        given = Sum(addends, before, norm, fixed, 1e-5, [x], weight, rates, shifts, True, groups, 1e-5)
        torch.library.opcheck(fused.block.registered, (*given, link, later, backend))
    torch.library.opcheck(fused.enter.registered, (branch, groups, 1e-5, later, rows, backend))


def affine_rows(affine: list[Tensor]) -> list[Tensor]:
    return [t.detach()[None].clone().requires_grad_() for t in affine]


def links_to(x: Tensor, rows: int) -> list[Tensor]:
    shapes = (x.shape, (rows, x.shape[1]))
    return [torch.zeros(1).expand(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize("form", [Tensor.contiguous, turned, images_inside])
def test_the_registered_operators_of_tiles_pass_opcheck(form, backend):
    x, other = (form(t).requires_grad_() for t in maps(2, (2, 3, 4, 2), torch.float32))
    scales = torch.randn(3, 2, 2, 3, requires_grad=True)
    tile = [torch.zeros(1).expand(x.shape).requires_grad_() for _ in range(3)]
    tile.append(torch.zeros(1).expand(scales.shape).requires_grad_())
    torch.library.opcheck(tiles.ahead.registered, ([x, other], tile, scales, [2], backend))
    links = [*links_to(x, 2), *links_to(other, 2)]
    torch.library.opcheck(tiles.close.registered, (other, links, [3, 1], 2, backend))


DEPTHS = [1, 2, 3, 8, 31, 32, 33, 37, 64]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("variant", [{"groups": 2}, {"norm": "batch"}, {"aggregate": "block"}], ids=str)
def test_back_ends_agree_at_every_depth(variant, depth):
    grads = {}
    for backend in ("plain", "cpu", "native"):
        torch.manual_seed(3)
        net = timm.create_model("resnet18", layers=(depth, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2)
        ds.plug_in(net, **variant, backend=backend).double()
        assert (net.layer1.shortcut.tiling.size < depth) == (depth > 8)
        for _, weight in ds.shortcut_parameters(net):
            torch.nn.init.normal_(weight, std=0.3)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        y = net(x)
        y.square().sum().backward()
        grads[backend] = [y.detach(), x.grad, *(p.grad for p in net.parameters())]
    for backend in ("cpu", "native"):
        for ours, theirs in zip(grads[backend], grads["plain"], strict=True):
            scale = max(1.0, theirs.abs().max().item())
            assert (ours - theirs).abs().max().item() <= 1e-9 * scale


@pytest.mark.parametrize("depth", range(1, 20))
def test_a_tiling_takes_every_pair_once(depth):
    for size in range(1, depth + 1):
        tiling = Tiling(depth, size)
        for k in range(depth):
            ahead = range(k - k % size + 1) if k >= size else range(0)
            assert sorted([*ahead, *tiling.direct(k)]) == list(range(k + 1))
            assert [i for i in range(depth) if k in tiling.users(i)] == list(tiling.direct(k))
        for i in range(depth):
            closing = [k for k in range(depth) if tiling.begins(k) and i in tiling.finished(k)]
            assert len(closing) == tiling.is_closed(i)


def test_tiles_cut_the_traffic_of_deep_stages():
    """ResNet-152's third stage: 666 maps are read pair by pair. Beyond, the traffic grows as L^1.5."""
    assert Tiling(36, 36).traffic == 666
    assert Tiling.best(36).traffic < 300
    assert Tiling.best(6) == Tiling(6, 6)
    assert Tiling.best(256).traffic < 1.1 * 4**1.5 * Tiling.best(64).traffic


def test_a_deep_stage_sums_in_tiles(monkeypatch):
    """Counted by kernels: one `mix` a group forwards and backwards, and one `dots`."""
    calls: Counter[str] = Counter()
    for name in ("block", "mix", "dots"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, real=real: calls.update([name]) or real(*a))
    net = timm.create_model("resnet18", layers=(36, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2)
    ds.plug_in(net, backend="native")(torch.randn(2, 3, 32, 32)).sum().backward()
    assert calls["mix"] == 5 + 5 and calls["dots"] == 5 and calls["block"] == 39


def test_the_best_kernels_run_by_default_and_a_named_back_end_is_kept(monkeypatch):
    calls = []
    own = {"cpu": cpu, "native": native}[ops.dispatch.own_backend("cpu")[0]]
    name = "block" if own is native else "join"
    real = getattr(own, name)
    monkeypatch.setattr(own, name, lambda *args: calls.append(1) or real(*args))
    x = torch.randn(2, 3, 64, 64)
    ds.plug_in(timm.create_model("resnet18"))(x)
    assert len(calls) == 8
    ds.plug_in(timm.create_model("resnet18"), backend="plain")(x)
    assert len(calls) == 8
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "plain")
    ds.plug_in(timm.create_model("resnet18"))(x)
    assert len(calls) == 8


def test_without_a_compiler_the_sums_in_place_run(tmp_path):
    code = """
import torch, dense_shortcuts as ds, timm
from dense_shortcuts.ops.dispatch import own_backend
backend, reason = own_backend("cpu")
assert backend == "cpu" and "no C++ compiler" in reason, (backend, reason)
ds.plug_in(timm.create_model("resnet18"))(torch.randn(2, 3, 64, 64))
try:
    ds.plug_in(timm.create_model("resnet18"), backend="native")(torch.randn(2, 3, 64, 64))
except ds.DenseShortcutError as error:
    assert "no C++ compiler" in str(error)
else:
    raise SystemExit("a named back end fell back")
"""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "DENSE_SHORTCUTS_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_compiler_that_fails_is_told_and_leaves_nothing(tmp_path):
    code = """
from dense_shortcuts.ops.dispatch import own_backend
backend, reason = own_backend("cpu")
assert backend == "cpu" and "could not build" in reason, (backend, reason)
"""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = {**os.environ, "CXX": str(broken), "DENSE_SHORTCUTS_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not list((tmp_path / "cache").iterdir())


# The module by itself, which starts sooner than the package.
LOAD = f"""
import runpy
loaded, reason = runpy.run_path({compiled.__file__!r})["library"]()
print("native" if loaded else "none", reason)
"""
needs_compiler = pytest.mark.skipif(
    compiled.library()[0] is None or os.name != "posix", reason="no C++ compiler, or no shell to stand in for one"
)


@pytest.fixture
def cached(tmp_path):
    """A cache and a quick compiler, which copies the library of this process and counts its calls."""
    script, cache = tmp_path / "compiler", tmp_path / "cache"
    library = compiled.library()[0]
    code = f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\ncp {library._name} "$2"\n'
    script.write_text(code)
    script.chmod(0o755)
    return {"CXX": str(script), "DENSE_SHORTCUTS_CACHE": str(cache)}


def load_kernels(environment: dict[str, str]) -> tuple[str, int]:
    """Whether a new process has the kernels, and why; and how often the compiler has been called so far."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD], check=True, env=os.environ | environment, capture_output=True, text=True
    )
    calls = Path(environment["DENSE_SHORTCUTS_CACHE"]).parent / "calls"
    return done.stdout.strip(), len(calls.read_text().splitlines()) if calls.exists() else 0


@needs_compiler
@pytest.mark.parametrize("size", [20_000, 10, 0, None])
def test_a_damaged_library_in_the_cache_is_built_anew_and_a_whole_one_is_not(cached, size):
    assert load_kernels(cached) == ("native compiled by compiler", 1)
    assert load_kernels(cached)[1] == 1
    (library,) = Path(cached["DENSE_SHORTCUTS_CACHE"]).iterdir()
    whole = library.read_bytes()
    changed = bytes(255 - byte for byte in whole)
    library.write_bytes(changed if size is None else whole[:size])  # of 20,000 a part is mapped and read: SIGBUS
    assert load_kernels(cached) == ("native compiled by compiler", 2)
    assert library.read_bytes() == whole and load_kernels(cached)[1] == 2


@needs_compiler
def test_a_library_that_does_not_load_is_built_anew(cached):
    """One from another system: its content is what was written, and the loader refuses it."""
    load_kernels(cached)
    (library,) = Path(cached["DENSE_SHORTCUTS_CACHE"]).iterdir()
    library.unlink()
    foreign = b"for another system"
    digest = hashlib.sha256(foreign).hexdigest()[:16]
    library.with_name(f"{library.stem.rpartition('-')[0]}-{digest}.so").write_bytes(foreign)
    assert load_kernels(cached) == ("native compiled by compiler", 2)


@needs_compiler
def test_a_compiler_may_be_given_with_options_or_behind_another_command(cached):
    script = cached["CXX"]
    assert load_kernels(cached | {"CXX": f"{script} -DWORDS='a b'"})[0].endswith("compiled by compiler '-DWORDS=a b'")
    assert load_kernels(cached | {"CXX": f"env {script}"})[0].endswith(f"compiled by env {script}")
    for broken in ("none -O3", "'g++"):
        found, _ = load_kernels(cached | {"CXX": broken})
        assert found.startswith("none") and "no C++ compiler found: CXX is" in found


@needs_compiler
def test_a_cache_that_cannot_be_written_is_read_and_leaves_no_folder_behind(cached, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    nowhere = cached | {"DENSE_SHORTCUTS_CACHE": str(tmp_path / "compiler" / "cache"), "TMPDIR": str(temporary)}
    assert load_kernels(nowhere)[0] == "native compiled by compiler"
    assert not list(temporary.iterdir())


def test_an_empty_variable_names_no_back_end_and_a_wrong_one_is_told_with_its_name(monkeypatch):
    x = torch.zeros(1, 2, 3, 3)
    usual = ops.choose(x)
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "")
    assert ops.choose(x) == usual
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "fast")
    with pytest.raises(ds.DenseShortcutError, match="unknown back end 'fast' in DENSE_SHORTCUTS_BACKEND: choose"):
        ops.choose(x)
    assert ops.choose(x, "plain") == "plain"
    with pytest.raises(ds.DenseShortcutError, match="unknown back end 'quick': choose"):
        ops.choose(x, "quick")


def test_an_unknown_back_end_is_refused_and_the_network_left_alone():
    net = timm.create_model("resnet18")
    with pytest.raises(ds.DenseShortcutError, match="unknown back end 'fast'"):
        ds.plug_in(net, backend="fast")
    assert not ds.dense_stages(net)
    with pytest.raises(ds.DenseShortcutError, match="maps are on cuda"):
        _on_cuda()


def _on_cuda() -> None:
    class Elsewhere:
        device, dtype = torch.device("cuda"), torch.float32

    ops.choose(Elsewhere(), "cpu")


def test_a_stage_run_in_part_without_gradients_is_refused():
    stage = ds.plug_in(timm.create_model("resnet18")).layer1
    first, second = stage
    with torch.no_grad():
        state = first(torch.randn(1, 64, 4, 4))
    with pytest.raises(ds.DenseShortcutError, match="use_reentrant=False"):
        second(state)


def test_a_hooked_block_gets_the_whole_gradient_of_its_map():
    """Where a map's statistics are made in one pass with it, later gradients do not come to the map itself."""
    seen = {}
    for backend in ("plain", "cpu", "native"):
        torch.manual_seed(5)
        net = ds.plug_in(timm.create_model("resnet34", num_classes=2, zero_init_last=False), backend=backend).double()
        for _, weight in ds.shortcut_parameters(net):
            torch.nn.init.normal_(weight)
        net.layer2[1].register_forward_hook(
            lambda module, args, out, backend=backend: (
                out.register_hook(lambda g: seen.__setitem__(backend, g)) and None
            )
        )
        net(torch.randn(3, 3, 96, 96, dtype=torch.float64)).square().sum().backward()
    for backend in ("cpu", "native"):
        torch.testing.assert_close(seen[backend], seen["plain"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kernels", ["plain", "native"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("groups", [ops.BATCH, 1, 2, 6])
def test_the_form_of_a_norm_of_a_batch_norm_and_its_gradients_are_those_of_the_two(groups, affine, kernels):
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, bias = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.linspace(2, -3, 6, dtype=torch.float64)
    parameters = (weight, bias) if affine else (None, None)
    rate, shift, *found = ops.nested_form(*ops.moments(x), *parameters, 0.1, groups, 0.2, kernels)
    y = torch.nn.functional.batch_norm(x, None, None, *parameters, training=True, eps=0.1)
    if groups == ops.BATCH:
        wanted = torch.nn.functional.batch_norm(y, None, None, training=True, eps=0.2)
    else:
        wanted = torch.nn.functional.group_norm(y, groups, eps=0.2)
    torch.testing.assert_close(x * rate[:, :, None, None] + shift[:, :, None, None], wanted, rtol=1e-11, atol=1e-11)
    pooled = y.transpose(0, 1).flatten(1) if groups == ops.BATCH else y.reshape(4 * groups, -1)
    moments = [x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), pooled.mean(1), pooled.var(1, correction=0)]
    for one, other in zip(found, moments, strict=True):
        torch.testing.assert_close(one.flatten(), other, rtol=1e-11, atol=1e-11)

    given = [t.clone().requires_grad_() for t in (*ops.moments(x), *parameters) if t is not None]

    def run(mean: Tensor, var: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        return ops.nested_form(mean, var, *(affine or (None, None)), 0.1, groups, 0.2, kernels)[:2]

    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
    if affine:  # a frozen bias alone
        given[3].requires_grad_(False)
        assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
