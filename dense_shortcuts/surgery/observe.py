"""What a network does with the blocks of its lists and sequences, seen in one forward pass over tensors without data.

A dense shortcut is right only where each block is given what the one before gave back, unchanged. The pass is that of a
copy whose containers hand out their blocks as dense stages do, so that what the host does with a stage is seen before
anything is changed. A stage checks the same again as it runs.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.tracing.verify import shadow
from .inputs import Call, calls_of, without_data


class Step(NamedTuple):
    """A call of block n, with marks (`_mark`) of the map that it was given and of the one that it gave back."""

    n: int
    given: Any
    gave: Any


@dataclass
class Seen:
    """What a forward pass did with the blocks of one container.

    Attributes:
        passes: the calls in each pass over the container, in their order.
        fired: how often each block ran, whichever way it was called.
        kept: all maps, so that no memory is taken for another's.
        errors: what blocks raised in place of giving something back.
    """

    passes: list[list[Step]] = field(default_factory=list)
    fired: Counter[int] = field(default_factory=Counter)
    kept: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def called(self) -> set[int]:
        """The blocks that were called as steps of a pass and in no other way."""
        counts = Counter(step.n for steps in self.passes for step in steps)
        return {n for n, times in self.fired.items() if times == counts[n]}

    def unfed(self) -> set[int]:
        """The blocks that were ever given something else than what the one before gave back."""
        calls = [pair for steps in self.passes for pair in pairwise([Step(-1, None, None), *steps])]
        return {step.n for before, step in calls if step.n != before.n + 1 or step.given != before.gave}

    def shares(self) -> bool:
        """Whether blocks were given the same map, side by side."""
        return any(len({step.given for step in steps}) < len(steps) for steps in self.passes)


@dataclass
class Observation:
    """What was seen of each container, by its module name, and why a part of the pass failed; "" if none did."""

    containers: dict[str, Seen] = field(default_factory=dict)
    failure: str = "no input of it could be made"


def observe(model: nn.Module, example: Any = None) -> Observation:
    """What a network does with its containers; it stays as it is.

    Args:
        model: the network.
        example: what to run it on (`inputs.calls_of`); None makes images.
    """
    likeliest = None
    for call in calls_of(model, example):
        seen = _run(model, call)
        if not seen.failure:
            return seen
        likeliest = likeliest or seen
    return likeliest or Observation()


def _run(model: nn.Module, call: Call) -> Observation:
    containers: dict[str, Seen] = {}
    errors: list[Exception] = []
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = shadow(model).eval()
            for name, module in twin.named_modules():
                module.__dict__.update({key: without_data(v) for key, v in vars(module).items() if key[0] != "_"})
                if is_list(module):
                    containers[name] = _watch(module)
            twin(*call.args, **call.kwargs)
    except Exception as error:  # a forward pass is anybody's code
        errors.append(error)
    errors = [error for seen in containers.values() for error in seen.errors] + errors
    failures = [f"{type(error).__name__}: {' '.join(str(error).split())[:120]}" for error in errors]
    return Observation(containers, failures[0] if failures else "")


def is_list(module: nn.Module) -> bool:
    """Whether a module is a sequence or a list without a forward pass of its own."""
    base = nn.Sequential if isinstance(module, nn.Sequential) else nn.ModuleList
    return isinstance(module, base) and type(module).forward is base.forward


def _watch(container: nn.Module) -> Seen:
    """Have the blocks of a container called as the steps of a dense stage are, and note it."""
    seen, children = Seen(), [child for child in container._modules.values() if child is not None]
    blocks = {n for n, child in enumerate(children) if _may_be_block(child)}
    for n in blocks:
        children[n].register_forward_hook(lambda *_, n=n: seen.fired.update([n]))

    def begin() -> list[Any]:
        seen.passes.append([])
        return [_Block(seen, n, child) if n in blocks else child for n, child in enumerate(children)]

    container.__class__, container.__dict__["_begin"] = _Container, begin
    return seen


def _may_be_block(module: nn.Module) -> bool:
    """Whether a child may be a residual block by its class."""
    own = not type(module).__module__.startswith("torch.") and not is_list(module)
    return own and next(module.children(), None) is not None


class _Container(nn.Module):
    """A container that hands out its blocks as a dense stage does."""

    _begin: Any

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._begin())

    def __getitem__(self, index: Any) -> Any:
        return _Slice(self._begin()[index]) if isinstance(index, slice) else list(self._modules.values())[index]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        for block in self:
            x = block(x, *args, **kwargs)
        return x


class _Slice(list[Any]):
    """A part of a pass. A dense stage's cannot be called, so blocks that this one runs are no steps."""

    def __call__(self, x: Any) -> Any:
        for block in self:
            x = (block.block if isinstance(block, _Block) else block)(x)
        return x


class _Block:
    """A block in one pass over its container, called as a step of a dense stage is; else as transparent as may be."""

    def __init__(self, seen: Seen, n: int, block: nn.Module) -> None:
        self.seen, self.steps, self.n, self.block = seen, seen.passes[-1], n, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = _mark(args)
        try:
            result = self.block(*args, **kwargs)
        except Exception as error:  # it may look at its data; most blocks give back what is like their input
            self.seen.errors.append(error)
            self.seen.fired.update([self.n])
            result = torch.empty_like(args[0])
        self.steps.append(Step(self.n, given, _mark(result)))
        self.seen.kept += [args, result]
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _mark(value: Any) -> Any:
    """Tells the first map in a value from others, and from what it was before a write in place."""
    x = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(x, Tensor):
        return object()
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x._version
