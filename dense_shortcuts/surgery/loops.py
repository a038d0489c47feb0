"""What the source of a class shows of how it runs the blocks of a container that it owns.

A dense shortcut is right only where each block is given what the one before gave back, unchanged. A stage checks that
again as it runs; here is what can be seen before anything is changed.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_ASKS = {"isinstance", "hasattr", "getattr", "len", "type", "id", "print", "repr", "str"}  # about a block; runs none
_MODULES = {"children", "named_children", "modules", "named_modules", "parameters"}  # of a stage: not its steps
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


@dataclass(frozen=True)
class Held:
    """Blocks as a class holds them.

    Attributes:
        path: the container's name in the class, such as encoder.blocks.
        depth: how many lists stand around the blocks there, 1 for stages in a list.
        kept: positions of the blocks that the class must not call one by one.
        count: how many blocks there are.
    """

    path: str
    depth: int = 0
    kept: frozenset[int] = frozenset()
    count: int = 0


@cache
def feeds(cls: Any, held: Held) -> bool | None:
    """Whether a class gives each block what the one before gave back, unchanged; None where it has no loop over them.

    Looked at are its methods whose names begin with forward, those that they call, and those of its parents.
    """
    found: list[bool] = []
    for function in _run_by_forward(cls):
        reading = _Reading(held, _first_name(function))
        reading.visit(function)
        found += reading.verdicts
    return all(found) if found else None


def _run_by_forward(cls: Any) -> list[ast.AST]:
    own = [parent for parent in cls.__mro__ if not parent.__module__.startswith(("torch.", "builtins"))]
    run: list[tuple[int, str]] = []

    def call(name: str, after: int = 0) -> None:
        """Note the method of this name that is found first from a parent on."""
        place = next((n for n in range(after, len(own)) if name in vars(own[n])), None)
        if place is not None and (place, name) not in run:
            run.append((place, name))

    for name in dict.fromkeys(name for parent in own for name in vars(parent) if name.startswith("forward")):
        call(name)
    found = []
    for place, name in run:  # grows as it goes
        tree = _source(inspect.unwrap(vars(own[place])[name]))
        if tree is None:
            continue
        found.append(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                if of == _first_name(tree):
                    call(node.func.attr)
                elif of.startswith("super("):
                    call(node.func.attr, place + 1)
                else:
                    parents = [n for n, parent in enumerate(own) if parent.__name__ == of]
                    call(node.func.attr, parents[0] if parents else len(own))
    return found


@cache
def _source(function: Any) -> ast.AST | None:
    if not inspect.isfunction(function):
        return None
    try:
        source = inspect.getsource(function)
        return ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None


def _first_name(tree: ast.AST) -> str:
    """What a method calls self."""
    method = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    return method.args.args[0].arg if method is not None and method.args.args else "self"


class _Reading(ast.NodeVisitor):
    """Goes through a method with the names that stand for the container, a list in it or a block, and judges each use.

    An expression's level is 0 for the container, and one more for what is in it; a block is at level depth + 1.
    """

    def __init__(self, held: Held, itself: str) -> None:
        self.held, self.levels = held, {f"{itself}.{held.path}": 0}
        self.verdicts: list[bool] = []
        self.by_index: set[str] = set()

    def level(self, node: ast.expr) -> int | None:
        text = ast.unparse(node)
        if text in self.levels:
            return self.levels[text]
        if isinstance(node, ast.Subscript):
            level = self.level(node.value)
            return level if level is None or isinstance(node.slice, ast.Slice) else level + 1
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("list", "tuple") and len(node.args) == 1:
            return self.level(node.args[0])
        if isinstance(node, ast.IfExp):
            level = self.level(node.body)
            return self.level(node.orelse) if level is None else level
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        level = self.level(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._bind(target.id, level, by_index=isinstance(node.value, ast.Subscript))

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter, node.body)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """A block that is called by its index, or a slice that is called, is run without the stage."""
        level, of = self.level(node.func), node.func
        if level == self.held.depth + 1 and (ast.unparse(of) in self.by_index or self._may_be_kept(of)):
            self.verdicts.append(False)
        if level == self.held.depth and isinstance(of, ast.Subscript) and isinstance(of.slice, ast.Slice):
            self.verdicts.append(False)
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, _COMPREHENSIONS):
            results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            for each in node.generators:
                self._loop(each.target, each.iter, results)
        super().generic_visit(node)

    def _may_be_kept(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Subscript):
            return False
        try:
            n = ast.literal_eval(node.slice)
        except ValueError:
            return True
        return not isinstance(n, int) or n % (self.held.count or 1) in self.held.kept

    def _bind(self, name: str, level: int | None, by_index: bool = False) -> None:
        self.levels.pop(name, None)
        self.by_index.discard(name)
        if level is not None:
            self.levels[name] = level
        if by_index and level == self.held.depth + 1:
            self.by_index.add(name)

    def _loop(self, target: ast.expr, over: ast.expr, body: list[Any]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._bind(node.id, None)
        for name, level in self._pairs(target, over):
            if name is not None:
                self._bind(name, level)
            if level == self.held.depth + 1 and (name is None or _uses(body, name)):
                self.verdicts.append(name is not None and _chains(body, name))

    def _pairs(self, target: ast.expr, over: ast.expr) -> Iterator[tuple[str | None, int]]:
        """The names of a loop that stand for blocks, or lists of them, with their level; None where that is not seen.

        None is also the name where a stage would give something else than the steps of one pass in their order.
        """
        level = self.level(over)
        name = target.id if isinstance(target, ast.Name) else None
        parts: list[ast.expr] = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        if level is not None:
            yield (None if _has_step(over) else name), level + 1
        elif isinstance(over, ast.Call):
            called = ast.unparse(over.func)
            if called == "enumerate" and len(parts) == 2 and over.args:
                yield from self._pairs(parts[1], over.args[0])
            elif called == "zip" and len(parts) == len(over.args):
                for part, arg in zip(parts, over.args, strict=True):
                    yield from self._pairs(part, arg)
            elif called not in ("range", "len"):
                of = over.func.value if isinstance(over.func, ast.Attribute) else None
                inside = None if of is None else self.level(of)
                if isinstance(over.func, ast.Attribute) and inside is not None and over.func.attr in _MODULES:
                    yield None, inside + 1
                for arg in over.args:
                    for _, given in self._pairs(ast.Name("_"), arg):
                        yield (None if called in ("reversed", "sorted") else name), given


def _has_step(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.step is not None


def _walk(body: list[Any]) -> Iterator[ast.AST]:
    for statement in body:
        yield from ast.walk(statement)


def _uses(body: list[Any], block: str) -> bool:
    """Whether a block is called, or handed to something that may call it."""
    return any(isinstance(node, ast.Call) and _is_given(node, block) for node in _walk(body))


def _is_given(call: ast.Call, block: str) -> bool:
    """Whether a call is one of the block, or is given it. A method of the block is not looked at: a step has none."""
    if ast.unparse(call.func) in _ASKS:
        return False
    args = [arg.value if isinstance(arg, ast.Starred) else arg for arg in call.args]
    return any(ast.unparse(node) in (block, f"{block}.__call__") for node in (call.func, *args))


def _asks_for_a_method(node: ast.AST | None, block: str) -> bool:
    return isinstance(node, ast.Call) and any(
        isinstance(part, ast.Attribute) and ast.unparse(part.value) == block and part.attr != "__call__"
        for part in (node.func, *node.args)
    )


@dataclass
class _Flow:
    """What is assigned in a loop: maps given to the block and taken from it, and all else that is set or changed."""

    fed: set[str] = field(default_factory=set)
    results: dict[str, str] = field(default_factory=dict)
    calls: list[ast.AST] = field(default_factory=list)
    targets: list[ast.AST] = field(default_factory=list)


def _chains(body: list[Any], block: str) -> bool:
    """Whether a loop has `x = block(x, ..)`, or the same through a checkpoint function, and nothing else for x.

    A block may give back more, `x, size = block(x, size)`; and its result may have a name first, `y = block(x); x = y`.
    """
    flow = _Flow()
    assigns = [node for node in _walk(body) if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)]
    for node in assigns:
        _note_call(flow, node, block)
    taken = set()
    for node in assigns:
        source, (target, *_) = ast.unparse(node.value) if node.value else "", _targets(node)
        if source in flow.results and ast.unparse(target) == flow.results[source]:
            flow.fed.add(flow.results[source])
            flow.targets.append(target)
            taken.add(source)
    if len(flow.fed) != 1 or taken != set(flow.results):
        return False
    calls = [node for node in _walk(body) if isinstance(node, ast.Call) and _is_given(node, block)]
    if any(call not in flow.calls for call in calls) or _twice(body, flow):
        return False
    return not (flow.fed | taken) & _changed(body, flow)


def _note_call(flow: _Flow, node: Any, block: str) -> None:
    given = _argument(node.value, block)
    if given is None:
        if _asks_for_a_method(node.value, block):  # which a step refuses as it runs
            flow.targets += [part for target in _targets(node) for part in _parts(target)]
        return
    flow.calls += [call for call in ast.walk(node.value) if isinstance(call, ast.Call) and _is_given(call, block)]
    firsts = [_parts(target)[0] for target in _targets(node)]
    flow.targets += firsts
    if given in map(ast.unparse, firsts):
        flow.fed.add(given)
        flow.targets = [t for t in flow.targets if t not in firsts or ast.unparse(t) == given]
    else:
        flow.results[ast.unparse(firsts[0])] = given


def _argument(value: ast.expr | None, block: str) -> str | None:
    """What a call gives to a block: the first argument of block(x, ..), the second of checkpoint(block, x, ..)."""
    if isinstance(value, ast.IfExp):
        given = _argument(value.body, block)
        return given if given == _argument(value.orelse, block) else None
    if not isinstance(value, ast.Call) or not value.args:
        return None
    if ast.unparse(value.func) == block:
        return ast.unparse(value.args[0])
    through = "checkpoint" in ast.unparse(value.func) and ast.unparse(value.args[0]) in (block, f"{block}.__call__")
    return ast.unparse(value.args[1]) if through and len(value.args) > 1 else None


def _targets(node: Any) -> list[ast.expr]:
    return list(node.targets) if isinstance(node, ast.Assign) else [node.target]


def _parts(target: ast.expr) -> list[ast.expr]:
    return target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def _twice(body: list[Any], flow: _Flow) -> bool:
    """Whether one pass of a loop calls its block twice."""
    lists = [getattr(node, name, None) for node in _walk(body) for name in ("body", "orelse")]
    return any(
        sum(getattr(statement, "value", None) in flow.calls for statement in statements) > 1
        for statements in [body, *(each for each in lists if isinstance(each, list))]
    )


def _changed(body: list[Any], flow: _Flow) -> set[str]:
    """What else is set in a loop, or changed in place, with all that it is a part of."""
    changed: set[str] = set()
    for node in _walk(body):
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del) and node not in flow.targets:
            changed.update(_bases(node))
        elif isinstance(node, ast.Call) and node not in flow.calls:
            for written in _written(node):
                changed.update(_bases(written))
    declared = [node.target for node in _walk(body) if isinstance(node, ast.AnnAssign) and node.value is None]
    return changed - {ast.unparse(target) for target in declared}


def _written(call: ast.Call) -> Iterator[ast.expr]:
    """What a call writes into: x.mul_(2), torch.relu_(x), relu(x, inplace=True), torch.add(x, y, out=x)."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    inplace = [keyword.value for keyword in call.keywords if keyword.arg == "inplace"]
    if name.endswith("_") and not name.endswith("__"):
        yield from call.args[:1]
        if isinstance(call.func, ast.Attribute):
            yield call.func.value
    if inplace and ast.unparse(inplace[0]) != "False":
        yield from call.args[:1]
    yield from (keyword.value for keyword in call.keywords if keyword.arg == "out")


def _bases(node: Any) -> Iterator[str]:
    """An expression and what it is a part or view of: x.data, x[0] and x.flatten(1) are of x."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        yield ast.unparse(node)
        node = node.func if isinstance(node, ast.Call) else node.value
    yield ast.unparse(node)
