"""Checks a plugged network for faults seen in hand-written dense shortcuts: weights that never train."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..nn.inner_shortcut import InnerShortcut
from ..nn.shortcut import DenseShortcut
from ..nn.stage import DenseStage
from ..nn.weighting import start_parameter
from .plug import dense_stages, shortcut_parameters


def check(model: nn.Module, input_size: tuple[int, int, int] = (3, 64, 64), at_start: bool = False) -> list[str]:
    """The faults of a plugged network, one sentence each; an empty list if there are none.

    A copy of the network runs two training passes on random images; `model` itself is neither run nor changed. Checked
    are: every shortcut weight is a registered parameter, is in the state dict and gets a gradient; every parameter is
    used; every parameter and module in use is registered, and not created anew at each call.

    Args:
        model: a network, plugged in or written by hand.
        input_size: (C, H, W) of the random images.
        at_start: also compare every shortcut weight with its initial value, for a network that is not trained yet.
    """
    stages = dense_stages(model)
    faults = [] if stages else ["the network has no dense stage: call dense_shortcuts.plug_in(model) first"]
    for name, stage in stages.items():
        faults += _static_faults(name, stage, at_start)
    with torch.random.fork_rng():  # drop path draws random numbers; the caller's generator stays unchanged
        return faults + _dynamic_faults(copy.deepcopy(model), input_size)


def _static_faults(name: str, stage: DenseStage, at_start: bool) -> list[str]:
    faults, prefix = [], f"{name}." if name else ""
    for block_name, block in stage.named_children():
        inner = getattr(block, "inner", None)
        if isinstance(inner, InnerShortcut):
            start = torch.full_like(inner.weight, inner.start)
            faults += _weight_faults(f"{prefix}{block_name}.inner.weight", inner.weight, start if at_start else None)
    for segment, shortcut in stage.shortcuts.items():
        faults += _shortcut_faults(f"{prefix}{segment.shortcut}.weights", shortcut, at_start)
    return faults


def _shortcut_faults(where: str, shortcut: DenseShortcut, at_start: bool) -> list[str]:
    if not shortcut.weighted:
        return []
    if not isinstance(shortcut.weights, nn.ParameterList):
        kind = type(shortcut.weights).__name__
        return [f"{where} is a {kind}, not registered, so it never trains: use nn.ParameterList"]
    faults = []
    summing = [maps for maps in shortcut.sources if maps]
    if len(shortcut.weights) != len(summing):
        faults.append(
            f"{where} has {len(shortcut.weights)} weights for {len(summing)} blocks: plug the network in again"
        )
    for k, (weight, maps) in enumerate(zip(shortcut.weights, summing, strict=False)):
        start = start_parameter(shortcut.weighting, shortcut.init, len(maps), shortcut.channels)
        faults += _weight_faults(f"{where}.{k}", weight, start if at_start else None)
    return faults


def _weight_faults(name: str, weight: Tensor, start: Tensor | None) -> list[str]:
    faults = [] if weight.requires_grad else [f"{name} is frozen: call requires_grad_() on it"]
    if start is not None and not torch.equal(weight.detach().cpu(), start.to(weight.dtype).cpu()):
        faults.append(f"{name} differs from its initial value: plug the network in again")
    return faults


@dataclass
class _Trace:
    """What one training pass used."""

    leaves: dict[int, Tensor] = field(default_factory=dict)
    leaf_owner: dict[int, str] = field(default_factory=dict)
    strangers: dict[int, nn.Module] = field(default_factory=dict)
    stranger_owner: dict[int, str] = field(default_factory=dict)


def _dynamic_faults(model: nn.Module, input_size: tuple[int, int, int]) -> list[str]:
    model.train().zero_grad(set_to_none=True)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *input_size, generator=generator).to(like.device, like.dtype)
    before = dict(model.named_parameters())
    first, second = _trace(model, x), _trace(model, x)
    after = dict(model.named_parameters())

    faults = [
        f"{name} is built anew at each forward call, so it never trains: build it once in __init__"
        for name, parameter in after.items()
        if before.get(name) is not parameter
    ]
    faults += _unregistered_faults(first, second, {id(p) for p in (*before.values(), *after.values())})
    faults += [
        f"{name} is an unused parameter: remove it, or DistributedDataParallel will wait for its gradient"
        for name, parameter in after.items()
        if parameter.requires_grad and id(parameter) not in second.leaves and before.get(name) is parameter
    ]
    keys = model.state_dict(keep_vars=True)
    for name, parameter in shortcut_parameters(model):
        if keys.get(name) is not parameter:
            faults.append(f"{name} is not in the state dict: register it as a parameter")
        if id(parameter) in second.leaves and (parameter.grad is None or not parameter.grad.isfinite().all()):
            faults.append(f"{name} gets no finite gradient: look at what follows it")
    return faults


def _unregistered_faults(first: _Trace, second: _Trace, registered: set[int]) -> list[str]:
    faults = []
    for key, module in second.strangers.items():
        what = f"a {type(module).__name__} called in {second.stranger_owner[key]}"
        if key in first.strangers:
            faults.append(
                f"{what} is not registered, so it never trains: assign it as an attribute, not in a plain list"
            )
        else:
            faults.append(f"{what} is built anew at each forward call, so it never trains: build it once in __init__")
    inside_strangers = {id(p) for m in second.strangers.values() for p in m.parameters()}
    for key, leaf in second.leaves.items():
        if key in registered or key in inside_strangers:
            continue
        what = f"a tensor of shape {tuple(leaf.shape)} used in {second.leaf_owner[key]}"
        if key in first.leaves:
            faults.append(
                f"{what} is not a registered parameter, so it never trains: use nn.Parameter, not a plain list"
            )
        else:
            faults.append(f"{what} is built anew at each forward call, so it never trains: build it once in __init__")
    return faults


def _trace(model: nn.Module, x: Tensor) -> _Trace:
    """Run a forward and backward pass, and record the modules it called and the leaves its graph reached."""
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    trace, stack = _Trace(), [type(model).__name__]

    def enter(module: nn.Module, _: Any) -> None:
        name = names.get(id(module))
        if name is None:
            trace.strangers[id(module)] = module
            trace.stranger_owner.setdefault(id(module), stack[-1])
        stack.append(name or stack[-1])

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        owner = stack.pop()
        for leaf in _leaves(_tensors(output)):
            trace.leaf_owner.setdefault(id(leaf), owner)
            trace.leaves[id(leaf)] = leaf

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        outputs = list(_tensors(model(x)))
    finally:
        for hook in hooks:
            hook.remove()
    torch.stack([output.float().sum() for output in outputs]).sum().backward()
    return trace


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every leaf tensor to which a backward pass from the outputs would write a gradient."""
    todo, seen = [output.grad_fn for output in outputs], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo.extend(next_node for next_node, _ in node.next_functions)
