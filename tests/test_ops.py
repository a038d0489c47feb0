"""The fused operator against the plain one: forward and every gradient, all back ends, odd shapes and dtypes."""

import copy
from collections import Counter

import pytest
import timm
import torch
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import ops
from dense_shortcuts.nn.features import make_feature
from dense_shortcuts.nn.tiling import Tiling
from dense_shortcuts.ops import autograd, tiled
from dense_shortcuts.ops import backend as backend_module
from dense_shortcuts.ops.backends import native, reference


def maps(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 2), (1, 1, 1, 1), (4, 6, 3, 3), (0, 3, 2, 2), (2, 70, 9, 1), (2, 3, 29, 37), (2, 515, 2, 2)]
)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_each_pass_matches_the_reference(shape, rows, dtype, tolerance, channels_last):
    k = native
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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("addends", [0, 1])
@pytest.mark.parametrize("count", [2, 9, 19])
def test_a_sum_written_over_its_first_tensor_has_the_same_bits(count, addends, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    xs = [x.contiguous(memory_format=layout) for x in maps(count, (2, 70, 9, 3), dtype)]
    wide = ops.accumulation_dtype(dtype)
    scales, bias = torch.randn(count - addends, 2, 70, dtype=wide), torch.randn(2, 70, dtype=wide)
    given = (xs[:addends], xs[addends:], scales, bias, True, True)
    expected = native.join(*given)
    found = native.join(*given, overwrite=True)
    assert found[0] is xs[0]
    assert all(map(torch.equal, found, expected))


def test_variance_of_a_map_far_from_zero_does_not_cancel():
    x = 100 + torch.randn(2, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        _, var = native.moments(x.contiguous(memory_format=layout))
        torch.testing.assert_close(var.double(), x.double().var((2, 3), correction=0), rtol=1e-3, atol=0)


def test_nan_passes_the_activation_and_infinities_stay():
    branch = torch.tensor([float("nan"), -1.0, float("inf"), 2.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3).contiguous()
    y, _, _ = native.join([branch], [], torch.empty(0, 1, 4), None, True, False)
    assert torch.equal(y.isnan(), branch.isnan()) and torch.equal(y[:, 1:], branch[:, 1:].relu())


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


def turned(x: Tensor) -> Tensor:
    """The same numbers, with rows and columns of pixels the other way round in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def images_inside(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


OPCHECKED = [(consumers, form) for consumers in (0, 2) for form in (Tensor.contiguous, turned, images_inside)]


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(("consumers", "form"), OPCHECKED)
def test_the_registered_operators_pass_opcheck(statistics, consumers, form):
    branch, x, other = (form(t).requires_grad_() for t in maps(3, (2, 3, 4, 2), torch.float32))
    for rows, bias in ((1, None), (2, torch.randn(2, 3, requires_grad=True)), (2, torch.randn(1, 3).requires_grad_())):
        scales = torch.randn(2, rows, 3, requires_grad=True)
        links = [*links_to(x, rows), *links_to(other, rows)]
        arguments = ([branch], [x, other], links, scales, bias, True, statistics, consumers, rows, "native")
        torch.library.opcheck(autograd.dense_add, arguments)
        torch.library.opcheck(autograd.feature_stats, (branch, statistics, consumers, rows, "native"))


def links_to(x: Tensor, rows: int) -> list[Tensor]:
    shapes = (x.shape, (rows, x.shape[1]))
    return [torch.zeros(1).expand(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("form", [Tensor.contiguous, turned, images_inside])
def test_the_registered_operators_of_tiles_pass_opcheck(form):
    x, other = (form(t).requires_grad_() for t in maps(2, (2, 3, 4, 2), torch.float32))
    scales = torch.randn(3, 2, 2, 3, requires_grad=True)
    tile = [torch.zeros(1).expand(x.shape).requires_grad_() for _ in range(3)]
    tile.append(torch.zeros(1).expand(scales.shape).requires_grad_())
    torch.library.opcheck(tiled._partial_sums, ([x, other], tile, scales, [2], "native"))
    links = [*links_to(x, 2), *links_to(other, 2)]
    torch.library.opcheck(tiled._group_links, (other, links, [3, 1], 2, "native"))


@pytest.mark.parametrize("groups", [None, 1, 2, 6])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_the_affine_form_of_a_norm_of_a_batch_norm_is_that_of_the_two(groups, affine):
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner, outer = nn.BatchNorm2d(6, affine=affine).double(), nn.BatchNorm2d(6, affine=False).double()
    if groups is not None:
        outer = nn.GroupNorm(groups, 6, affine=False).double()
    if affine:
        inner.weight.data, inner.bias.data = torch.linspace(-1, 2, 6).double(), torch.linspace(2, -3, 6).double()
    wanted = outer(copy.deepcopy(inner)(x))
    options = {"num_consumers": 0, "per_image": groups is not None}
    for backend in ("plain", "native"):
        feature = make_feature(copy.deepcopy(outer), x, inner_norm=copy.deepcopy(inner), backend=backend, **options)
        found = x * feature.scale[:, :, None, None] + feature.shift[:, :, None, None]
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


DEPTHS = [1, 2, 3, 8, 31, 32, 33, 37, 64]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("variant", [{"groups": 2}, {"norm": "batch"}, {"aggregate": "block"}], ids=str)
def test_back_ends_agree_at_every_depth(variant, depth):
    grads = {}
    for backend in ("plain", "native"):
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
    for ours, theirs in zip(grads["native"], grads["plain"], strict=True):
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
    for name in ("join", "mix", "dots"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, real=real: calls.update([name]) or real(*a))
    net = timm.create_model("resnet18", layers=(36, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2)
    ds.plug_in(net, backend="native")(torch.randn(2, 3, 32, 32)).sum().backward()
    assert calls["mix"] == 5 + 5 and calls["dots"] == 5 and calls["join"] == 39


def test_the_best_kernels_run_by_default_and_a_named_back_end_is_kept(monkeypatch):
    calls = []
    real = native.join
    monkeypatch.setattr(native, "join", lambda *args: calls.append(1) or real(*args))
    x = torch.randn(2, 3, 64, 64)
    ds.plug_in(timm.create_model("resnet18"))(x)
    assert len(calls) == 8
    ds.plug_in(timm.create_model("resnet18"), backend="plain")(x)
    assert len(calls) == 8
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "plain")
    ds.plug_in(timm.create_model("resnet18"))(x)
    assert len(calls) == 8


def test_without_the_library_networks_run_plain_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "library", lambda: (None, "the package was installed without a C++ compiler"))
    backend_module._automatic_once.cache_clear()
    net, x = ds.plug_in(timm.create_model("resnet18")), torch.randn(2, 3, 64, 64)
    for _ in range(2):
        net(x)
    said = [record.getMessage() for record in caplog.records if "without a C++ compiler" in record.getMessage()]
    assert len(said) == 1 and "plain" in said[0]
    backend_module._automatic_once.cache_clear()
    with pytest.raises(ds.DenseShortcutError, match=r"'native' cannot run here \(the package was installed without"):
        ds.plug_in(timm.create_model("resnet18"), backend="native")(x)


def test_a_library_of_another_schema_is_refused(monkeypatch):
    """As after an update of the sources alone: fields that do not stand where Python has them."""
    native.library.cache_clear()
    monkeypatch.setattr(native, "schema", lambda: "Map 24 data@0 kind@8 more@16\n")
    found, reason = native.library()
    monkeypatch.undo()
    native.library.cache_clear()
    assert found is None and "built from other sources: install the package again" in reason
    assert native.library()[0] is not None


CAPABILITIES = {"base": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
OWN = torch.backends.cpu.get_cpu_capability()
RUNNABLE = [*CAPABILITIES][: [*CAPABILITIES.values()].index(OWN) + 1 if OWN in CAPABILITIES.values() else 1]


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_libraries_of_all_instruction_sets_give_the_same(name, monkeypatch):
    branch, *earlier = maps(4, (2, 35, 9, 7), torch.float32)
    scales, bias = torch.randn(3, 2, 35), torch.randn(2, 35)
    wanted = reference.join([branch], earlier, scales, bias, True, True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: CAPABILITIES[name])
    native.library.cache_clear()
    try:
        assert native.library()[1] == f"compiled for {name}"
        for ours, theirs in zip(native.join([branch], earlier, scales, bias, True, True), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        native.library.cache_clear()


def test_maps_and_coefficients_of_other_shapes_are_refused_before_the_library_sees_them():
    x, other = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 4)
    scales = torch.randn(1, 1, 6)
    with pytest.raises(ValueError, match="cannot be summed"):
        native.join([x], [other], scales, None, False, False)
    with pytest.raises(ValueError, match="do not fit"):
        native.join([x], [x], scales[:, :, :1], None, False, False)
    with pytest.raises(ValueError, match="do not fit"):
        native.join([x], [x], scales, torch.randn(3, 6), False, False)


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

    ops.choose(Elsewhere(), "native")


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
    for backend in ("plain", "native"):
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
    torch.testing.assert_close(seen["native"], seen["plain"], rtol=1e-7, atol=1e-9)
