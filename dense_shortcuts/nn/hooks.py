"""Detects hooks that can observe a module's output: global ones, its own, and those of its submodules."""

from torch import nn
from torch.nn.modules import module as _module

_GLOBAL = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def observed(module: nn.Module) -> bool:
    """Whether a hook may observe the module's output or the gradient of it.

    Such an output must be a tensor that receives its whole gradient. If X_l and its moments are made in one pass, some
    of the gradient bypasses X_l (`ops/autograd.py`).
    """
    return any(_GLOBAL) or has_own_hooks(module)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether the module itself has a hook, or a replaced forward pass, as Accelerate does it."""
    forward = module._forward_hooks or module._forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(forward or backward) or "forward" in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook may observe the output of the module or of one of its submodules."""
    return any(_GLOBAL) or any(map(has_own_hooks, module.modules()))
