"""Class activation maps by the `grad-cam` package, with the layer from timm and nothing left behind in the network."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DenseShortcutError
from ...extras import need
from ...nn.stage import DenseStage
from .layout import Layout, find_layout

Hook = Callable[[nn.Module, Any, Tensor], Tensor]

# What a user says -> the class of `pytorch_grad_cam`.
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "elementwise": "GradCAMElementWise",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "shapleycam": "ShapleyCAM",
    "finercam": "FinerCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "kpcacam": "KPCA_CAM",
    "fem": "FEM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
    "fullgrad": "FullGrad",
    "randomcam": "RandomCAM",
}


def methods(asked: str) -> tuple[str, ...]:
    """The methods of a comma-separated list; "all" is every one.

    Raises:
        DenseShortcutError: unknown name.
    """
    names = tuple(METHODS) if asked == "all" else tuple(name.strip().lower() for name in asked.split(","))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise DenseShortcutError(f"unknown method {unknown[0]!r}: choose of {', '.join(METHODS)}, or all.")
    return names


def find_layer(model: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """A layer with its name: the one asked for, else where timm's `feature_info` says that the last stage ends.

    Where a class token alone is classified, the last block's patches have no part in the score: then it is the norm
    that this block begins with.

    Raises:
        DenseShortcutError: no such layer, or no `feature_info` to go by.
    """
    if name is None:
        info = getattr(model, "feature_info", None)
        if not info:
            raise DenseShortcutError(
                f"{type(model).__name__} has no feature_info to find its last stage by: name a layer."
            )
        name = info[-1]["module"]
        if getattr(model, "global_pool", None) == "token" and f"{name}.norm1" in dict(model.named_modules()):
            name = f"{name}.norm1"
    modules = dict(model.named_modules())
    if not name or name not in modules:
        near = [known for known in modules if known and known.count(".") == 0]
        raise DenseShortcutError(f"there is no layer {name!r}: take one of {', '.join(near)}, or one inside them.")
    return name, modules[name]


def cam_maps(
    model: nn.Module, images: Tensor, targets: Sequence[int], method: str = "gradcam", layer: str | None = None
) -> np.ndarray:
    """Where each image speaks for its class: maps in [0, 1], (N, H, W) as large as the images.

    The network's mode, its parameters' `requires_grad` and `grad` are afterwards as they were, and no hook stays.

    Args:
        model: a network that gives class scores (N, K).
        images: normalised, (N, 3, H, W).
        targets: a class for each image.
        method: a key of METHODS.
        layer: name of the module whose output is looked at; None is timm's last stage. Its channels may be the second
            axis or the last (`layout.py`). FullGrad looks at every bias.

    Raises:
        DenseShortcutError: unknown method or layer, a layer whose output is no feature map or has one place only,
            grad-cam not installed.
    """
    methods(method)
    name, module = find_layer(model, layer)
    above = name.rpartition(".")[0]
    parent = model.get_submodule(above)
    contexts = parent.contexts() if isinstance(parent, DenseStage) else []
    if method == "ablationcam" and any(c.block is module and c.shortcut is not None for c in contexts):
        raise DenseShortcutError(
            f"ablationcam takes a layer out, and {name} is a block that shares its maps with others: "
            f"take {above or 'another layer'}."
        )
    # ShapleyCAM alone differentiates the gradient, which depends on nothing but the last weights in a linear head.
    with _as_it_was(model, frozen=method != "shapleycam"), contextlib.ExitStack() as stack:
        if method == "fullgrad":
            camera = _camera(METHODS[method])(model, [])
            for hooked in camera.target_layers:
                _hook(stack, hooked, _copy)
        else:
            layout = find_layout(model, name, images)
            before, after = _in_maps(layout)
            _hook(stack, module, before)
            camera = _camera(METHODS[method], layout.channels_last)(model, [module])
            _hook(stack, module, after)
        base = getattr(camera, "base_cam", camera)
        stack.callback(base.activations_and_grads.release)
        inputs = images.detach().requires_grad_()
        if method == "finercam":  # chooses the rival classes itself, for one class at a time
            pairs = zip(inputs.split(1), targets, strict=True)
            return np.concatenate([camera(image, None, target_idx=target) for image, target in pairs])
        return camera(inputs, [_Score(target) for target in targets])


def _hook(stack: contextlib.ExitStack, module: nn.Module, hook: Hook) -> None:
    stack.callback(module.register_forward_hook(hook).remove)


def _copy(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """What follows gets a copy, so that no later step in place changes what grad-cam's hooks saw."""
    return output.clone()


def _in_maps(layout: Layout) -> tuple[Hook, Hook]:
    """Hooks before and after those of grad-cam, which take channels to be the second axis; what follows gets a copy."""
    outputs: list[Tensor] = []

    def before(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output)
        maps = layout.maps(output).clone()
        if maps.requires_grad:
            maps.register_hook(torch.clone)  # grad-cam detaches in place what it has kept, which a view forbids
        return maps

    def after(_module: nn.Module, _inputs: Any, maps: Tensor) -> Tensor:
        return layout.output(maps, outputs.pop()).clone()

    return before, after


class _Score:
    """The score of a class, as grad-cam's targets are: a callable on an image's output, (K,)."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.target]


def _camera(name: str, channels_last: bool = False) -> Any:
    need("a class activation map", "explain")
    import pytorch_grad_cam

    made = getattr(pytorch_grad_cam, name)
    if name == "AblationCAM":  # whose default layer is one for all, and would keep the last maps
        from functools import partial

        ablation = pytorch_grad_cam.ablation_layer
        layer = ablation.AblationLayerVit() if channels_last else ablation.AblationLayer()
        return partial(made, ablation_layer=layer)
    return made


@contextlib.contextmanager
def _as_it_was(model: nn.Module, *, frozen: bool) -> Iterator[None]:
    """Evaluation mode inside, parameters that ask for no gradient where `frozen`; afterwards all is as before.

    Children that are None are plain attributes meanwhile, for grad-cam walks into every child; and the child that
    AblationCAM puts in a layer's place goes again even where it fails.
    """
    modes = {module: module.training for module in model.modules()}
    children = {module: dict(module._modules) for module in model.modules()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    try:
        for module, named in children.items():
            for name in [name for name, child in named.items() if child is None]:
                del module._modules[name]
                vars(module)[name] = None
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter.requires_grad and not frozen)
        with torch.enable_grad():
            yield
    finally:
        for module, named in children.items():
            for name in named.keys() & vars(module).keys():
                del vars(module)[name]
            module._modules.clear()
            module._modules.update(named)
            module.training = modes[module]
        for parameter, asked, grad in before:
            parameter.requires_grad_(asked)
            parameter.grad = grad
