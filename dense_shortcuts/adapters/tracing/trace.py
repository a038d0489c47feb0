"""The fallback where no adapter is written: a torch.fx trace of the block finds the add that joins branch and shortcut.

What is looked for is an output that is a sum, perhaps with an activation behind it, one of whose addends is the block's
input (an identity shortcut) or a few layers of it (a projection shortcut). Children are taken as they are, but for
those that hide this sum, such as a `Residual` around the layers of a branch. Nothing is executed: the trace cuts the
block's own forward pass in pieces, which call the block's own modules. A run on tensors without data then shows whether
the pieces do all that the block does (`verify.py`).
"""

import contextlib
import copy
import importlib
import inspect
import operator
import pickle
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn
from torch.fx import Graph, Node

from ...nn.hooks import has_own_hooks
from .verify import Facts, NoResidual, verify

Example = Callable[[], tuple[Any, ...]]

_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_"}
_RELUS = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
RELU = "relu"
SEVERAL = "it returns something other than one tensor"
_NAMES = re.compile(r"down_?sampl|short_?cut|skip|proj|identity|residual", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """How a block is called besides its input.

    Attributes:
        inputs: names of further arguments that the pieces take, in the order of its signature.
        settings: further arguments with their values (`frozen`), which the pieces are made for.
    """

    inputs: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def named_settings(self) -> dict[str, Any]:
        """The settings as the block is given them."""
        return {name: _thawed(value) for name, value in self.settings}


class _Frozen(NamedTuple):
    """A list, tuple or dict as something that can be a key of a dict."""

    kind: type
    items: tuple[Any, ...]


def frozen(value: Any) -> Any:
    """A value in a form that can be compared and be a key of a dict, for lists, tuples and dicts of such values too.

    Raises:
        NoResidual: it is another value that cannot.
    """
    if type(value) in (list, tuple):
        return _Frozen(type(value), tuple(map(frozen, value)))
    if type(value) is dict:
        return _Frozen(dict, tuple((name, frozen(each)) for name, each in value.items()))
    if type(value).__hash__ is None or isinstance(value, torch.Tensor):
        raise NoResidual(f"it is given a {type(value).__name__}, of which nothing can be kept")
    return value


def _thawed(value: Any) -> Any:
    if not isinstance(value, _Frozen):
        return value
    if value.kind is dict:
        return {name: _thawed(each) for name, each in value.items}
    return value.kind(map(_thawed, value.items))


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
        opened: names of the children whose own forward passes were cut too, so that they are not called.
    """

    split: Piece
    whole: Piece
    identity: bool
    named: bool
    norm: str | None
    after: str | Piece | None
    conv_norms: list[tuple[str, str]]
    last_conv: str | None
    opened: tuple[str, ...]


class _Tracer(torch.fx.Tracer):
    """Looks into the block's own forward pass, and into those of the children by the names in `opened`."""

    proxy_buffer_attributes = True  # what is computed from a buffer is no constant

    def __init__(self, opened: frozenset[str], inputs: tuple[str, ...], settings: dict[str, Any]) -> None:
        super().__init__()
        self.opened, self.inputs, self.settings, self.switches = opened, inputs, settings, _switches()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The inputs as nodes, and a function of them that has the settings as they are, none for *args and **kwargs.

        torch.fx would take a list among the settings apart, and make a node of all **kwargs in one.
        """
        first, settings = list(inspect.signature(root_fn).parameters)[1], self.settings
        x, *others = (self.create_proxy("placeholder", name, (), {}) for name in (first, *self.inputs))
        given = dict(zip(self.inputs, others, strict=True))

        def forward(block: nn.Module) -> Any:
            return root_fn(block, x, **given, **settings)

        return forward, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        if kind != "output" and _switches() != self.switches:  # a trace would leave the switch out
            raise NoResidual("its forward pass switches gradients or autocast on or off")
        return super().create_node(kind, *args, **kwargs)


def _switches() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))


def trace(block: nn.Module, example: Example, call: Call = Call()) -> Parts:
    """The pieces of a residual block as it stands: in training or evaluation mode, with this configuration.

    Args:
        block: the block, of its host's own class.
        example: gives what the block may be called with, in tensors without data: its input, and those of `call`.
        call: how it is called besides; all other arguments of its forward pass are at their defaults.

    Raises:
        NoResidual: the forward pass cannot be traced or has no such add; its text says which.
    """
    block = copy.copy(block)
    graph, inputs, add, after, opened = _look(block, call)
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
    if len(rest) < len(terms) - 1:
        raise NoResidual("it adds its shortcut twice")
    seen = verify(block, graph, inputs, example(), call.named_settings())
    _check_shapes(seen, add, rest, shortcut)
    _check_writes(seen, add, after, inputs[0])
    return _cut(block, graph, inputs, add, rest, shortcut, after, opened)


class _Seen(NamedTuple):
    """A traced forward pass: its inputs, the add, what follows that, and the children that were opened."""

    graph: Graph
    inputs: list[Node]
    add: Node
    after: list[Node]
    opened: frozenset[str]

    def adds_input(self) -> bool:
        return self.inputs[0] in _terms(self.add)


def _look(block: nn.Module, call: Call) -> _Seen:
    """The traced forward pass with those children opened that hide the add, or the input among its addends.

    What was opened must add the input itself, for a stage of blocks ends with a sum in its last block too.
    """
    seen = trial = _look_at(block, call, frozenset())
    while True:
        _check_no_chain(block, trial.opened)
        if trial.adds_input():
            return trial
        fed = [term for term in _terms(trial.add) if term.all_input_nodes == trial.inputs[:1]]
        new = {str(term.target) for term in fed if _may_open(_module(block, term))}
        if not new:
            if seen.opened:
                raise NoResidual("none of the addends at its end is its input or a projection of it")
            return seen  # what was opened on the way is a projection, which stays closed
        trial = _look_at(block, call, trial.opened | new)


def _check_no_chain(block: nn.Module, opened: frozenset[str]) -> None:
    """A list of residual modules is a stage, and what runs it is no block; a block has its wrappers by name."""
    lists = Counter(name.rpartition(".")[0] for name in opened)
    if any(n > 1 and isinstance(block.get_submodule(name), nn.ModuleList) for name, n in lists.items() if name):
        raise NoResidual("it runs a list of residual blocks, which are a stage of their own")


def _look_at(block: nn.Module, call: Call, opened: frozenset[str]) -> _Seen:
    """The forward pass with these children opened, and with those that the add nearest to the output is in."""
    while True:
        graph, inputs = _graph(block, call, opened)
        output = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
        if not isinstance(output, Node):
            raise NoResidual(SEVERAL)
        node, after = _find_add(output)
        if _is_add(node):
            return _Seen(graph, inputs, node, after, opened)
        hiding = next((step for step in [*reversed(after), node] if not _is_plain(_module(block, step))), node)
        if not _may_open(_module(block, hiding)):
            raise NoResidual("its output is not a sum with an activation behind it")
        opened |= {str(hiding.target)}


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a step is a function, or a module with nothing in it, such as an activation."""
    return module is None or next(module.children(), next(module.parameters(), None)) is None


def _may_open(module: nn.Module | None) -> bool:
    """Whether a child's forward pass is somebody's own, and no hook asks that the child be called."""
    if module is None or isinstance(module, nn.Sequential) or type(module).__module__.startswith("torch.nn."):
        return False
    return next(module.children(), None) is not None and not has_own_hooks(module)


def state_of(block: nn.Module, opened: tuple[str, ...], training: bool | None = None) -> list[tuple[str, Any]]:
    """What a cut depends on in the children whose own forward passes were cut: attributes, layers, which numbers.

    `training` stands for the children's own mode.
    """
    state: list[tuple[str, Any]] = []
    for child in map(block.get_submodule, opened):
        state += [(n, value) for n, value in vars(child).items() if type(value) is not dict and n != "training"]
        state.append(("training", child.training if training is None else training))
        state += child._modules.items()
        numbers = [*child._parameters.items(), *child._buffers.items()]
        state += [(name, number is None) for name, number in numbers] + [("hooks", has_own_hooks(child))]
    return state


def _graph(block: nn.Module, call: Call, opened: frozenset[str]) -> tuple[Graph, list[Node]]:
    """The traced forward pass, and the nodes of its input and of those that it is called with besides."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    if not parameters:
        raise NoResidual("its forward pass takes no input")
    settings = call.named_settings()
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in call.inputs:
            continue
        if parameter.default is parameter.empty and parameter.name not in settings:
            raise NoResidual(f"its forward pass needs a second argument, {parameter.name}")
    attributes = dict(vars(block))
    try:
        with _no_randomness():
            graph = _Tracer(opened, call.inputs, settings).trace(block)
    except NoResidual:
        raise
    except Exception as error:  # a forward pass is anybody's code: whatever it raises on a proxy says the same
        raise NoResidual(f"its forward pass cannot be traced ({' '.join(str(error).split())[:120]})") from error
    for name, value in vars(block).items():
        if name not in attributes or attributes[name] is not value:
            made = "makes a constant tensor" if name.startswith("_tensor_constant") else f"sets its attribute {name}"
            raise NoResidual(f"its forward pass {made}")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if type(_module(block, node)) is nn.Identity:  # hosts write "no projection" that way
            node.replace_all_uses_with(node.all_input_nodes[0])
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return graph, inputs


@contextlib.contextmanager
def _no_randomness() -> Iterator[None]:
    """Refuses a forward pass that draws random numbers outside its modules: a trace would draw them once for all."""
    numpy: Any = sys.modules.get("numpy")
    python, own, of_numpy = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state(legacy=False)
    try:
        yield
        drawn = [random.getstate() != python, not torch.equal(torch.get_rng_state(), own)]
        drawn += [numpy and pickle.dumps(numpy.random.get_state(legacy=False)) != pickle.dumps(of_numpy)]
    finally:
        random.setstate(python)
        torch.set_rng_state(own)
        if numpy:
            numpy.random.set_state(of_numpy)
    if any(drawn):
        raise NoResidual("its forward pass draws random numbers outside its modules")


def _find_add(output: Node) -> tuple[Node, list[Node]]:
    """The add nearest to the output, else where the search for it ends; and the chain of operations from there on."""
    after: list[Node] = []
    node = output
    while not _is_add(node):
        inputs = node.all_input_nodes
        if node.op not in ("call_module", "call_function", "call_method") or len(inputs) != 1 or len(after) > 2:
            break
        after.append(node)
        node = inputs[0]
    return node, after[::-1]


def _is_add(node: Node) -> bool:
    added = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    return added and len(node.args) == 2 and all(isinstance(arg, Node) for arg in node.args) and not node.kwargs


def _terms(node: Node) -> list[Node]:
    """The addends of a sum, sums among them taken apart too."""
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


def _check_shapes(seen: Facts, add: Node, rest: list[Node], shortcut: Node) -> None:
    shapes = [torch.broadcast_shapes(*(seen.shapes[term] for term in rest)), seen.shapes[shortcut]]
    if any(shape != seen.shapes[add] for shape in shapes):
        raise NoResidual("its branch and its shortcut differ in shape")


def _check_writes(seen: Facts, add: Node, after: list[Node], x: Node) -> None:
    """Refuse writes in place that mean something else once the addends at the end are taken apart and added later."""
    sums, order = _sums(add), {node: n for n, node in enumerate(seen.shapes)}
    for writer, written in seen.writes.items():
        if writer in after:
            continue
        if writer not in sums and x in written:
            raise NoResidual("its forward pass writes into its input")
        for node in written:
            users = [order[user] for user in node.users if user is not writer and user in order]
            added = [order[user] for user in node.users if user in sums]
            if writer in sums and max(users, default=-1) > order[writer]:
                raise NoResidual("it uses an addend again after adding to it in place")
            if writer not in sums and (node in sums or min(added, default=len(order)) < order[writer]):
                raise NoResidual("it writes into an addend after adding it")


def _sums(add: Node) -> set[Node]:
    """A sum, and the sums among its addends."""
    return {add}.union(*(_sums(arg) for arg in add.all_input_nodes if _is_add(arg)))


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
    opened: frozenset[str],
) -> Parts:
    branch, norm = rest[-1], None
    last = block.get_submodule(str(branch.target)) if branch.op == "call_module" else None
    if len(rest) == 1 and type(last) in (nn.BatchNorm2d, nn.SyncBatchNorm) and len(branch.users) == 1:
        norm = str(branch.target)
        rest = [branch.all_input_nodes[0]]
    conv = _module(block, rest[0]) if len(rest) == 1 else None
    return Parts(
        split=_piece(graph, inputs, [rest, [shortcut]], _sums(add)),
        whole=_piece(graph, inputs, [[add], [shortcut]], _sums(add)),
        identity=shortcut is inputs[0],
        named=_is_named(shortcut),
        norm=norm,
        after=_after(block, add, after),
        conv_norms=_conv_norms(block, graph),
        last_conv=str(rest[0].target) if type(conv) is nn.Conv2d else None,
        opened=tuple(sorted(opened)),
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


def _piece(graph: Graph, inputs: list[Node], outputs: list[list[Node]], sums: set[Node]) -> Piece:
    """The part of a graph that makes these sums of nodes, as a function of the block and its inputs.

    `sums` are those at the end of the block, made in place in none of the pieces.
    """
    wanted = {node for terms in outputs for node in terms}
    needed = wanted | {node for output in wanted for node in _ancestors(output)} | set(inputs)
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda old: copies[old])
            if node in sums:  # in place it would write into the input or an addend, which are needed as they are
                copies[node].op, copies[node].target = "call_function", operator.add
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
