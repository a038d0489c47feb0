"""Whether what was worked out from a network's modules still holds."""

from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from .. import ops
from .hooks import GLOBAL_HOOKS, HOOKS, hooks_of

_OF_ANY_MODULE = set(nn.Module().__dict__) - {"training"}


class Watch:
    """A stage and the modules in it as they were when the watch was set up: which they are, and that nobody looks.

    To look again takes no line of Python for each module, unlike walking over them: between two convolutions such lines
    are slow. Nothing here refers to the stage itself, which could not be freed at once then.

    Args:
        stage: the stage, without hooks in it (`hooks.has_hooks`).
        closely: modules in it of which every attribute, parameter and buffer counts too; of the stage they all do.
    """

    def __init__(self, stage: nn.Module, closely: Iterable[nn.Module]) -> None:
        self.closely = list(closely)
        _, *inside = dict.fromkeys([*stage.modules(), *self.closely])
        self.hooks = [hooks for one in (stage, *inside) for hooks in hooks_of(one)]
        self.attributes = [one.__dict__ for one in inside]
        self.counts = [*map(len, self.attributes)]  # one more where `forward` is replaced on the module itself
        self.children = [one._modules for one in (stage, *inside)]
        self.had = [*map(dict, self.children)]
        self.types = [*map(type, self.closely)]
        self.own = _attributes(stage)
        read = [(part, name, value) for one in self.closely for part, name, value in _parts(one)]
        # those who take away all hooks may put another dictionary in their place
        read += [
            (one.__dict__, name, getattr(one, name)) for one in (*stage.children(), *self.closely) for name in HOOKS
        ]
        self.dicts, self.names, self.values = zip(*read, strict=True)

    def covers(self, tensors: Iterable[Tensor]) -> bool:
        """Whether other tensors in place of these would be noticed."""
        return set(map(id, tensors)) <= set(map(id, self.values))

    def is_lasting(self) -> bool:
        """Whether what is watched is the modules' own, not made for one pass, with a graph that would be kept too."""
        return all(value.is_leaf for value in self.values if isinstance(value, Tensor))

    def holds(self, stage: nn.Module) -> bool:
        """Whether all is as it was, and `stage` the one that the watch was set up for, not a copy of it."""
        return (
            stage._modules is self.children[0]
            and not any(GLOBAL_HOOKS)
            and not any(self.hooks)
            and [*map(len, self.attributes)] == self.counts
            and self.children == self.had
            and [*map(type, self.closely)] == self.types
            and all(map(is_, map(stage.__dict__.get, self.own), self.own.values()))
            and all(map(is_, map(dict.get, self.dicts, self.names), self.values))
        )


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OF_ANY_MODULE}


def _parts(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The attributes, parameters and buffers of a module itself: where each is kept, its name and what it is."""
    yield from ((module.__dict__, name, value) for name, value in _attributes(module).items())
    for part in (module._parameters, module._buffers):
        yield from ((part, name, value) for name, value in part.items())


class Repeat:
    """How a pass ran a row of blocks, for others to do the same.

    Args:
        run: what is prepared.
        given: for each block what it was prepared for.
        read: the tensors whose addresses it took: parameters and buffers, or what was made of them, which serves for
            one pass alone.

    Attributes:
        trains: whether gradients were recorded.
        watched: whether a watch tells when it no longer holds.
    """

    def __init__(self, run: ops.Stream | ops.Plan, given: Sequence[Any], read: Sequence[Tensor]) -> None:
        self.run, self.given, self.read, self.watched = run, given, read, False
        self.trains, self.circumstances = isinstance(run, ops.Plan), ops.circumstances()
        # by another name each, so that no other tensor is put where one of them was, if its numbers move
        self.held, self.found = [t.detach() for t in read], [t.data_ptr() for t in read]

    def modules(self) -> list[nn.Module]:
        """The modules that were given."""
        return [part for parts in self.given for part in parts if isinstance(part, nn.Module)]

    def put_under(self, watch: Watch) -> bool:
        """Whether a watch over the modules that were given tells of all that it goes by."""
        self.watched = watch.covers(self.read)
        return self.watched

    def serves(self, k: int, branch: Tensor, given: Any) -> bool:
        """Whether block l = k + 1 gives the same as then, and its map is to be made under the same mode."""
        return self.given[k] == given and self.run.takes(branch) and is_grad_enabled() is self.trains

    def holds(self) -> bool:
        """Whether the same back end is chosen, and the numbers of all tensors are where they were and laid out so."""
        there = [*map(Tensor.data_ptr, self.read)] == self.found and all(map(Tensor.is_contiguous, self.read))
        return there and ops.circumstances() == self.circumstances
