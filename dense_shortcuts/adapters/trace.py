"""The fallback where no adapter is written: a torch.fx trace of the block finds the add that joins branch and shortcut.

What is looked for is an output that is a sum, perhaps with an activation behind it, one of whose addends is the block's
input (an identity shortcut) or a few layers of it (a projection shortcut). Nothing is executed: the trace cuts the
block's own forward pass in pieces, which call the block's own modules.
"""

import importlib
import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Graph, Node

_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_"}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
RELU = "relu"
_NAMES = re.compile(r"down_?sampl|short_?cut|skip|proj|identity|residual", re.IGNORECASE)


class NoResidual(Exception):
    """Why a block was not understood, for the error that the caller makes of it."""


@dataclass
class Piece:
    """A cut of a block's forward pass as Python source, so that it can be pickled; called as piece(block, x)."""

    source: str
    names: dict[str, Any]
    call: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scope = dict(self.names)
        exec(compile(self.source, "<a traced residual block>", "exec"), scope)
        self.call = scope["forward"]

    def __reduce__(self) -> tuple[Any, ...]:
        modules = {name: value.__name__ for name, value in self.names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.names.items() if name not in modules}
        return _load_piece, (self.source, others, modules)


def _load_piece(source: str, names: dict[str, Any], modules: dict[str, str]) -> Piece:
    return Piece(source, names | {name: importlib.import_module(module) for name, module in modules.items()})


@dataclass
class Parts:
    """A block in pieces.

    Attributes:
        split: x -> (branch, shortcut), the branch without its last norm where `norm` is not None.
        whole: x -> (the host's own sum, shortcut), added in the host's order.
        identity: whether the shortcut is the block's input as it is.
        named: whether a projection's name says that it is one, such as downsample.
        norm: name of the branch's last norm that `split` leaves out, a batch norm.
        after: what follows the add: a module's name, a piece, or None for nothing.
        conv_norms: names of each convolution and of the norm that follows it directly.
        last_conv: name of the convolution whose output, but for its norm, is the branch.
    """

    split: Piece
    whole: Piece
    identity: bool
    named: bool
    norm: str | None
    after: str | Piece | None
    conv_norms: list[tuple[str, str]]
    last_conv: str | None


class _Tracer(torch.fx.Tracer):
    """Every child is a leaf: only the block's own forward pass is looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(block: nn.Module, given: tuple[str, ...] = ()) -> Parts:
    """The pieces of a residual block as it stands: in training or evaluation mode, with this configuration.

    Args:
        block: the block, of its host's own class.
        given: names of further arguments of its forward pass that pieces take; all others are at their defaults.

    Raises:
        NoResidual: the forward pass cannot be traced or has no such add; its text says which.
    """
    graph, inputs = _graph(block, given)
    output = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    if not isinstance(output, Node):
        raise NoResidual("it returns something other than one tensor")
    add, after = _find_add(output)
    before = _ancestors(add)
    if any(user not in after and user.op != "output" for user in add.users):
        raise NoResidual("its sum is used twice")
    if any(node in before for step in after for node in _ancestors(step) - before - {add}):
        raise NoResidual("what follows its sum needs more than the sum")
    terms = _terms(add)
    shortcut = _shortcut(terms, inputs[0])
    rest = [term for term in terms if term is not shortcut]
    if shortcut is None or not rest:
        raise NoResidual("none of the addends at its end is its input or a projection of it")
    return _cut(block, graph, inputs, add, rest, shortcut, after)


def _graph(block: nn.Module, given: tuple[str, ...]) -> tuple[Graph, list[Node]]:
    """The traced forward pass, and the nodes of its input and of the further arguments asked for."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    if not parameters:
        raise NoResidual("its forward pass takes no input")
    defaults: dict[str, Any] = {}
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in given:
            continue
        if parameter.default is parameter.empty:
            raise NoResidual(f"its forward pass needs a second argument, {parameter.name}")
        defaults[parameter.name] = parameter.default
    try:
        graph = _Tracer().trace(block, concrete_args=defaults)
    except Exception as error:  # a forward pass is anybody's code: whatever it raises on a proxy says the same
        raise NoResidual(f"its forward pass cannot be traced ({' '.join(str(error).split())[:120]})") from error
    first, *others = [node for node in graph.nodes if node.op == "placeholder"]
    kept = [node for node in others if node.name.rstrip("_1") in given or node.target in given]
    for node in others:
        if node not in kept:
            _drop_default(graph, node)
    for node in list(graph.nodes):
        if type(_module(block, node)) is nn.Identity:  # hosts write "no projection" that way
            node.replace_all_uses_with(node.all_input_nodes[0])
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return graph, [first, *kept]


def _drop_default(graph: Graph, node: Node) -> None:
    """Remove an argument that was traced at its default, which leaves at most a check of itself behind."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    if node in _ancestors(output):
        raise NoResidual(f"its forward pass depends on its argument {node.target}")
    for checked in reversed([other for other in graph.nodes if node in _ancestors(other)]):
        graph.erase_node(checked)
    graph.erase_node(node)


def _find_add(output: Node) -> tuple[Node, list[Node]]:
    """The add nearest to the output, and what follows it, a chain of operations on one tensor each."""
    after: list[Node] = []
    node = output
    while not _is_add(node):
        inputs = node.all_input_nodes
        if node.op not in ("call_module", "call_function", "call_method") or len(inputs) != 1 or len(after) > 2:
            raise NoResidual("its output is not a sum with an activation behind it")
        after.append(node)
        node = inputs[0]
    return node, after[::-1]


def _is_add(node: Node) -> bool:
    added = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    return added and len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args) and not node.kwargs


def _terms(node: Node) -> list[Node]:
    """The addends of a sum, sums among them that are used nowhere else taken apart too."""
    terms: list[Node] = []
    for arg in node.args:
        assert isinstance(arg, Node)
        terms += _terms(arg) if _is_add(arg) else [arg]
    return terms


def _shortcut(terms: list[Node], x: Node) -> Node | None:
    """The addend that is the shortcut: the input itself, else the one with the fewest layers behind the input."""
    if x in terms:
        return x
    if len(terms) != 2:
        return None
    named = [term for term in terms if _is_named(term)]
    if len(named) == 1 and x in _ancestors(named[0]):
        return named[0]
    counted = sorted(terms, key=lambda term: len(_ancestors(term)))
    short, long = (len(_ancestors(term)) for term in counted)
    return counted[0] if short < long and x in _ancestors(counted[0]) and x in _ancestors(counted[1]) else None


def _is_named(term: Node) -> bool:
    return term.op == "call_module" and _NAMES.search(str(term.target)) is not None


def _ancestors(node: Node) -> set[Node]:
    """All nodes that a node depends on, itself not included."""
    found: set[Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += current.all_input_nodes
    return found


def _cut(
    block: nn.Module,
    graph: Graph,
    inputs: list[Node],
    add: Node,
    rest: list[Node],
    shortcut: Node,
    after: list[Node],
) -> Parts:
    branch, norm = rest[-1], None
    last = block.get_submodule(str(branch.target)) if branch.op == "call_module" else None
    if len(rest) == 1 and type(last) in (nn.BatchNorm2d, nn.SyncBatchNorm) and len(branch.users) == 1:
        norm = str(branch.target)
        rest = [branch.all_input_nodes[0]]
    conv = _module(block, rest[0]) if len(rest) == 1 else None
    return Parts(
        split=_piece(graph, inputs, [rest, [shortcut]]),
        whole=_piece(graph, inputs, [[add], [shortcut]]),
        identity=shortcut is inputs[0],
        named=_is_named(shortcut),
        norm=norm,
        after=_after(block, add, after),
        conv_norms=_conv_norms(block, graph),
        last_conv=str(rest[0].target) if type(conv) is nn.Conv2d else None,
    )


def _module(block: nn.Module, node: Node) -> nn.Module | None:
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def _conv_norms(block: nn.Module, graph: Graph) -> list[tuple[str, str]]:
    """Each convolution whose output goes to a batch norm and nowhere else, both used once."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {name for name, n in Counter(str(node.target) for node in calls).items() if n == 1}
    return [
        (str(conv.target), str(norm.target))
        for norm in calls
        for conv in norm.all_input_nodes
        if type(_module(block, norm)) is nn.BatchNorm2d
        and type(_module(block, conv)) is nn.Conv2d
        and len(conv.users) == 1
        and {str(conv.target), str(norm.target)} <= once
    ]


def _after(block: nn.Module, add: Node, after: list[Node]) -> str | Piece | None:
    """What follows the add; a ReLU by whatever name is one that the operator may take over."""
    if not after:
        return None
    if len(after) == 1 and after[0].op == "call_module":
        return str(after[0].target)
    if len(after) == 1 and after[0].target in _RELUS:
        return RELU
    graph = Graph()
    copies = {add: graph.placeholder("x")}
    for node in after:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(copies[after[-1]])
    return _compile(graph)


def _piece(graph: Graph, inputs: list[Node], outputs: list[list[Node]]) -> Piece:
    """The part of a graph that makes these sums of nodes, as a function of the block and its inputs."""
    wanted = {node for terms in outputs for node in terms}
    needed = wanted | {node for output in wanted for node in _ancestors(output)} | set(inputs)
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda old: copies[old])
    results = []
    for terms in outputs:
        result, *others = (copies[node] for node in terms)
        for other in others:
            result = part.call_function(operator.add, (result, other))
        results.append(result)
    part.output(tuple(results))
    return _compile(part)


def _compile(graph: Graph) -> Piece:
    code = graph.python_code("self")
    return Piece(code.src, dict(code.globals))
