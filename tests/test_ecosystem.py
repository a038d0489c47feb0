"""A plugged network in the tools that people train, tune, quantise and ship with. Each test uses the real library."""

import copy
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from hosts import assert_close
from test_plug import assert_same, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import dense_shortcuts as ds

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def shake(net: nn.Module) -> nn.Module:
    """The network with other numbers in its shortcut weights: a start of 0 or 1 would hide errors."""
    hosts.randomise_parameters(ds.shortcut_parameters(net), seed=3, scale=0.3)
    return net


def convnext(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"depths": (2, 1, 2, 1), "dims": (8, 8, 16, 16), "ls_init_value": 1.0}
    return timm.create_model("convnext_atto", num_classes=3, **sizes, **options)


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes, **options)


def resnet(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"channels": (8, 8, 8, 8), "layers": (2, 2, 1, 1), "zero_init_last": False}
    return timm.create_model("resnet26", num_classes=3, **sizes, **options)


def gradients(net: nn.Module, x: Tensor = IMAGES) -> dict[str, Tensor]:
    net.zero_grad()
    torch.manual_seed(0)
    y = net(x)
    y.square().sum().backward()
    return {"output": y.detach()} | {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_close(actual[name], value.double(), tolerance, name)


# timm's training script -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("make", [resnet, convnext, vit])
def test_the_parts_of_timms_training_script_train_average_and_load_a_plugged_network(make, layer_decay):
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    net = ds.plug_in(make())
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=layer_decay)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    average = ModelEmaV3(net, decay=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=3, warmup_epochs=1)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(IMAGES), torch.tensor([0, 1])).backward()
        optimizer.step()
        average.update(net, step=step)
        scheduler.step(step + 1)
    for name, _ in ds.shortcut_parameters(net):
        assert not torch.equal(net.get_parameter(name), start[name]), f"{name} did not move"
    fresh = ds.plug_in(make())
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), average.module.eval()(IMAGES))
    assert not torch.equal(fresh(IMAGES), net.eval()(IMAGES))


# Hugging Face transformers --------------------------------------------------------------------------------------------

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [2, 3], "num_stages": 2, "layer_scale_init_value": 1.0}
VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
VIT |= {"patch_size": 8}
SEGFORMER = {"hidden_sizes": [8, 16], "depths": [2, 3], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
SEGFORMER |= {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
FOCAL = {"image_size": 32, "embed_dim": 8, "depths": [2, 3], "focal_levels": [1, 1], "focal_windows": [3, 3]}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "ResNetModel": ("ResNetConfig", RESNET, {"encoder.stages.0.layers": 2, "encoder.stages.1.layers": 2}),
    "ResNetForImageClassification": (
        "ResNetConfig",
        RESNET | {"layer_type": "bottleneck"},
        {"resnet.encoder.stages.0.layers": 2, "resnet.encoder.stages.1.layers": 2},
    ),
    "ResNetBackbone": (
        "ResNetConfig",
        RESNET | {"out_features": ["stage1", "stage2"]},
        {"encoder.stages.0.layers": 2, "encoder.stages.1.layers": 2},
    ),
    "ConvNextModel": ("ConvNextConfig", CONVNEXT, {"encoder.stages.0.layers": 2, "encoder.stages.1.layers": 3}),
    "ConvNextBackbone": (
        "ConvNextConfig",
        CONVNEXT | {"out_features": ["stage1", "stage2"]},
        {"encoder.stages.0.layers": 2, "encoder.stages.1.layers": 3},
    ),
    "ConvNextV2Model": (
        "ConvNextV2Config",
        CONVNEXT | {"depths": [3, 2]},
        {"encoder.stages.0.layers": 3, "encoder.stages.1.layers": 2},
    ),
    "ViTModel": ("ViTConfig", VIT, {"layers": 3}),
    "DeiTModel": ("DeiTConfig", VIT, {"layers": 3}),
    "BeitModel": ("BeitConfig", VIT, {"layers": 3}),
    "Dinov2Model": ("Dinov2Config", VIT, {"encoder.layer": 3}),
    "CLIPVisionModel": ("CLIPVisionConfig", VIT, {"encoder.layers": 3}),
    "SiglipVisionModel": ("SiglipVisionConfig", VIT, {"encoder.layers": 3}),
    "SegformerModel": ("SegformerConfig", SEGFORMER, {"stages.0.blocks": 2, "stages.1.blocks": 3}),
    "FocalNetModel": ("FocalNetConfig", FOCAL, {"encoder.stages.0.layers": 2, "encoder.stages.1.layers": 3}),
}


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config, settings, _ = HUGGING_FACE[name]
    torch.manual_seed(2)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    found = net(x)
    maps = found.feature_maps if "feature_maps" in found else found[:1]
    return list(maps)


def pulled(net: nn.Module) -> dict[str, Tensor]:
    """Gradients of a network's own parameters."""
    torch.stack([y.square().mean() for y in outputs(net, IMAGES.double())]).sum().backward()
    return {n: p.grad for n, p in net.named_parameters() if ".shortcut." not in f".{n}" and p.grad is not None}


@pytest.mark.long
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_networks_of_transformers_start_as_their_host_train_and_are_given_back(name):
    net = hugging_face(name)
    before, expected = snapshot(net), outputs(net, IMAGES)
    assert {stage.name: stage.depth for stage in ds.plan(net).stages} == HUGGING_FACE[name][2]
    exact = outputs(copy.deepcopy(net).double(), IMAGES.double())
    gradients = pulled(copy.deepcopy(net).double())
    ds.plug_in(net, keep_identity=True)
    for actual, wanted in zip(outputs(net, IMAGES), expected, strict=True):
        assert_close(actual, wanted.double(), 1e-5, "output")
    for actual, wanted in zip(outputs(copy.deepcopy(net).double(), IMAGES.double()), exact, strict=True):
        assert torch.equal(actual, wanted)
    assert_all_close(pulled(copy.deepcopy(net).double()), gradients, 1e-9)
    torch.stack([y.square().mean() for y in outputs(net, IMAGES)]).sum().backward()
    assert all(p.grad.abs().max() > 0 for _, p in ds.shortcut_parameters(net))
    ds.unplug(net.zero_grad() or net)
    assert_same(before, snapshot(net))
    assert all(torch.equal(a, b) for a, b in zip(outputs(net, IMAGES), expected, strict=True))


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "ConvNextBackbone"])
def test_save_pretrained_keeps_the_shortcuts_which_plugging_and_ds_load_bring_back(name, tmp_path):
    """from_pretrained alone builds the host, and leaves the shortcut weights out."""
    net = shake(ds.plug_in(hugging_face(name)))
    net.save_pretrained(tmp_path)
    host = type(net).from_pretrained(tmp_path).eval()
    assert not ds.dense_stages(host)
    plugged = ds.load(ds.plug_in(host), tmp_path / "model.safetensors") or host
    plugged = host
    for actual, wanted in zip(outputs(plugged, IMAGES), outputs(net, IMAGES), strict=True):
        assert torch.equal(actual, wanted)


# PEFT -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "targets"), [(resnet, r".*conv[12]"), (convnext, r".*mlp\.fc[12]"), (vit, r".*(qkv|fc1)")]
)
@pytest.mark.filterwarnings("ignore")
def test_lora_on_a_plugged_network_trains_its_shortcuts_too_and_merges(make, targets):
    peft = pytest.importorskip("peft")
    net = shake(ds.plug_in(make())).eval()
    expected, shortcuts = net(IMAGES), {name for name, _ in ds.shortcut_parameters(net)}
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["shortcut"])
    tuned = peft.get_peft_model(copy.deepcopy(net), config)
    assert_close(tuned(IMAGES), expected.double(), 1e-5, "output at the start of LoRA")
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    kinds = {"lora" if ".lora_" in name else "shortcut" if ".shortcut." in name else name for name in trained}
    assert kinds == {"lora", "shortcut"}
    assert sum(".shortcut." in name for name in trained) == len(shortcuts)
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(IMAGES).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    wanted = tuned(IMAGES)
    assert not torch.allclose(wanted, expected)
    merged = tuned.merge_and_unload()
    assert {name for name, _ in ds.shortcut_parameters(merged)} == shortcuts
    assert_close(merged(IMAGES), wanted.double(), 1e-4, "merged")


# Lightning ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_trains_a_plugged_network(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ds.plug_in(convnext())

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(ds.param_groups(self.net, lr=0.1))

    module = Module()
    start = {name: p.detach().clone() for name, p in ds.shortcut_parameters(module)}
    data = torch.utils.data.TensorDataset(IMAGES, torch.tensor([0, 1]))
    trainer = lightning.Trainer(
        fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    assert all(not torch.equal(p, start[name]) for name, p in ds.shortcut_parameters(module))


# Compiler, export, quantisation, copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pytest.param(convnext, marks=pytest.mark.long), vit])
def test_a_traced_network_is_one_graph_for_the_compiler_in_training_and_evaluation(make):
    torch._dynamo.reset()
    net = shake(ds.plug_in(make()))
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for train in (True, False):
        actual = gradients(compiled.train(train))
        actual = {name.removeprefix("_orig_mod."): value for name, value in actual.items()}
        assert_all_close(actual, gradients(net.train(train)), 1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [convnext, vit])
def test_a_traced_network_is_exported(make, fused):
    net = shake(ds.plug_in(make())).eval()
    net = ds.fuse(net) if fused else net
    with torch.no_grad():
        exported = torch.export.export(net, (IMAGES,))
        assert_close(exported.module()(IMAGES), net(IMAGES).double(), 1e-5, "output")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantises_a_fused_network_to_int8(kind):
    quantization = pytest.importorskip("torchao.quantization")
    net = ds.fuse(shake(ds.plug_in(vit())).eval())
    expected = net(IMAGES)
    quantised = copy.deepcopy(net)
    quantization.quantize_(quantised, getattr(quantization, kind)())
    assert type(quantised.blocks[0].mlp.fc1.weight) is not type(net.blocks[0].mlp.fc1.weight)
    actual = quantised(IMAGES)
    assert not torch.equal(actual, expected)
    assert (actual - expected).norm() < 0.05 * expected.norm()


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("make", [convnext, vit])
def test_a_copy_of_a_traced_network_gives_the_same_numbers_and_shares_nothing(make, how):
    net = shake(ds.plug_in(make()))
    twin = how(net)
    assert_all_close(gradients(twin), gradients(net), 0.0)
    own = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() not in own for p in twin.parameters())
    assert type(ds.unplug(twin)) is type(net) and ds.dense_stages(net)


# Activation checkpointing ---------------------------------------------------------------------------------------------


def of_timm(name: str) -> Callable[..., nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return timm.create_model(name, num_classes=3)

    return make


@pytest.mark.parametrize(
    "make",
    [resnet, convnext, vit, of_timm("mobilenetv3_small_050"), of_timm("regnetx_002")],
    ids=["resnet", "convnext", "vit", "mobilenetv3", "regnet"],
)
def test_timms_switch_for_checkpointing_recomputes_and_keeps_every_gradient(make):
    net = shake(ds.plug_in(make()))
    twin, passes = copy.deepcopy(net), []
    twin.set_grad_checkpointing(True)
    inside = next(m for n, m in twin.named_modules() if any(n.startswith(f"{s}.") for s in ds.dense_stages(twin)))
    layer = next(m for m in inside.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    layer.register_forward_hook(lambda *_: passes.append(1))
    actual = gradients(twin)
    assert len(passes) == 2
    assert_all_close(actual, gradients(net), 1e-5)
    for place, stage in ds.dense_stages(net).items():  # what is not plugged in counts a batch twice, as in the host
        for segment in stage.segments:
            for n in range(segment.first, segment.stop):
                again = ds.dense_stages(twin)[place][n]
                for (name, value), other in zip(stage[n].named_buffers(), again.buffers(), strict=True):
                    assert_close(other, value.double(), 1e-6, name)


@pytest.mark.parametrize("make", [convnext, vit])
def test_the_steps_of_a_traced_stage_are_checkpointed_by_hand(make):
    net = shake(ds.plug_in(make()))
    (stage, *_), passes = ds.dense_stages(net).values(), []
    x = torch.randn(2, 8, 6, 5) if make is convnext else torch.randn(2, 6, 24)

    def go(call: Callable) -> dict[str, Tensor]:
        stage.zero_grad()
        state = x
        for step in stage:
            state = call(step, state)
        state.square().sum().backward()
        return {name: p.grad.clone() for name, p in stage.named_parameters()}

    expected = go(lambda step, state: step(state))
    next(m for m in stage[0].modules() if isinstance(m, nn.LayerNorm)).register_forward_hook(
        lambda *_: passes.append(1)
    )
    actual = go(lambda step, state: checkpoint(step, state, use_reentrant=False))
    assert len(passes) == 2
    assert_all_close(actual, expected, 1e-6)


# torchvision ----------------------------------------------------------------------------------------------------------


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    torch.manual_seed(1)
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], layer_scale=1.0, num_classes=3)


CUT = {
    "resnet": (lambda: torchvision.models.resnet18(num_classes=3), {"layer1": "a", "layer2.0": "b", "layer3": "c"}),
    "convnext": (
        torchvision_convnext,
        {"features.1.0": "d", "features.1": "a", "features.3.0": "b", "features.3": "c"},
    ),
    "vit, tokens along one axis": (
        lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=3),
        {"encoder.layers.encoder_layer_1": "a", "encoder.layers.encoder_layer_2": "b", "encoder.ln": "c"},
    ),
    "swin, tokens along two axes": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 3], [2, 2], [4, 4], num_classes=3),
        {"features.1.0": "d", "features.1": "a", "features.3.1": "b", "features.3": "c"},
    ),
}


@pytest.mark.parametrize("network", CUT)
def test_torchvisions_feature_extractor_cuts_a_plugged_network(network):
    make, names = CUT[network]
    net, seen = shake(ds.plug_in(make())).eval(), {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda m, a, out, key=key: seen.__setitem__(key, out))
        for name, key in names.items()
    ]
    with torch.no_grad():
        net(IMAGES)
        for hook in hooks:
            hook.remove()
        maps = create_feature_extractor(net, names)(IMAGES)
    assert list(maps) == list(names.values())
    for key, value in maps.items():
        assert_close(value, seen[key].double(), 1e-5, key)


# Processes ------------------------------------------------------------------------------------------------------------


def step_of(net: nn.Module, x: Tensor, share: float) -> Tensor:
    """The loss after a step, summed over the samples of this process."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    (net(x).square().sum() * share).backward()
    optimizer.step()
    return net(x).square().sum().detach()


def one_rank(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    x, losses = IMAGES.double()[rank : rank + 1], {}
    for make in (convnext, vit):
        for how in ("ddp", "fsdp"):
            net = shake(ds.plug_in(make(), norm="layer")).double()
            if how == "ddp":
                net = nn.parallel.DistributedDataParallel(net)
            else:
                for stage in ds.dense_stages(net).values():
                    fully_shard(stage, mesh=mesh)
                fully_shard(net, mesh=mesh)
            losses[f"{make.__name__} {how}"] = step_of(net, x, 1.0)
    for loss in losses.values():
        dist.all_reduce(loss)
    torch.save(losses, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_ddp_and_fsdp_take_the_step_of_one_process(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)  # a fork could not run autograd, whose threads may exist here
    losses = torch.load(tmp_path / "0.pt", weights_only=True)
    assert len(losses) == 4
    for make in (convnext, vit):
        net = shake(ds.plug_in(make(), norm="layer")).double()
        before = net(IMAGES.double()).square().sum().item()
        expected = step_of(net, IMAGES.double(), 0.5).item()  # both wrappers average over processes
        assert abs(expected - before) > 1e-3 * before
        for how in ("ddp", "fsdp"):
            assert losses[f"{make.__name__} {how}"].item() == pytest.approx(expected, rel=1e-9)
