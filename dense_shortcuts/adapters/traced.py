"""Blocks without a written adapter: their classes, and how a block becomes one of them.

The class of a traced block is made when its host's class is first met, so it has no name to be pickled by; its
instances pickle as their host's class and what was traced. It has no public names beside its host's, for a host may
have an attribute or child of any name.
"""

import copy
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from .block import Join, joined
from .probe import Layout, probe
from .trace import RELU, NoResidual, Parts, Piece, trace

_RELU = nn.ReLU()  # for hosts that call the function


@dataclass
class Trace:
    """What is known of a block from its trace.

    Attributes:
        host: the host's block class.
        layout: the channels of its output and where they are.
        parts: the cut, by training mode and the names of further arguments that were given.
    """

    host: Any
    layout: Layout
    parts: dict[tuple[bool, tuple[str, ...]], Parts]

    def of(self, block: Any, *given: str) -> Parts:
        """The cut for the mode a block is in and these further arguments."""
        key = (block.training, given)
        if key not in self.parts:
            self.parts[key] = trace(view(block, self.host), given)
        return self.parts[key]


class TracedBlock:
    """Mixin of a host's block that was traced; see `block.DenseBlock` for one that was written."""

    _dense_trace: Trace

    def forward(self, x: Tensor, join: Join | None = None, *args: Any, **kwargs: Any) -> Tensor:
        join, traced = joined(join), self._dense_trace
        given = _named_arguments(traced.host, args, kwargs)
        parts = traced.of(self, *given)
        after = _after(self, parts.after)
        if join.keep_identity:
            total, identity = parts.whole.call(self, x, *given.values())
            return join(total, None, identity, after, whole=True)
        branch, identity = parts.split.call(self, x, *given.values())
        return join(branch, _submodule(self, parts.norm), identity, after)

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
        key = next(key for key in self.traced.parts if key[0] == self.block.training)
        return self.traced.parts[key]


def _submodule(block: Any, name: str | None) -> Any:
    return None if name is None else block.get_submodule(name)


def _after(block: Any, after: str | Piece | None) -> Any:
    if isinstance(after, Piece):
        return lambda y: after.call(block, y)
    return _RELU if after == RELU else _submodule(block, after)


def _load(host: Any) -> nn.Module:
    cls = traced_class(host)
    return cls.__new__(cls)


@cache
def traced_class(host: Any) -> Any:
    """The class of traced blocks whose host's class is `host`."""
    return type(f"Dense{host.__name__}", (TracedBlock, host), {"__module__": host.__module__})


def _named_arguments(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's further arguments by name, without those at their defaults."""
    if not args and not kwargs:
        return {}
    parameters = list(inspect.signature(host.forward).parameters.values())[2:]
    named = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    return {p.name: named[p.name] for p in parameters if p.name in named and named[p.name] is not p.default}


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
    host: Any = type(block)
    needed = _needed_arguments(host)
    seen, parts = copy.copy(block), {}
    for training in (True, False):
        seen.training = training
        parts[training, needed] = trace(seen, needed)
    if parts[True, needed].identity != parts[False, needed].identity:
        raise NoResidual("its shortcut is another one in training than in evaluation")
    return Reading(block, Trace(host, probe(block, needed), parts))


def _needed_arguments(host: Any) -> tuple[str, ...]:
    """Names of the arguments besides the input that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(host.forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind in kinds)
