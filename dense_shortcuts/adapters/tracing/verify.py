"""Does a trace do all that a block does? Both are run on tensors without data, and their operations compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoResidual(Exception):
    """Why a block was not understood, for the error that the caller makes of it."""


@dataclass
class Facts:
    """What a run of a graph showed.

    Attributes:
        shapes: of each node's result, () for what is no tensor; in the order of the run.
        writes: for each node that writes into earlier results, which ones, views of the same memory included.
    """

    shapes: dict[Node, torch.Size] = field(default_factory=dict)
    writes: dict[Node, set[Node]] = field(default_factory=dict)


def verify(
    block: nn.Module, graph: Graph, inputs: Sequence[Node], example: Sequence[Any], settings: dict[str, Any]
) -> Facts:
    """What a traced graph does when it is run, where that is what the block does.

    Args:
        block: the block; it stays as it is.
        graph: the trace of its forward pass.
        inputs: the nodes of its input and of further ones.
        example: what these may be, tensors without data.
        settings: the block's other arguments.

    Raises:
        NoResidual: the block cannot be run on them, or does something that the graph does not do.
    """
    x, *others = map(_fresh, example)
    by_name = {str(node.target): tensor for node, tensor in zip(inputs[1:], others, strict=True)}
    given = [_fresh(value) for value in example]
    try:
        with torch.no_grad():
            with _Record() as host:
                result = shadow(block)(x, **by_name, **settings)
            with _Record() as traced:
                run = _Run(shadow(block), graph=graph, garbage_collect_values=False)
                again = run.run(*given, enable_io_processing=False)
    except Exception as error:  # whatever a forward pass raises on a shape that is not its own
        raise NoResidual(f"it cannot be run on shapes alone ({' '.join(str(error).split())[:120]})") from error
    if host.operations != traced.operations or host.describe(result) != traced.describe(again):
        raise NoResidual("a trace of its forward pass misses some of what it does")
    return run.facts


def _fresh(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value


class _Record(TorchDispatchMode):
    """Every operation of PyTorch's dispatcher: its name, where its tensors come from, and its other arguments.

    A tensor comes from the operation that wrote its memory last, so that an operation in place, which a trace may turn
    into one that is not, is told from it where the old value is used again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.source: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no memory is taken for another's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [self.describe(value) for value in tree_leaves((args, kwargs))]
        name, number = str(func), len(self.operations)
        self.operations.append((name.replace("_.", "."), *given))
        result = func(*args, **kwargs)
        written = [a for a, formal in zip(args, func._schema.arguments, strict=False) if _is_written(formal)]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                self.source[_memory(tensor)] = number
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.source.setdefault(_memory(tensor), number)
        self.kept += [args, result]
        return result

    def describe(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        self.kept.append(value)
        return tuple(value.shape), self.source.setdefault(_memory(value), -1 - len(self.source))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Run(torch.fx.Interpreter):
    """Runs a graph and notes what each node writes into."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.facts = Facts()

    def run_node(self, n: Node) -> Any:
        before = {node: value._version for node, value in self.env.items() if isinstance(value, Tensor)}
        result = super().run_node(n)
        self.facts.shapes[n] = result.shape if isinstance(result, Tensor) else torch.Size()
        written = {node for node, version in before.items() if self.env[node]._version != version}
        if written:
            self.facts.writes[n] = written
        return result


def shadow(module: nn.Module) -> nn.Module:
    """The same module, in the same mode, with tensors without data, no hooks and not compiled."""
    other = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():  # a cache in a dict or list is not to be filled with such tensors
        other.__dict__[name] = value.copy() if type(value) in (dict, list) else value
    other.__dict__["_compiled_call_impl"] = None
    other.__dict__["_parameters"] = {name: _empty(p) for name, p in module._parameters.items()}
    other.__dict__["_buffers"] = {name: _empty(b) for name, b in module._buffers.items()}
    other.__dict__["_modules"] = {n: None if m is None else shadow(m) for n, m in module._modules.items()}
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        other.__dict__[name] = type(module.__dict__[name])()
    return other


def _empty(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor, device="meta")
