"""Where a network has segments of residual blocks: its containers, what feeds what in them, and which are residual."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import NoResidual, containers, has_adapter, read
from ..adapters.example import example
from ..adapters.tracing.trace import SEVERAL
from ..errors import DenseShortcutError
from ..nn.connectivity import Segment
from .observe import Observation, Seen, is_list, observe

_UNFED = "its container does not feed each block to the next"
_UNFED_KNOWN = (
    ", and does not give each block what the one before gave back: only blocks that feed one another, in an "
    "nn.Sequential or an nn.ModuleList, can be plugged into"
)
_UNSEEN = (
    "a list is plugged into only where the network is seen to feed each block to the next, and that could not be seen: "
    "give an input that it takes, example=x"
)
_ALONE = "it stands in no sequence where each block feeds the next"
_UNCERTAIN = (
    "it adds two branches, neither of which is its input as it is or has a name such as downsample, shortcut or skip"
)


@dataclass(frozen=True)
class Found:
    """A container whose blocks feed one another.

    Attributes:
        name: its module name in the network.
        segments: segments of residual blocks.
        blocks: by position, a reading of each block of the segments (`adapters.read`).
        names: the blocks' names in the container, all of them in order.
    """

    name: str
    segments: tuple[Segment, ...]
    blocks: dict[int, Any]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A block that was not understood: its class, its container and name there, and why."""

    cls: type[nn.Module]
    container: str
    name: str
    reason: str

    @property
    def where(self) -> str:
        return f"{self.container}.{self.name}".strip(".")


def find_stages(model: nn.Module, example: Any = None) -> tuple[list[Found], list[Refused]]:
    """Every container with segments of residual blocks, in the network's order, and the blocks that stay as they are.

    Args:
        model: the network.
        example: what it may be run on, as `plug_in` takes it.

    Raises:
        DenseShortcutError: there is none, or one with a written adapter stands where it cannot be plugged into.
    """
    found: list[Found] = []
    refused: list[Refused] = []
    inside: list[str] = []
    observed = observe(model, example)
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside) or isinstance(module, torch.jit.ScriptModule):
            continue
        stage = _stage(name, module, observed, refused)
        if stage is not None:
            found.append(stage)
            # a residual block of a segment is one block, whatever it has inside
            inside += [f"{name}.{stage.names[n]}." if name else f"{stage.names[n]}." for n in stage.blocks]
    if not found:
        raise DenseShortcutError(_nothing_found(model, refused))
    _check_unshared(model, found)
    names = {stage.name for stage in found}
    return found, [each for each in refused if each.container in names or each.reason.startswith(_UNSEEN)]


def _stage(name: str, module: nn.Module, observed: Observation, refused: list[Refused]) -> Found | None:
    children = list(module.named_children())
    written = [child for _, child in children if has_adapter(type(child))]
    if not written and not isinstance(module, nn.Sequential | nn.ModuleList) and not containers.is_known(module):
        return None
    views: dict[int, Any] = {}
    for n, (child_name, child) in enumerate(children):
        try:
            if _may_be_block(child):
                views[n] = read(child)
        except NoResidual as error:
            refused.append(Refused(type(child), name, child_name, str(error)))
    seen = observed.containers.get(name, Seen())
    segments = tuple(_segments(views, seen.unfed()))
    if not segments:
        return None
    unfed = _why_unfed(module, segments, len(list(_segments(views, set()))), seen, observed.failure)
    if unfed and written:
        holds = f"{name or 'the network'} is a {type(module).__name__} that holds {type(written[0]).__name__} blocks"
        raise DenseShortcutError(f"{holds}{_UNFED_KNOWN if unfed == _UNFED else f': {unfed}'}.")
    if unfed:
        block_name, block = children[next(iter(views))]
        refused.append(Refused(type(block), name, block_name, unfed))
        return None
    kept = {n: view for n, view in views.items() if any(each.first <= n < each.stop for each in segments)}
    return Found(name, segments, kept, tuple(child_name for child_name, _ in children))


def _may_be_block(module: nn.Module) -> bool:
    """Whether a child may be a residual block: PyTorch's own layers and containers are none, nor what runs children."""
    if isinstance(module, torch.jit.ScriptModule):
        return True  # to be refused with the reason: it has no forward pass that could be looked at
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao."))
    if own or next(module.children(), None) is None:
        return False
    runs = type(module).forward is nn.Sequential.forward or containers.runs_children(module)
    return has_adapter(type(module)) or not runs


def _segments(views: dict[int, Any], cuts: set[int]) -> Iterator[Segment]:
    """Cut the residual blocks of a container into segments that share a shape.

    A segment begins with a block that projects its input, with the first block behind any other layer, and with those
    of `cuts`, before which the container's owner changes the map.
    """
    first: int | None = None
    count = 0

    def segment(stop: int) -> Iterator[Segment]:
        nonlocal count
        assert first is not None
        if any(views[n].is_certain() for n in range(first, stop)):
            count += 1
            yield Segment(first, stop, "shortcut" if count == 1 else f"shortcut{count}")

    last = max(views, default=-1)
    for n in range(last + 2):
        ends = n not in views or n in cuts or views[n].projects() or (first is not None and _changes_width(views, n))
        if first is not None and ends:
            yield from segment(n)
            first = None
        if n in views and first is None:
            first = n


def _changes_width(views: dict[int, Any], n: int) -> bool:
    return views[n].out_channels() != views[n - 1].out_channels() or views[n].tokens != views[n - 1].tokens


def _why_unfed(module: nn.Module, segments: tuple[Segment, ...], uncut: int, seen: Seen, failure: str) -> str:
    """Why the blocks of a container are no sequence, as far as was seen; "" where they are one.

    Args:
        module: the container.
        segments: its segments, cut where a block is not given what the one before gave back.
        uncut: how many segments there would be without these cuts.
        seen: what the network did with its blocks.
        failure: why the network could not be run, "" where it was.
    """
    if containers.is_known(module):
        return ""
    if not is_list(module):
        return _UNFED
    blocks = {n for each in segments for n in range(each.first, each.stop)}
    if not seen.fired or (failure and not blocks <= set(seen.fired)):  # a stage looks again as it runs
        return "" if isinstance(module, nn.Sequential) else f"{_UNSEEN} ({failure or 'it ran without these blocks'})"
    alone = len(segments) > uncut + 1 and all(each.stop - each.first == 1 for each in segments)
    return _UNFED if alone or seen.shares() or not blocks <= seen.called() else ""


def _check_unshared(model: nn.Module, found: list[Found]) -> None:
    """A block that stands in two places has no single segment of earlier maps."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for stage in found:
        container = model.get_submodule(stage.name)
        if any(places[id(container.get_submodule(stage.names[n]))] > 1 for n in stage.blocks):
            raise DenseShortcutError(
                "a block stands in more than one place of the network: share no block between places."
            )


def _nothing_found(model: nn.Module, refused: list[Refused]) -> str:
    """Names the block class that came nearest to one, what was looked for, and the adapter that would teach it.

    Where that class has an adapter, all that is left to say is why the adapter does not take the block.
    """
    name = type(model).__name__
    known = next((refusal for refusal in refused if has_adapter(refusal.cls)), None)
    if known is not None:
        return f"{name} has nothing to plug into. {known.cls.__qualname__} at {known.where}: {known.reason}."
    near = refused or list(_scattered(model))
    often = Counter(refusal.cls for refusal in near).most_common(1)
    if not often:
        return f"{name} holds no residual blocks: there is nothing to plug into."
    cls = often[0][0]
    one = next(refusal for refusal in near if refusal.cls is cls)
    if issubclass(cls, torch.jit.ScriptModule):  # whose code cannot be changed by any adapter
        return f"{name} has nothing to plug into. {one.where}: {one.reason}."
    if one.reason.startswith((_UNFED, _ALONE, _UNSEEN)):
        return (
            f"{name} has nothing to plug into. {cls.__qualname__} at {one.where} is a residual block, but {one.reason}."
        )
    return (
        f"{name} holds no sequence of residual blocks that is understood, so there is nothing to plug into. "
        f"{cls.__module__}.{cls.__qualname__} at {one.where} has no adapter; a trace of its forward pass was searched "
        f"for the add that joins a branch and its input: {one.reason}. If it is a residual block, teach it:"
        f"\n\n{example(cls, several=one.reason == SEVERAL)}"
    )


def _scattered(model: nn.Module) -> Iterator[Refused]:
    """Modules outside any segment that are residual blocks by their name or by a trace."""
    for name, module in model.named_modules():
        if module is model or next(module.children(), None) is None:
            continue
        parent, _, own = name.rpartition(".")
        try:
            yield Refused(type(module), parent, own, _ALONE if read(module).is_certain() else _UNCERTAIN)
        except NoResidual as reason:
            if re.search("block|bottle|basic|residual|layer", type(module).__name__, re.IGNORECASE):
                yield Refused(type(module), parent, own, str(reason))
