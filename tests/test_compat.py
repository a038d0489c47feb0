"""The rest of PyTorch with a plugged network: precision, layout, compiler, copies, processes, hooks, tracing."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hosts
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hosts import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import dense_shortcuts as ds

VARIANTS = [
    {},
    {"aggregate": "block", "norm": "batch"},
    {"aggregate": "dense_identity"},
    {"norm": "layer", "keep_identity": True},
    {"norm": None, "init": "uniform"},
    {"norm": "instance", "inner": True},
    {"norm": "batch", "inner": True},
]
SHAPE = (2, 3, 9, 7)


def plugged(kind: str = "timm_bottleneck", **variant) -> nn.Module:
    net = ds.plug_in(hosts.small_net(kind), **variant)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=3)
    return net


def run(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, gradient of every parameter."""
    net.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(x)
    y.float().square().mean().backward()
    return y.detach(), x.grad, {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_runs_agree(actual: tuple, expected: tuple, tolerance: float) -> None:
    assert_close(actual[0], expected[0].double(), tolerance, "output")
    assert_close(actual[1], expected[1].double(), tolerance, "gradient of the input")
    assert set(actual[2]) == set(expected[2])
    for name, gradient in expected[2].items():
        assert_close(actual[2][name], gradient.double(), tolerance, f"gradient of {name}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# Precision and layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bf16_autocast_stays_near_float32_in_output_and_gradients(variant):
    """In evaluation mode: the host's own batch statistics of few numbers would drown what is measured here."""
    torch.manual_seed(11)
    net = hosts.Net("timm_bottleneck", (3, 2), (32, 64))
    hosts.randomise(net, seed=12)
    ds.plug_in(net, **({"init": "uniform"} | variant)).eval()
    x, upstream, gradients, outputs = torch.randn(8, 3, 15, 13), torch.randn(8, 5), [], []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(net(x))
        (outputs[-1].float() * upstream).sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert [y.dtype for y in outputs] == [torch.float32, torch.bfloat16]
    assert relative_error(outputs[1], outputs[0]) < 0.01
    assert {g.dtype for g in gradients[1].values()} == {torch.float32}
    added = [name for name, _ in ds.shortcut_parameters(net)]
    host = [name for name in gradients[0] if name not in added]
    for names, bound in ((host, 0.1), (added, 0.2)):
        if names:
            exact, rounded = (torch.cat([g[name].flatten() for name in names]) for g in gradients)
            assert relative_error(rounded, exact) < bound


def test_statistics_of_a_bf16_map_are_kept_in_float32():
    """At a mean of 100, bf16 has steps of 0.5: statistics taken in bf16 would be noise."""
    stage = plugged_stage_of_zero_branches()
    x = (torch.randn(2, 8, 33, 31) + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = stage(x)
    wanted = torch.nn.functional.group_norm(x.double(), 2).relu()
    assert (y.double() - wanted).abs().max() < wanted.abs().max() * 2**-7


def plugged_stage_of_zero_branches() -> nn.Module:
    host = nn.Sequential(hosts.make_stage("timm_basic", 1, 8, in_channels=8))
    host[0][0].zero_init_last()
    return ds.plug_in(host, norm="group")[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_network_in_half_precision_infers_near_float32(variant, dtype):
    net, x = plugged(**variant).eval(), torch.randn(2, 3, 15, 13)
    with torch.no_grad():
        expected = net(x)
        actual = copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype and actual.isfinite().all()
    assert relative_error(actual, expected) < (0.01 if dtype == torch.float16 else 0.06)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_channels_last_gives_the_same_numbers_and_stays_channels_last(variant, train):
    net, x = plugged(**variant).train(train).double(), torch.randn(SHAPE, dtype=torch.float64)
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    expected = run(net, x)
    layouts = []
    for stage in (twin.layer1, twin.layer2):
        for block in stage.children():
            if not isinstance(block, ds.DenseShortcut):
                block.register_forward_hook(
                    lambda m, a, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
                )
    actual = run(twin, x.to(memory_format=torch.channels_last))
    assert_runs_agree(actual, expected, 1e-10)
    assert layouts == [True] * 5


# Compiler -------------------------------------------------------------------------------------------------------------


COMPILED = [
    ("timm_basic", {"norm": "instance", "keep_identity": True}),
    ("timm_bottleneck", {}),
    ("timm_bottleneck", {"norm": "batch", "inner": True}),
    ("timm_bottle2neck", {"norm": "layer", "inner": True}),
    ("tv_basic", {"aggregate": "block", "norm": "batch"}),
    ("tv_bottleneck", {"norm": None, "init": "uniform"}),
    ("tv_bottleneck", {"aggregate": "dense_identity"}),
]


def short_net(kind: str, **variant) -> nn.Module:
    torch.manual_seed(1)
    net = hosts.Net(kind, (2,), (16,))
    hosts.randomise(net, seed=2)
    hosts.randomise_parameters(ds.shortcut_parameters(ds.plug_in(net, **variant)), seed=3)
    return net


@pytest.mark.parametrize("backend", [pytest.param("plain", marks=pytest.mark.long), "native"])
@pytest.mark.parametrize(("kind", "variant"), COMPILED, ids=str)
def test_the_whole_network_is_one_graph_for_the_compiler(kind, variant, backend):
    """Dynamo with aot_eager: the tracing of forward and backward, without the minutes of code generation."""
    torch._dynamo.reset()
    net, x = short_net(kind, **variant, backend=backend), torch.randn(SHAPE)
    twin = copy.deepcopy(net)
    expected = run(net, x)
    actual = run(torch.compile(twin, fullgraph=True, backend="aot_eager"), x)
    actual = (*actual[:2], {name.removeprefix("_orig_mod."): g for name, g in actual[2].items()})
    assert_runs_agree(actual, expected, 1e-4)
    for (name, buffer), (_, other) in zip(twin.named_buffers(), net.named_buffers(), strict=True):
        assert_close(buffer, other.double(), 1e-4, name)


@pytest.mark.long
@pytest.mark.parametrize("backend", [pytest.param("plain", marks=pytest.mark.long), "native"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_one_compiled_graph_serves_another_batch_size_and_resolution(norm, backend):
    torch._dynamo.reset()
    net = short_net("timm_basic", norm=norm, backend=backend)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=graphs)
    for shape in ((2, 3, 9, 7), (5, 3, 9, 7), (3, 3, 12, 8), (7, 3, 6, 10), (4, 3, 9, 7), (6, 3, 12, 8), (9, 3, 11, 5)):
        x = torch.randn(shape)
        actual = run(compiled, x)
        actual = (*actual[:2], {name.removeprefix("_orig_mod."): g for name, g in actual[2].items()})
        assert_runs_agree(actual, run(net, x), 1e-4)
    assert graphs.frame_count <= 3, "a ragged batch is compiled anew each time"


@pytest.mark.long
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_for_a_cpu_the_compiler_is_left_the_sums_of_all_but_deep_stages(norm):
    torch._dynamo.reset()
    net = ds.plug_in(hosts.Net("timm_basic", (3, 10), (8, 8)), norm=norm).eval()
    assert [s.tiled for s in net.modules() if isinstance(s, ds.DenseShortcut)] == [False, True]
    seen = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(net, fullgraph=True, backend=look)(torch.randn(SHAPE))
    assert seen.count("dense_shortcuts.dense_add.default") == 10


@pytest.mark.long
@pytest.mark.parametrize(
    ("device", "mode", "backend"),
    [
        ("cpu", None, "plain"),
        ("cpu", None, "native"),
        pytest.param(
            *("cuda", "reduce-overhead", "triton"),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
        ),
    ],
)
def test_compiled_code_trains_as_eager_does(device, mode, backend):
    """On a GPU in CUDA graphs."""
    torch._dynamo.reset()
    net = short_net("timm_basic", backend=backend).to(device)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, mode=mode)
    optimizers = [torch.optim.SGD(n.parameters(), 0.02) for n in (net, twin)]
    for _ in range(3):
        x = torch.randn(SHAPE).to(device)
        for model, optimizer in zip((net, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for (name, value), (_, other) in zip(twin.state_dict().items(), net.state_dict().items(), strict=True):
        assert_close(value, other.double(), 1e-4, name)


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_deterministic_mode_takes_every_operation_and_repeats_to_the_bit(norm, backend):
    x = torch.randn(SHAPE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(short_net("timm_basic", norm=norm, backend=backend), x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(grad, runs[1][2][name]) for name, grad in runs[0][2].items())


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_a_copy_gives_the_same_numbers_and_shares_nothing(how, variant):
    net, x = plugged(**variant), torch.randn(SHAPE)
    twin = how(net)
    assert_runs_agree(run(twin, x), run(net, x), 0.0)
    own = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() not in own for p in twin.parameters())
    before = net.eval()(x)
    hosts.randomise_parameters(twin.named_parameters(), seed=9)
    assert torch.equal(net(x), before)
    assert not torch.allclose(twin.eval()(x), before)
    assert list(twin.state_dict()) == list(net.state_dict())


def test_a_moving_average_of_timm_follows_the_shortcut_weights():
    from timm.utils import ModelEmaV3

    net = plugged()
    average = ModelEmaV3(net, decay=0.5)
    before = {name: p.detach().clone() for name, p in ds.shortcut_parameters(net)}
    with torch.no_grad():
        for _, p in ds.shortcut_parameters(net):
            p.add_(1.0)
    average.update(net)
    for name, p in ds.shortcut_parameters(average.module):
        assert_close(p, before[name].double() + 0.5, 1e-6, name)


# Processes ------------------------------------------------------------------------------------------------------------


def batch_free_net(norm: str, center: bool) -> nn.Module:
    """Group norms in the host, since SyncBatchNorm of PyTorch itself does not run on a CPU; N is what is tested."""
    torch.manual_seed(21)
    net = hosts.Net("timm_bottleneck", (3, 2), (16, 16), norm_layer=partial(nn.GroupNorm, 2))
    hosts.randomise(net, seed=22)
    ds.plug_in(net, norm=norm, center=center, inner=True)
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=23)
    return net.double()


def joint_batch() -> Tensor:
    return torch.randn(7, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(24))


def sgd_steps(net: nn.Module, x: Tensor, share: float) -> dict[str, Tensor]:
    """Two steps on the squared logits, each sample weighted alike; `share` undoes DDP's mean over processes."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(2):
        optimizer.zero_grad()
        (net(x + step).square().sum() * share).backward()
        optimizer.step()
    return {name.removeprefix("module."): value.clone() for name, value in net.state_dict().items()}


# The images of the first of two processes, of seven: statistics must be weighted by the count, which may be zero.
PARTS = [(norm, first, True) for first in (3, 7) for norm in ("group", "batch")] + [
    ("batch", 3, False),
    ("batch", 7, False),
]


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = joint_batch()
    for norm, first, center in PARTS:
        ddp = nn.parallel.DistributedDataParallel(batch_free_net(norm, center))
        nn.SyncBatchNorm.convert_sync_batchnorm(ddp)  # after wrapping: DDP refuses PyTorch's GPU-only layer on a CPU
        mine = x[:first] if rank == 0 else x[first:]
        torch.save(sgd_steps(ddp, mine, 2 / len(x)), Path(folder) / f"{norm}{first}{center}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one_process_on_the_joined_batch(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)  # a fork could not run autograd, whose threads may exist here
    x = joint_batch()
    for norm, first, center in PARTS:
        net = batch_free_net(norm, center)
        start = {name: value.clone() for name, value in net.state_dict().items()}
        expected = sgd_steps(net, x, 1 / len(x))
        ranks = [torch.load(tmp_path / f"{norm}{first}{center}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert list(ranks[0]) == list(expected)
        for name, value in expected.items():
            # X_0 is seen through N alone, and batch norm takes what its own norm adds to a channel out again
            still = norm == "batch" and name.endswith("downsample.1.bias" if center else "running_mean")
            assert still or not torch.equal(value, start[name]), f"{name} did not move"
            assert_close(ranks[0][name], value.double(), 1e-8, f"{norm}: {name}")
            assert_close(ranks[1][name], value.double(), 1e-8, f"{norm}: {name} of the second process")


def test_batch_norms_of_shortcuts_convert_to_sync_batch_norm():
    net = ds.plug_in(hosts.small_net("timm_bottleneck"), norm="batch", inner=True).eval()
    x = torch.randn(SHAPE)
    expected = net(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    shortcuts = [m for m in converted.modules() if isinstance(m, ds.DenseShortcut)]
    assert {type(n) for s in shortcuts for n in s.norms} == {nn.SyncBatchNorm}
    assert type(converted.layer1[0].inner.norm) is nn.SyncBatchNorm
    assert_close(converted(x), expected.double(), 1e-5, "output")


# Hooks, checkpoints, tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hosts.KINDS)
@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
def test_forward_and_full_backward_hooks_on_every_block_see_the_equations_maps_and_whole_gradients(aggregate, kind):
    """The gradient of X_l has a part from each later block; a hook that saw only the next one's would mislead."""
    host = nn.Sequential(hosts.make_stage(kind, 4, 16, in_channels=6)).double()
    hosts.randomise(host, seed=1)
    blocks, variant = hosts.frozen_copy(host[0]), {"aggregate": aggregate, "norm": "group"}
    stage = ds.plug_in(host, **variant)[0]
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=2)
    expected = hosts.Reference(blocks, stage, channels=16, **variant)
    outputs: dict[int, Tensor] = {}
    copies: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}

    def forward_hook(k: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[k], copies[k] = output, output.detach().clone()

    def backward_hook(k: int, module: nn.Module, grad_input: tuple, grad_output: tuple) -> None:
        gradients[k] = grad_output[0].clone()

    for k in range(4):
        stage[k].register_forward_hook(partial(forward_hook, k))
        stage[k].register_full_backward_hook(partial(backward_hook, k))
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    y, maps = stage(x.clone().requires_grad_()), expected.maps(x.clone().requires_grad_())
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(maps[-1], maps[1:], upstream, retain_graph=True)
    y.backward(upstream)
    maps[-1].backward(upstream)
    for k in range(4):
        assert_close(outputs[k], maps[k + 1], 1e-10, f"X_{k + 1}")
        assert torch.equal(outputs[k], copies[k]), f"X_{k + 1} was written into after the hook saw it"
        assert_close(gradients[k], wanted[k], 1e-10, f"gradient of X_{k + 1}")
    for name, parameter in expected.parameters().items():
        assert_close(stage.get_parameter(name).grad, parameter.grad, 1e-10, name)


@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
def test_a_hook_on_one_block_alone_sees_its_whole_gradient_and_changes_no_other(aggregate):
    net, x, seen = plugged("timm_basic", aggregate=aggregate).double(), torch.randn(SHAPE, dtype=torch.float64), []
    expected = run(copy.deepcopy(net), x)
    twin = copy.deepcopy(net)
    for block in twin.layer1.blocks:
        block.register_forward_hook(lambda module, args, output: output.retain_grad())
    kept = []
    twin.layer1[0].register_forward_hook(lambda module, args, output: kept.append(output))
    run(twin, x)
    net.layer1[0].register_full_backward_hook(lambda module, gin, gout: seen.append(gout[0].clone()))
    assert_runs_agree(run(net, x), expected, 1e-12)
    assert_close(seen[0], kept[0].grad, 1e-12, "gradient of X_1")


@pytest.mark.parametrize("target", ["1", "1.conv1"])
@pytest.mark.parametrize("aggregate", ["stage", "block", "dense_identity"])
def test_a_pre_hook_on_the_next_block_or_its_first_layer_sees_the_whole_gradient_of_the_map_it_takes(aggregate, target):
    """Grad-CAM tools take a layer's input as often as its output; X_1 has a part of its gradient from each block."""
    host = nn.Sequential(hosts.make_stage("timm_basic", 4, 8, in_channels=6)).double()
    hosts.randomise(host, seed=1)
    blocks, variant, kept = hosts.frozen_copy(host[0]), {"aggregate": aggregate, "norm": "group"}, []
    stage = ds.plug_in(host, **variant)[0]
    hosts.randomise_parameters(ds.shortcut_parameters(host), seed=2)
    expected = hosts.Reference(blocks, stage, channels=8, **variant)

    def keep(module: nn.Module, args: tuple) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    stage.get_submodule(target).register_forward_pre_hook(keep)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    y, maps = stage(x), expected.maps(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    (wanted,) = torch.autograd.grad(maps[-1], maps[1], upstream)
    assert_close(kept[0], maps[1], 1e-10, "X_1")
    assert_close(kept[0].grad, wanted, 1e-10, "gradient of X_1")


def test_grad_cam_of_the_last_block_is_the_gradient_weighted_sum_of_its_maps():
    net, x, kept = plugged().eval(), torch.randn(SHAPE), {}
    net.layer2[-1].register_forward_hook(lambda module, args, output: kept.__setitem__("map", output))
    net.layer2[-1].register_full_backward_hook(lambda module, gin, gout: kept.__setitem__("gradient", gout[0]))
    net(x)[:, 2].sum().backward()
    pixels = kept["map"].shape[2] * kept["map"].shape[3]
    gradient = (net.fc.weight[2] / pixels)[None, :, None, None].expand_as(kept["map"])
    assert_close(kept["gradient"], gradient.double(), 1e-6, "gradient")
    cam = (kept["gradient"].mean((2, 3), keepdim=True) * kept["map"]).sum(1).relu()
    wanted = torch.einsum("c,nchw->nhw", net.fc.weight[2] / pixels, kept["map"]).relu()
    assert_close(cam, wanted.double(), 1e-6, "Grad-CAM")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_checkpointing_each_step_of_a_stage_recomputes_it_and_keeps_every_gradient(variant):
    stage, x, runs = plugged(**variant).layer1, torch.randn(2, 8, 9, 7), []

    def go(wrap: Callable) -> dict[str, Tensor]:
        stage.zero_grad()
        first = x.clone().requires_grad_()
        state = first
        for step in stage:
            state = wrap(step, state)
        state.square().mean().backward()
        return {"input": first.grad} | {name: p.grad.clone() for name, p in stage.named_parameters()}

    plain = go(lambda step, state: step(state))
    stage[1].conv2.register_forward_hook(lambda *_: runs.append(1))
    saved = go(lambda step, state: checkpoint(step, state, use_reentrant=False))
    assert len(runs) == 2
    for name, gradient in plain.items():
        assert_close(saved[name], gradient.double(), 1e-6, name)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_torchvisions_feature_extractor_takes_the_maps_of_stages_and_blocks(variant, train):
    net = plugged("tv_bottleneck", **variant).train(train)
    x, seen = torch.randn(SHAPE), {}
    twin = copy.deepcopy(net)
    extractor = create_feature_extractor(net, {"layer1": "one", "layer2.0": "inside", "layer2": "two"})
    for name in ("layer1", "layer2.0", "layer2"):
        twin.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
    twin(x)
    maps = extractor.train(train)(x)
    # a hook on a block keeps the moments of its map out of the pass that makes it, so the twin rounds otherwise
    assert_close(maps["one"], seen["layer1"].double(), 2e-6, "layer1")
    assert_close(maps["inside"], seen["layer2.0"].double(), 2e-6, "layer2.0")
    assert_close(maps["two"], seen["layer2"].double(), 2e-6, "layer2")
    buffers = dict(twin.named_buffers())
    for name, buffer in extractor.named_buffers():
        assert_close(buffer, buffers[name].double(), 1e-6, name)
    torch.stack([m.square().mean() for m in maps.values()]).sum().backward()
    assert [name for name, p in extractor.named_parameters() if p.grad is None] == []


def test_torchvisions_feature_extractor_cuts_a_registered_network():
    net = timm.create_model("dsnet18", num_classes=2).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = timm.create_model("dsnet18", features_only=True, out_indices=(3,)).eval()
        expected.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(("layer4", "fc"))})
        maps = create_feature_extractor(net, ["layer3"])(x)
        assert_close(maps["layer3"], expected(x)[0].double(), 1e-6, "layer3")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_export_of_torch_gives_the_same_output(variant):
    net, x = plugged(**variant).eval(), torch.randn(SHAPE)
    with torch.no_grad():
        exported = torch.export.export(net, (x,))
        assert_close(exported.module()(x), net(x).double(), 1e-6, "output")
