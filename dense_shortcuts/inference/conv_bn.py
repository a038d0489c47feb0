"""Finds batch norms that directly take the output of a convolution, and can be folded into it.

The order and names of modules do not show that, but execution does: every forward pass is traced by torch.fx, one
module at a time, with its children as leaves. A forward pass that cannot be traced, or could take another path in
another call, is unknown. Written adapters declare the pairs of their blocks (`DenseBlock.conv_norms`).
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..adapters import DenseBlock, host_of, read
from ..adapters.tracing.traced import TracedBlock, view
from ..nn.hooks import observed
from ..nn.stage import DenseStage


@dataclass
class Seen:
    """What the forward passes of a network were observed to do.

    Attributes:
        pairs: names of each convolution and of the batch norm that is the only user of its output.
        calls: how often a module is called in one pass of its owner, the module that calls it.
        owners: how many modules have a module as their child.
        read: modules whose parameters or buffers are also used without a call.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    owners: Counter[nn.Module] = field(default_factory=Counter)
    read: set[nn.Module] = field(default_factory=set)

    def is_own(self, module: nn.Module) -> bool:
        """Whether a module is called once, has one owner, and is neither read nor hooked."""
        once = self.calls[module] == 1 and self.owners[module] == 1 and module not in self.read
        return once and is_bare(module)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Record that a module took the place of another."""
        self.calls[new], self.owners[new] = self.calls[old], self.owners[old]


def is_bare(module: nn.Module) -> bool:
    """Whether a module has no hooks of any kind, and the forward pass of its class."""
    return "forward" not in vars(module) and not any(v for n, v in vars(module).items() if n.endswith("_hooks"))


def watch(model: nn.Module) -> Seen:
    """Observe what a plugged network does in evaluation mode."""
    seen = Seen(owners=Counter(child for owner in model.modules() for child in owner._modules.values() if child))
    todo = [("", False), *_in_stages(model, seen)]
    done = set()
    for name, alone in todo:  # grows as it goes
        owner = model.get_submodule(name)
        if owner not in done:
            done.add(owner)
            todo += _watch_owner(owner, f"{name}." if name else "", alone, seen)
    return seen


def _in_stages(model: nn.Module, seen: Seen) -> list[tuple[str, bool]]:
    """Names of modules that a dense stage calls as a whole; pairs declared by written adapters are recorded."""
    found = []
    for prefix, stage in model.named_modules():
        if not isinstance(stage, DenseStage):
            continue
        inside = {n for segment in stage.segments for n in range(segment.first, segment.stop)}
        for n, (name, block) in enumerate(zip(stage.block_names, stage.blocks, strict=True)):
            name = f"{prefix}.{name}".lstrip(".")
            if isinstance(block, DenseBlock):
                _note_written(block, name, seen)
                if (
                    type(block).project is DenseBlock.project
                    and type(getattr(block, "downsample", None)) is nn.Sequential
                ):
                    found.append((f"{name}.downsample", True))
            elif n in inside or type(stage) is DenseStage:
                found.append((name, False))
    return found


def _note_written(block: Any, name: str, seen: Seen) -> None:
    pairs = read(block).conv_norms()
    for layer in dict.fromkeys(layer for pair in pairs for layer in pair):
        seen.calls[block.get_submodule(layer)] += 1
    seen.pairs += [(f"{name}.{conv}", f"{name}.{norm}") for conv, norm in pairs]


def _watch_owner(owner: nn.Module, prefix: str, alone: bool, seen: Seen) -> list[tuple[str, bool]]:
    """Record what the forward pass of a module does; returns the modules it calls whose forward pass is to be traced.

    `alone`: whether the module is known to be called with its input only.
    """
    graph = _graph(owner, alone)
    if graph is None:
        return []
    following: dict[str, bool] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr":
            seen.read.add(owner.get_submodule(name.rpartition(".")[0]))
        if node.op != "call_module":
            continue
        called = owner.get_submodule(name)
        seen.calls[called] += 1
        if _has_path_of_its_own(called):
            following[prefix + name] = following.get(prefix + name, True) and _takes_input_alone(node)
        if type(called) is nn.BatchNorm2d and (conv := _conv_before(owner, node)) is not None:
            seen.pairs.append((prefix + conv, prefix + name))
    return [(name, alone) for name, alone in following.items() if alone]


def _has_path_of_its_own(module: nn.Module) -> bool:
    """Whether a module's forward pass is host code, not that of PyTorch or of a dense stage, which are known."""
    if isinstance(module, DenseStage | DenseBlock | TracedBlock | torch.jit.ScriptModule):
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn.")


def _takes_input_alone(node: Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs


def _conv_before(owner: nn.Module, norm: Node) -> str | None:
    """Name of the convolution whose output this norm takes, as its only user."""
    before = norm.args[0] if _takes_input_alone(norm) else None
    if not isinstance(before, Node) or before.op != "call_module" or len(before.users) != 1:
        return None
    name = str(before.target)
    return name if type(owner.get_submodule(name)) is nn.Conv2d else None


def _graph(owner: nn.Module, alone: bool) -> Graph | None:
    """The graph of a module's forward pass in its mode; None if that is not known for every call."""
    host: Any = host_of(read(owner)) if isinstance(owner, TracedBlock) else type(owner)
    others = list(inspect.signature(host.forward).parameters.values())[2:]
    if "forward" in vars(owner) or (others and not alone):
        return None
    stand_in = view(owner, host)  # a forward pass may set attributes
    stand_in.__dict__["_buffers"] = dict(owner._buffers)
    try:
        with torch.random.fork_rng(devices=[]):
            return _Tracer().trace(stand_in, concrete_args={p.name: p.default for p in others})
    except Exception:  # host code may raise anything on a stand-in; it cannot be traced
        return None


class _Value(torch.fx.Proxy):
    """A traced value. Code that checks for tensors with isinstance takes the path for tensors."""

    _is_param = _is_buffer = False  # read by nn.Module when a tensor becomes an attribute

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor


class _Tracer(torch.fx.Tracer):
    """Traces one module's forward pass, including those of plain nn.Sequentials, which only call their layers."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or observed(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if isinstance(m, DenseBlock | TracedBlock):  # called by its stage
            kwargs = {name: value for name, value in kwargs.items() if name != "residual_add"}
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: Node) -> torch.fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Value else super().create_arg(a)
