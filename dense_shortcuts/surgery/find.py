"""Where a network has rows of residual blocks: its containers, what feeds what in them, and which are residual."""

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
from .loops import Held, feeds

_UNFED = "its container does not feed each block to the next"
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
        blocks: by position, a reading of each block of the rows (`adapters.read`).
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


def find_stages(model: nn.Module) -> tuple[list[Found], list[Refused]]:
    """Every container with rows of residual blocks, in the network's order, and the blocks that stay as they are.

    Raises:
        DenseShortcutError: there is none, or one with a written adapter stands where it cannot be plugged into.
    """
    found: list[Found] = []
    refused: list[Refused] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside) or isinstance(module, torch.jit.ScriptModule):
            continue
        stage = _stage(model, name, module, refused)
        if stage is not None:
            found.append(stage)
            # a residual block of a row is one block, whatever it has inside
            inside += [f"{name}.{stage.names[n]}." if name else f"{stage.names[n]}." for n in stage.blocks]
    if not found:
        raise DenseShortcutError(_nothing_found(model, refused))
    _check_unshared(model, found)
    return found, [refusal for refusal in refused if refusal.container in {stage.name for stage in found}]


def _stage(model: nn.Module, name: str, module: nn.Module, refused: list[Refused]) -> Found | None:
    children = list(module.named_children())
    written = [child for _, child in children if has_adapter(type(child))]
    if not written and not _may_be_container(module):
        return None
    views: dict[int, Any] = {}
    for n, (child_name, child) in enumerate(children):
        try:
            if _may_be_block(child):
                views[n] = read(child)
        except NoResidual as reason:
            refused.append(Refused(type(child), name, child_name, str(reason)))
    rows = tuple(_rows(views, containers.cuts(model, name) or ()))
    if not rows:
        return None
    if not _is_sequence(model, name, module, {n for row in rows for n in range(row.first, row.stop)}):
        if written:
            raise DenseShortcutError(
                f"{name or 'the network'} is a {type(module).__name__} that holds {type(written[0]).__name__} blocks: "
                "only blocks in an nn.Sequential, where each feeds the next, can be plugged into."
            )
        block_name, block = children[next(iter(views))]
        refused.append(Refused(type(block), name, block_name, _UNFED))
        return None
    kept = {n: view for n, view in views.items() if any(row.first <= n < row.stop for row in rows)}
    return Found(name, rows, kept, tuple(child_name for child_name, _ in children))


def _may_be_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList) or containers.is_known(module) or _runs_children(module)


def _may_be_block(module: nn.Module) -> bool:
    """Whether a child may be a residual block: PyTorch's own layers and containers are none, nor what runs children."""
    if isinstance(module, torch.jit.ScriptModule):
        return True  # to be refused with the reason: it has no forward pass that could be looked at
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao."))
    if own or next(module.children(), None) is None:
        return False
    return has_adapter(type(module)) or not (type(module).forward is nn.Sequential.forward or _runs_children(module))


def _rows(views: dict[int, Any], cuts: tuple[int, ...]) -> Iterator[Segment]:
    """Cut the residual blocks of a container into rows that share a shape.

    A row begins with a block that projects its input, with the first block behind any other layer, and with those of
    `cuts`, before which the container's owner changes the map.
    """
    first: int | None = None
    count = 0

    def row(stop: int) -> Iterator[Segment]:
        nonlocal count
        assert first is not None
        if any(views[n].is_certain() for n in range(first, stop)):
            count += 1
            yield Segment(first, stop, "shortcut" if count == 1 else f"shortcut{count}")

    last = max(views, default=-1)
    for n in range(last + 2):
        ends = n not in views or n in cuts or views[n].projects() or (first is not None and _changes_width(views, n))
        if first is not None and ends:
            yield from row(n)
            first = None
        if n in views and first is None:
            first = n


def _changes_width(views: dict[int, Any], n: int) -> bool:
    return views[n].out_channels() != views[n - 1].out_channels() or views[n].tokens != views[n - 1].tokens


def _is_sequence(model: nn.Module, name: str, module: nn.Module, kept: set[int]) -> bool:
    """Whether the blocks of a container at these positions are run one after the other, as far as sources show."""
    if isinstance(module, nn.Sequential):
        plain = type(module).forward is nn.Sequential.forward
        return plain and False not in _verdicts(model, name, kept)
    if isinstance(module, nn.ModuleList):
        if containers.cuts(model, name) is not None:
            return True
        verdicts = _verdicts(model, name, kept)
        return True in verdicts and False not in verdicts
    return containers.is_known(module) or _runs_children(module)


def _runs_children(module: nn.Module) -> bool:
    """Whether a module's own forward pass is a loop over its children."""
    cls: Any = type(module)
    return _own_code(cls) and feeds(cls, Held("children()")) is True


def _verdicts(model: nn.Module, name: str, kept: set[int]) -> set[bool]:
    """What the modules around a container, whose code is somebody's own, do with its blocks (`loops.feeds`)."""
    parts, found = name.split("."), set()
    for n in range(len(parts)):
        owner: Any = type(model.get_submodule(".".join(parts[:n])))
        if not _own_code(owner):
            continue
        inner = [_is_list(model.get_submodule(".".join(parts[:k]))) for k in range(n + 1, len(parts))]
        depth = inner[::-1].index(False) if False in inner else len(inner)
        if any(inner[: len(inner) - depth]):
            continue  # a list of modules that have the container: nothing in it has a name of its own
        path = ".".join(parts[n : len(parts) - depth])
        count = len(model.get_submodule(name)._modules)
        verdict = feeds(owner, Held(path, depth, frozenset(kept), count))
        if verdict is not None:
            found.add(verdict)
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward


def _own_code(cls: type[nn.Module]) -> bool:
    return not cls.__module__.startswith("torch.")


def _check_unshared(model: nn.Module, found: list[Found]) -> None:
    """A block that stands in two places has no single row of earlier maps."""
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
    if one.reason in (_UNFED, _ALONE):
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
    """Modules outside any row that are residual blocks by their name or by a trace."""
    for name, module in model.named_modules():
        if module is model or next(module.children(), None) is None:
            continue
        parent, _, own = name.rpartition(".")
        try:
            yield Refused(type(module), parent, own, _ALONE if read(module).is_certain() else _UNCERTAIN)
        except NoResidual as reason:
            if re.search("block|bottle|basic|residual|layer", type(module).__name__, re.IGNORECASE):
                yield Refused(type(module), parent, own, str(reason))
