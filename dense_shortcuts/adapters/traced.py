"""Blocks without a written adapter: their classes, and how a block becomes one of them.

The class of a traced block is made when its host's class is first met, so it has no name to be pickled by; its
instances pickle as their host's class and what was traced.
"""

import copy
import inspect
from functools import cache
from typing import Any

from torch import Tensor, nn

from .block import DenseBlock, Join, joined
from .probe import Layout, probe
from .trace import RELU, NoResidual, Parts, Piece, trace

_RELU = nn.ReLU()  # for hosts that call the function


class TracedBlock(DenseBlock):
    """A block cut by `trace.trace`.

    Attributes:
        pieces: what was traced, by training mode and the further arguments that were given.
        layout: the channels and where they are.
        host: the host's block class.
    """

    added = ("pieces", "layout", "tokens")

    pieces: dict[tuple[bool, tuple[str, ...]], Parts]
    layout: Layout
    host: type[nn.Module]

    def parts(self, *given: str) -> Parts:
        """The pieces for the mode the block is in and these further arguments."""
        key = (self.training, given)  # type: ignore[attr-defined]
        if key not in self.pieces:
            self.pieces[key] = trace(view(self, self.host), given)
        return self.pieces[key]

    def projects(self) -> bool:
        return not self.parts().identity

    def is_certain(self) -> bool:
        parts = self.parts()
        return parts.identity or parts.named

    def out_channels(self) -> int:
        return self.layout.channels

    def conv_norms(self) -> list[tuple[str, str]]:
        return self.parts().conv_norms

    def last_conv(self) -> nn.Conv2d | None:
        name = self.parts().last_conv
        return None if name is None else self.get_submodule(name)  # type: ignore[attr-defined]

    def forward(self, x: Tensor, join: Join | None = None, *args: Any, **kwargs: Any) -> Tensor:
        join = joined(join)
        given = named_arguments(self.host, args, kwargs)
        parts = self.parts(*given)
        norm, after = self._module(parts.norm), self._after(parts.after)
        if join.keep_identity:
            total, identity = parts.whole.call(self, x, *given.values())
            return join(total, None, identity, after, whole=True)
        branch, identity = parts.split.call(self, x, *given.values())
        return join(branch, norm, identity, after)

    def _module(self, name: str | None) -> nn.Module | None:
        return None if name is None else self.get_submodule(name)  # type: ignore[attr-defined]

    def _after(self, after: str | Piece | None) -> Any:
        if isinstance(after, Piece):
            return lambda y: after.call(self, y)
        return _RELU if after == RELU else self._module(after)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _load, (self.host,), dict(self.__dict__)


def _load(host: Any) -> nn.Module:
    cls = traced_class(host)
    return cls.__new__(cls)


@cache
def traced_class(host: Any) -> Any:
    """The class of traced blocks whose host's class is `host`."""
    return type(f"Dense{host.__name__}", (TracedBlock, host), {"host": host, "__module__": host.__module__})


def named_arguments(host: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
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


def understand(block: nn.Module) -> Any:
    """A view of a block as a TracedBlock.

    Raises:
        NoResidual: it is not one.
    """
    pieces = {}
    seen = copy.copy(block)
    for training in (True, False):
        seen.training = training
        pieces[training, ()] = trace(seen)
    first = pieces[block.training, ()]
    if any(parts.identity != first.identity for parts in pieces.values()):
        raise NoResidual("its shortcut is another one in training than in evaluation")
    host: Any = type(block)
    traced, layout = view(block, traced_class(host)), probe(block)
    traced.__dict__.update(pieces=pieces, layout=layout, tokens=layout.tokens)
    return traced
