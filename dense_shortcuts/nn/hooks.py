"""Detects hooks that can observe a module's output: those of all modules, of one, and of those in it."""

from torch import nn
from torch.nn.modules import module as _module

_GLOBAL = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def observed(module: nn.Module) -> bool:
    """Whether a hook may look at the module's output or its gradient.

    Such an output must be a tensor to which all later gradients come; where X_l and its moments are made in one pass
    they do not all come to X_l (`ops/autograd.py`).
    """
    return any(_GLOBAL) or has_own_hooks(module)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a hook was registered on the module itself, or its forward pass was replaced, as Accelerate does."""
    return any(getattr(module, name) for name in _OWN) or "forward" in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook may look at the output of the module or of one in it."""
    return any(_GLOBAL) or any(map(has_own_hooks, module.modules()))
