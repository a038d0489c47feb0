"""Blocks without a written adapter: their classes, and how a block becomes one of them.

The class of a traced block is made when its host's class is first met, so it has no name to be pickled by; its
instances pickle as their host's class and what was traced. It has no public names beside its host's, for a host may
have an attribute or child of any name.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx._symbolic_trace import _maybe_revert_all_patches
from torch.nn.utils.parametrize import is_parametrized

from ...errors import DenseShortcutError
from ...nn.block import MapLayout, in_stage
from ...nn.residual_add import ResidualAdd
from .probe import Layout, probe
from .trace import RELU, Call, NoResidual, Parts, Piece, frozen, state_of, trace

Settings = tuple[tuple[str, Any], ...]

_NO_MATTER = ("training", "__class__", "_compiled_call_impl")  # attributes that leave the forward pass as it is
_KEPT = 16  # cuts of one block


@dataclass
class Trace:
    """What is known of a block from its trace.

    Attributes:
        host: the host's block class.
        layout: the channels of its output and where they are.
        parts: the cut, by training mode and by how the block is called.
        states: what each cut that opened children was made for (`state_of`).
    """

    host: Any
    layout: Layout
    parts: dict[tuple[bool, Call], Parts]
    states: dict[tuple[bool, Call], list[tuple[str, Any]]] = field(default_factory=dict)

    def of(self, block: Any, call: Call, *inputs: Any) -> Parts:
        """The cut for the mode a block is in, called in this way, with these inputs; none stands for an example.

        What is cut in a symbolic trace is not kept: a call with tensors is checked with those.

        Raises:
            DenseShortcutError: the block was changed, or is called, in a way that the trace does not understand.
        """
        key = (block.training, call)
        if key in self.states and not torch.compiler.is_compiling() and self._is_stale(block, key):
            del self.parts[key], self.states[key]
        if key not in self.parts:
            if any(map(_is_symbolic, inputs)):
                with _maybe_revert_all_patches():  # else torch.fx records the check's calls of modules as well
                    return self._traced_for(block, call, *self._stand_ins(call))
            example = tuple(map(_without_data, inputs)) or self.layout.example()
            while len(self.parts) >= _KEPT and not torch.compiler.is_compiling():
                oldest = next(iter(self.parts))  # a number that differs at each call would fill the memory
                del self.parts[oldest]
                self.states.pop(oldest, None)
            self.parts[key] = self._traced_for(block, call, example)
            self.note(block, key, None)
        return self.parts[key]

    def _traced_for(self, block: Any, call: Call, *examples: tuple[Any, ...]) -> Parts:
        """The cut of a block called in this way, checked with the first of the examples that it can be checked with."""

        def attempt(example: tuple[Any, ...]) -> Parts:
            return trace(view(block, self.host), lambda: example, call)

        reason = None
        for example in examples:
            try:
                return attempt(example)
            except NoResidual as error:
                reason = reason or error
        raise DenseShortcutError(
            f"a plugged {self.host.__name__} is not understood as it is now set or called: {reason}."
        ) from reason

    def _stand_ins(self, call: Call) -> Iterator[tuple[Any, ...]]:
        """Examples to check a cut with in a symbolic trace, whose inputs have no values: those of plugging in.

        Further arguments are at their defaults. None may stand for itself, where a layer gets it, or for a number,
        where the block computes with it.
        """
        x, *others = self.layout.example()
        parameters = inspect.signature(self.host.forward).parameters
        defaults = {name: parameters[name].default if name in parameters else None for name in call.inputs}
        defaults |= dict(zip(_needed_arguments(self.host), others, strict=True))
        yield x, *defaults.values()
        yield x, *(x.new_ones(()) if value is None else value for value in defaults.values())

    def _is_stale(self, block: Any, key: tuple[bool, Call]) -> bool:
        state, before = state_of(block, self.parts[key].opened), self.states[key]
        pairs = zip(state, before, strict=False)
        return len(state) != len(before) or any(a != c or b is not d for (a, b), (c, d) in pairs)

    def note(self, block: Any, key: tuple[bool, Call], training: bool | None) -> None:
        """Remember what a cut was made for, in the children that it opened."""
        if opened := self.parts[key].opened:
            self.states[key] = state_of(block, opened, training)


def _without_data(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _is_symbolic(value: Any) -> bool:
    """Whether it is a value of a symbolic trace by torch.fx, or a list or tuple with such."""
    return isinstance(value, Proxy) or (isinstance(value, list | tuple) and any(map(_is_symbolic, value)))


class TracedBlock:
    """Mixin of a host's block that was traced; see `block.DenseBlock` for one that was written."""

    _dense_trace: Trace

    def forward(self, x: Tensor, *args: Any, residual_add: ResidualAdd | None = None, **kwargs: Any) -> Tensor:
        residual_add, traced = in_stage(residual_add), self._dense_trace
        inputs, settings = _arguments(traced.host, args, kwargs)
        parts = traced.of(self, Call(tuple(inputs), settings), x, *inputs.values())
        after = _after(self, parts.after)
        if residual_add.keep_identity:
            total, identity = parts.whole.call(self, x, *inputs.values())
            return residual_add(total, None, identity, after, whole=True)
        branch, identity = parts.split.call(self, x, *inputs.values())
        return residual_add(branch, _submodule(self, parts.norm), identity, after)

    def _dense_layout(self) -> MapLayout:
        layout = self._dense_trace.layout
        return MapLayout(layout.tokens, len(layout.shape) == 5)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the forward pass may depend on it, unless it is a mode or numbers, and is traced anew."""
        numbers = isinstance(value, Tensor) and isinstance(getattr(self, name, None), Tensor)
        if name not in _NO_MATTER and not numbers:
            self._dense_trace.parts.clear()
            self._dense_trace.states.clear()
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _load, (self._dense_trace.host,), dict(self.__dict__)


@dataclass(frozen=True)
class Reading:
    """A traced block to ask what `DenseBlock` has methods for."""

    block: Any
    traced: Trace

    @property
    def dense_class(self) -> Any:
        return traced_class(self.traced.host)

    @property
    def added(self) -> dict[str, Any]:
        return {"_dense_trace": self.traced}

    @property
    def tokens(self) -> bool:
        return self.traced.layout.tokens

    def projects(self) -> bool:
        return not self._parts.identity

    def is_certain(self) -> bool:
        return self._parts.identity or self._parts.named

    def out_channels(self) -> int:
        return self.traced.layout.channels

    def inner_widths(self) -> tuple[int, int] | None:
        return None

    def conv_norms(self) -> list[tuple[str, str]]:
        return self._parts.conv_norms

    def last_conv(self) -> nn.Conv2d | None:
        return _submodule(self.block, self._parts.last_conv)

    @property
    def _parts(self) -> Parts:
        return self.traced.of(self.block, Call(_needed_arguments(self.traced.host)))


def _submodule(block: Any, name: str | None) -> Any:
    return None if name is None else block.get_submodule(name)


def _after(block: Any, after: str | Piece | None) -> Any:
    if isinstance(after, Piece):
        return lambda y: after.call(block, y)
    return F.relu if after == RELU else _submodule(block, after)


def _load(host: Any) -> nn.Module:
    cls = traced_class(host)
    return cls.__new__(cls)


@cache
def traced_class(host: Any) -> Any:
    """The class of traced blocks whose host's class is `host`."""
    return type(f"Dense{host.__name__}", (TracedBlock, host), {"__module__": host.__module__})


def _arguments(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Settings]:
    """A block's further arguments but those at their defaults: the inputs, tensors or needed, and the settings.

    Raises:
        TypeError: the host's forward pass takes no such argument.
        DenseShortcutError: no cut can be made for one of them.
    """
    if not args and not kwargs:
        return {}, ()
    parameters = list(inspect.signature(host.forward).parameters.values())[2:]
    places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(places):
        raise DenseShortcutError(
            f"a plugged {host.__name__} is given more by position than its trace can name: give it by name."
        )
    named = {p.name: value for p, value in zip(places, args, strict=False)} | kwargs
    given = {p.name: named.pop(p.name) for p in parameters if p.name in named}
    given = {p.name: given[p.name] for p in parameters if p.name in given and given[p.name] is not p.default}
    if named and all(p.kind is not p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"{host.__name__}.forward() got an unexpected keyword argument '{next(iter(named))}'")
    given |= named
    needed = _needed_arguments(host)
    inputs = {n: v for n, v in given.items() if n in needed or isinstance(v, Tensor) or _is_symbolic(v)}
    try:
        return inputs, tuple((name, frozen(value)) for name, value in given.items() if name not in inputs)
    except NoResidual as reason:
        raise DenseShortcutError(f"a plugged {host.__name__} is not understood as it is called: {reason}.") from reason


def view(block: Any, cls: Any) -> Any:
    """The same block, its modules and tensors shared, under another class."""
    other = cls.__new__(cls)
    other.__dict__.update(block.__dict__)
    return other


def understand(block: nn.Module) -> Reading:
    """What a trace says of a block, which stays as it is.

    Raises:
        NoResidual: it is no residual block; the text says why.
    """
    scripted = next((name for name, m in block.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise NoResidual(f"its {scripted} is scripted" if scripted else "it is scripted, so its code cannot be changed")
    if is_parametrized(block):  # its class is one of its own, whose instances PyTorch does not copy
        raise NoResidual("it has parametrizations of its own: plug in first and parametrize the layers in it")
    host: Any = type(block)
    needed, parts = _needed_arguments(host), {}
    layout = cache(lambda: probe(block, needed))  # found only for what else may be residual
    for training in (True, False):
        parts[training, Call(needed)] = trace(_in_mode(block, training), lambda: layout().example(), Call(needed))
    if parts[True, Call(needed)].identity != parts[False, Call(needed)].identity:
        raise NoResidual("its shortcut is another one in training than in evaluation")
    traced = Trace(host, layout(), parts)
    for key in parts:
        traced.note(block, key, key[0])
    return Reading(block, traced)


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    """The same module in training or evaluation mode, its tensors shared."""
    other = view(module, type(module))
    modules = {name: None if m is None else _in_mode(m, training) for name, m in module._modules.items()}
    other.__dict__.update(training=training, _modules=modules)
    return other


def _needed_arguments(host: Any) -> tuple[str, ...]:
    """Names of the arguments besides the input that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(host.forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind in kinds)
