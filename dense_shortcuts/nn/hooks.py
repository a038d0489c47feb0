"""Whether anybody looks at what a module gives: hooks of all modules, of one, and of those in it."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def observed(module: nn.Module) -> bool:
    """Whether a hook may look at the module's output or its gradient.

    Such an output must be a tensor to which all later gradients come; where X_l and its statistics are made in one pass
    they do not all come to X_l (`ops/fused.py`).
    """
    return any(GLOBAL_HOOKS) or has_own_hooks(module)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Where the hooks on the module itself are kept."""
    return [getattr(module, name) for name in HOOKS]  # an `attrgetter` breaks the compiler's graph


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a hook was registered on the module itself, or its forward pass was replaced, as Accelerate does."""
    return any(hooks_of(module)) or "forward" in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook may look at the output of the module or of one in it."""
    if any(GLOBAL_HOOKS):
        return True
    inside = [module]
    for one in inside:  # grows as it goes
        if has_own_hooks(one):
            return True
        inside += [child for child in one._modules.values() if child is not None]
    return False


def saves_elsewhere() -> bool:
    """Whether what autograd saves goes through hooks, as under activation checkpointing and `save_on_cpu`."""
    return bool(_saved_tensors_hooks(True) is not None)


_saved_tensors_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
