"""Class activation maps against gradients computed without grad-cam and without hooks' help from the fused operator."""

import gc

import numpy as np
import pytest
import pytorch_grad_cam
import timm
import torch
from pytorch_grad_cam.utils.image import scale_cam_image
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.explain.cam import METHODS, cam_maps, find_layer, methods
from dense_shortcuts.ops.backend import unusable

CPU_BACKENDS = ("plain", "native")
# The last stage, a block amid a stage, its first block, a norm whose pass is else joined with the sum, an activation.
LAYERS = ("layer3", "layer2.1", "layer3.0", "layer2.1.bn2", "layer3.2.act2", "layer2")


def needs(backend: str, dtype: torch.dtype = torch.float64) -> None:
    fault = unusable(backend, "cpu", dtype)
    if fault is not None:
        pytest.skip(f"no {backend} back end here: {fault}")


def scored(model: nn.Module, images: Tensor, targets: list[int], layer: str, delta: Tensor | float) -> tuple:
    """The sum of the targets' scores with `delta` added to the layer's output, and that output."""
    kept = []

    def add(module, inputs, output):
        kept.append(output.detach().clone())
        return output + delta

    handle = model.get_submodule(layer).register_forward_hook(add)
    output = model(images)
    handle.remove()
    return output[torch.arange(len(images)), torch.tensor(targets)].sum(), kept[0]


def captured(model: nn.Module, images: Tensor, targets: list[int], layer: str) -> tuple[Tensor, Tensor]:
    """A layer's output and the complete gradient of the scores at it, by the equations in plain PyTorch."""
    for stage in ds.dense_stages(model).values():
        stage.shortcut.backend = "plain"
    with torch.no_grad():
        _, activation = scored(model, images, targets, layer, 0.0)
    delta = torch.zeros_like(activation, requires_grad=True)
    score, _ = scored(model, images, targets, layer, delta)
    (gradient,) = torch.autograd.grad(score, delta)
    return activation, gradient


@pytest.fixture
def spied(monkeypatch) -> list:
    """What grad-cam gave to Grad-CAM: (activations, gradients) of every call."""
    calls: list = []
    original = pytorch_grad_cam.GradCAM.get_cam_weights

    def spy(self, input_tensor, target_layer, target_category, activations, grads):
        calls.append((activations.copy(), grads.copy()))
        return original(self, input_tensor, target_layer, target_category, activations, grads)

    monkeypatch.setattr(pytorch_grad_cam.GradCAM, "get_cam_weights", spy)
    return calls


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_grad_cam_sees_activation_and_complete_gradient_of_a_plugged_network(tiny_dsnet, spied, backend, layer, norm):
    needs(backend)
    images, targets = torch.randn(2, 3, 16, 16, dtype=torch.float64), [1, 4]
    maps = cam_maps(tiny_dsnet(torch.float64, norm=norm, backend=backend), images, targets, "gradcam", layer)

    activation, gradient = captured(tiny_dsnet(torch.float64, norm=norm), images, targets, layer)
    (seen_activation, seen_gradient), *others = spied
    assert others == []
    np.testing.assert_allclose(seen_activation, activation, rtol=0, atol=1e-11)
    np.testing.assert_allclose(seen_gradient, gradient, rtol=0, atol=1e-11)
    assert gradient.abs().max() > 1e-6
    weighted = (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()
    np.testing.assert_allclose(maps, scale_cam_image(scale_cam_image(weighted.numpy(), (16, 16))), atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_gradient_that_grad_cam_sees_is_the_slope_of_the_score(tiny_dsnet, spied, backend):
    needs(backend)
    images, layer, step = torch.randn(1, 3, 16, 16, dtype=torch.float64), "layer2.1", 1e-5
    cam_maps(tiny_dsnet(torch.float64, backend=backend), images, [2], "gradcam", layer)
    ((activation, gradient),) = spied
    model = tiny_dsnet(torch.float64, backend="plain")
    for place in [(0, 0, 0, 0), (0, 3, 7, 5), (0, 7, 1, 2)]:
        delta = torch.zeros(activation.shape, dtype=torch.float64)
        delta[place] = step
        with torch.no_grad():
            scores = [scored(model, images, [2], layer, d)[0].item() for d in (delta, -delta)]
        assert gradient[place] == pytest.approx((scores[0] - scores[1]) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("layer", ["layer2.1.bn2", "layer2.1.act2", "layer2"])
def test_a_layer_that_the_host_overwrites_later_is_seen_as_it_came_out(tiny_host, spied, layer):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    cam_maps(tiny_host(dtype=torch.float64), images, [0, 3], "gradcam", layer)
    ((activation, gradient),) = spied
    expected = captured(tiny_host(dtype=torch.float64), images, [0, 3], layer)
    np.testing.assert_allclose(activation, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"inner": False, "aggregate": "block"}, {"keep_identity": True}])
def test_other_shortcuts_give_the_same_map_with_every_back_end(tiny_dsnet, options):
    images, targets = torch.randn(1, 3, 16, 16, dtype=torch.float64).expand(5, -1, -1, -1), [0, 1, 2, 3, 4]
    usable = [name for name in CPU_BACKENDS if unusable(name, "cpu", torch.float64) is None]
    maps = [
        cam_maps(tiny_dsnet(torch.float64, backend=b, **options), images, targets, layer="layer2.1") for b in usable
    ]
    assert len(maps) >= 2 and maps[0].max() > 0.99
    for found in maps[1:]:
        np.testing.assert_allclose(found, maps[0], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_map_and_leaves_the_network_as_it_was(tiny_dsnet, method):
    model = tiny_dsnet()
    model.train()
    model.layer1[0].eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, modes = dict(model.named_modules()), [module.training for module in model.modules()]

    maps = cam_maps(model, torch.randn(2, 3, 16, 16), [1, 2], method)

    assert maps.shape == (2, 16, 16) and maps.min() >= 0 and 0.9 < maps.max() <= 1
    assert not np.allclose(maps[0], maps[1])
    assert dict(model.named_modules()) == modules and [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("layer", ["layer3", "layer2.1"])
def test_second_derivatives_are_those_of_the_plain_form_or_refused(tiny_dsnet, backend, layer):
    needs(backend)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    found = cam_maps(tiny_dsnet(torch.float64, backend=backend), images, [2], "shapleycam", layer)
    plain = cam_maps(tiny_dsnet(torch.float64, backend="plain"), images, [2], "shapleycam", layer)
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_no_grad_around_a_call_does_not_matter(tiny_dsnet):
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        inside = cam_maps(tiny_dsnet(), images, [2])
    np.testing.assert_array_equal(inside, cam_maps(tiny_dsnet(), images, [2]))


class OneStage(nn.Module):
    """As little of a network as can be plugged in."""

    feature_info = ({"module": "stage"},)

    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 3))
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.stage(x).mean((2, 3)))


@pytest.mark.long
@pytest.mark.parametrize(("method", "images"), [("gradcam", 200), ("shapleycam", 60), ("fullgrad", 60)])
def test_memory_stays_flat_over_many_images_without_the_garbage_collector(method, images):
    model = ds.plug_in(OneStage()).eval()
    counts = []
    gc.collect()
    gc.disable()
    try:
        for number in range(images):
            cam_maps(model, torch.full((1, 3, 8, 8), number / 200), [number % 3], method)
            if number in (19, 59, 199):
                kinds = [type(o) for o in gc.get_objects()]
                own = sum(str(kind.__module__).startswith("dense_shortcuts") for kind in kinds)
                counts.append((own, sum(issubclass(kind, Tensor) for kind in kinds)))
    finally:
        gc.enable()
    # closures of torch.library's own bookkeeping wait for the collector; no tensor and nothing of this package does
    assert len(set(counts)) == 1


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"), [("dsnet20", "layer3"), ("resnet18", "layer4"), ("densenet121", "features.norm5")]
)
def test_the_layer_is_the_last_stage_of_feature_info(name, layer):
    model = timm.create_model(name)
    found, module = find_layer(model)
    assert found == layer and module is model.get_submodule(layer)


def test_a_named_layer_is_the_one_looked_at(tiny_dsnet, spied):
    model = tiny_dsnet()
    cam_maps(model, torch.randn(1, 3, 16, 16), [0], layer="layer1.1")
    cam_maps(model, torch.randn(1, 3, 16, 16), [0])
    assert [activation.shape[1:] for activation, _ in spied] == [(8, 16, 16), (16, 4, 4)]


def test_bad_layers_and_methods_are_refused_in_a_sentence(tiny_dsnet):
    model, images = tiny_dsnet(), torch.randn(1, 3, 16, 16)
    with pytest.raises(DenseShortcutError, match=r"no layer 'layer9'.*layer3"):
        cam_maps(model, images, [0], layer="layer9")
    with pytest.raises(DenseShortcutError, match="fc gives no feature map"):
        cam_maps(model, images, [0], layer="fc")
    with pytest.raises(DenseShortcutError, match="one place only"):
        cam_maps(model, torch.randn(1, 3, 4, 4), [0])
    with pytest.raises(DenseShortcutError, match="take layer2"):
        cam_maps(model, images, [0], "ablationcam", "layer2.1")
    with pytest.raises(DenseShortcutError, match="no feature_info"):
        cam_maps(nn.Sequential(nn.Conv2d(3, 4, 3)), images, [0])
    with pytest.raises(DenseShortcutError, match="unknown method 'grad'"):
        methods("gradcam,grad")
    assert not any(module._forward_hooks for module in model.modules())
    assert methods("all") == tuple(METHODS)


def test_an_error_in_the_network_reaches_the_caller(tiny_dsnet):
    with pytest.raises(IndexError):  # which grad-cam's own context manager would print and swallow
        cam_maps(tiny_dsnet(), torch.randn(1, 3, 16, 16), [77])
