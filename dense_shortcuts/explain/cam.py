"""Class activation maps by the `grad-cam` package, with the layer from timm and nothing left behind in the network."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DenseShortcutError
from ..stage import DenseStage

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
        layer: name of the module whose output is looked at; None is timm's last stage. FullGrad looks at every bias.

    Raises:
        DenseShortcutError: unknown method or layer, a layer whose output is no feature map or has one place only,
            grad-cam not installed.
    """
    methods(method)
    name, module = find_layer(model, layer)
    parent = model.get_submodule(name.rpartition(".")[0])
    if method == "ablationcam" and isinstance(parent, DenseStage):
        raise DenseShortcutError(
            f"ablationcam takes a layer out, and {name} is a block that shares its maps with others: take {name[:-2]}."
        )
    # ShapleyCAM alone differentiates the gradient, which depends on nothing but the last weights in a linear head.
    with _as_it_was(model, frozen=method != "shapleycam"), contextlib.ExitStack() as stack:
        make = _camera(METHODS[method])
        camera = make(model, [] if method == "fullgrad" else [module])
        base = getattr(camera, "base_cam", camera)
        stack.callback(base.activations_and_grads.release)
        for hooked in base.target_layers:
            # After grad-cam's hooks: what follows gets a copy, so that no later step in place changes what they saw.
            hook = hooked.register_forward_hook(lambda _, __, output: _checked(output, name).clone())
            stack.callback(hook.remove)
        inputs = images.detach().requires_grad_()
        if method == "finercam":  # chooses the rival classes itself, for one class at a time
            pairs = zip(inputs.split(1), targets, strict=True)
            return np.concatenate([camera(image, None, target_idx=target) for image, target in pairs])
        return camera(inputs, [_Score(target) for target in targets])


class _Score:
    """The score of a class, as grad-cam's targets are: a callable on an image's output, (K,)."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.target]


def _camera(name: str) -> Any:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise DenseShortcutError(
            "class activation maps need grad-cam: pip install 'dense-shortcuts[explain]'."
        ) from error
    made = getattr(pytorch_grad_cam, name)
    if name == "AblationCAM":  # whose default layer is one for all, and would keep the last maps
        from functools import partial

        return partial(made, ablation_layer=pytorch_grad_cam.AblationLayer())
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


def _checked(output: Any, layer: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 4:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DenseShortcutError(f"{layer} gives no feature map (N, C, H, W) but {shape}: choose another layer.")
    if output.shape[-1] * output.shape[-2] == 1:
        raise DenseShortcutError(f"{layer} gives maps of one place only for such images: choose an earlier layer.")
    return output
