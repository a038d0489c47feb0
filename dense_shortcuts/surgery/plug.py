"""plan, plug_in, unplug: the surgery on a network. A plan raises on any doubt, before anything is changed."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .. import adapters
from ..adapters import DenseBlock, containers
from ..adapters import families as families  # registers their adapters
from ..errors import DenseShortcutError
from ..nn.connectivity import PATTERNS, Segment, sources
from ..nn.inner_shortcut import InnerShortcut
from ..nn.norms import NORMS, Norm
from ..nn.shortcut import DenseShortcut
from ..nn.stage import DenseStage
from ..nn.weighting import INITS
from ..ops import BACKENDS
from . import layer_groups
from .find import Found, Refused, find_stages

AGGREGATES = ("stage", "block", "dense_identity")

Blocks = Collection[str] | str | re.Pattern[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Options:
    """The keywords of `plug_in`, which documents them."""

    aggregate: str = "stage"
    norm: Norm = "auto"
    groups: int | None = None
    center: bool = True
    init: str | None = None
    weighting: str = "channel"
    pattern: str = "all"
    window: int | None = None
    every: int = 1
    stages: Sequence[int | str] | None = None
    blocks: Blocks = None
    inner: bool = False
    inner_start: float = 0.0
    keep_identity: bool = False
    backend: str = "auto"

    def start(self) -> str:
        """The initial weights by name, with None resolved."""
        if self.init is not None:
            return self.init
        if self.keep_identity:
            return "zeros"
        return "nearest" if self.weighting == "gate" else "uniform"


@dataclass(frozen=True)
class StagePlan:
    """What `plug_in` does to one segment, which in most networks is a whole stage.

    Attributes:
        name: the module name of the container in the host, such as "layer1".
        segment: the segment of the container.
        blocks: the class of its blocks.
        shortcut: the dense shortcut to be added.
        inner: the DS2 shortcuts to be added to its blocks, by the block's name in the container.
    """

    name: str
    segment: Segment
    blocks: type[nn.Module]
    shortcut: DenseShortcut
    inner: dict[str, InnerShortcut]

    @property
    def depth(self) -> int:
        return self.shortcut.depth

    @property
    def channels(self) -> int:
        return self.shortcut.channels

    @property
    def pairs(self) -> int:
        return self.shortcut.pairs

    @property
    def parameters(self) -> int:
        """Number of parameters added."""
        added = [self.shortcut, *self.inner.values()]
        return sum(p.numel() for module in added for p in module.parameters())


@dataclass(frozen=True)
class Plan:
    """What `plug_in` would do; printing it gives a table.

    Attributes:
        stages: a plan for each segment.
        found: the containers of these segments.
        refused: blocks in these containers that stay as they are, with the reasons.
        options: the keywords of this plan.
    """

    stages: tuple[StagePlan, ...]
    found: tuple[Found, ...]
    refused: tuple[Refused, ...]
    options: Options

    @property
    def parameters(self) -> int:
        """Number of parameters added."""
        return sum(stage.parameters for stage in self.stages)

    def __str__(self) -> str:
        rows = [("stage", "blocks", "class", "channels", "pairs", "parameters")]
        rows += [
            (s.name or "(itself)", str(s.depth), s.blocks.__name__, str(s.channels), str(s.pairs), f"{s.parameters:,}")
            for s in self.stages
        ]
        rows.append(("total", "", "", "", str(sum(s.pairs for s in self.stages)), f"{self.parameters:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{r.where} ({r.cls.__name__}) stays as it is: {r.reason}" for r in self.refused]
        return "\n".join(lines)


def plan(model: nn.Module, *, example: Any = None, **options: Any) -> Plan:
    """What `plug_in` with the same keywords would do, stage by stage; printing it gives a table. Changes nothing.

    Raises:
        TypeError: a keyword that `plug_in` does not have.
        DenseShortcutError: an unknown name or number, a network with nothing to plug into or already plugged, an
            unsupported block class, a group count that does not divide the number of channels.
    """
    return plan_options(model, _options(options), example)


def _options(given: dict[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"plan got an unexpected keyword {name!r}{f': did you mean {near[0]!r}?' if near else ''}")
    return Options(**given)


def plan_options(model: nn.Module, options: Options, example: Any = None) -> Plan:
    """`plan` with the options in one piece."""
    _check_options(options)
    _check_model(model)
    found, refused = find_stages(model, example)
    chosen = _chosen_stages(found, options)
    _check_blocks(found, options.blocks)
    segments = [(stage, segment) for stage in chosen for segment in stage.segments]
    stages = [_plan_segment(model, *each, options) for each in segments if any(_sources(model, *each, options))]
    if not stages:
        raise DenseShortcutError(
            f"no block is chosen by stages={options.stages!r}, blocks={options.blocks!r} and every={options.every}: "
            f"the network's stages are {', '.join(stage.name or 'itself' for stage in found)}."
        )
    if options.inner and not any(s.inner for s in stages):
        raise DenseShortcutError("inner=True (DS2) needs bottleneck blocks and this network has none: leave inner out.")
    names = {stage.name for stage in stages}
    others = {stage.name for stage in found} - names
    kept = tuple(refusal for refusal in refused if refusal.container not in others)
    return Plan(tuple(stages), tuple(stage for stage in chosen if stage.name in names), kept, options)


def _plan_segment(model: nn.Module, stage: Found, segment: Segment, options: Options) -> StagePlan:
    container = model.get_submodule(stage.name)
    blocks = {stage.names[n]: stage.blocks[n] for n in range(segment.first, segment.stop)}
    devices = {str(p.device) for name in blocks for p in container.get_submodule(name).parameters()}
    if len(devices) > 1:
        raise DenseShortcutError(
            f"the blocks of {stage.name or 'the network'} are on {' and '.join(sorted(devices))}: a stage sums the "
            "feature maps of its blocks, so move it to one device."
        )
    first = next(iter(blocks.values()))
    shortcut = DenseShortcut(
        len(blocks),
        first.out_channels(),
        norm=options.norm,
        groups=options.groups,
        center=options.center,
        init=options.start(),
        weighted=options.aggregate != "dense_identity",
        weighting=options.weighting,
        backend=options.backend,
        sources=_sources(model, stage, segment, options),
        tokens=first.tokens,
    )
    if hasattr(container, segment.shortcut):
        raise DenseShortcutError(f"{stage.name} already has a child named {segment.shortcut}: rename it.")
    inner = _inner_shortcuts(blocks, options) if options.inner else {}
    if any(isinstance(block, DenseBlock) and hasattr(block, "inner") for block in blocks.values()):
        raise DenseShortcutError(f"a block of {stage.name} already has an attribute named inner: rename it.")
    return StagePlan(stage.name, segment, adapters.host_of(first), shortcut, inner)


def _inner_shortcuts(blocks: dict[str, Any], options: Options) -> dict[str, InnerShortcut]:
    inner = {}
    for name, block in blocks.items():
        widths = block.inner_widths()
        if widths is not None:
            inner[name] = InnerShortcut(
                *widths,
                norm=options.norm,
                groups=options.groups,
                center=options.center,
                start=options.inner_start,
                backend=options.backend,
            )
    return inner


def _chosen_stages(found: list[Found], options: Options) -> list[Found]:
    """The stages chosen by number, from 1, or by name."""
    if options.stages is None:
        return found
    names = [stage.name for stage in found]
    for wanted in options.stages:
        if wanted not in names and (isinstance(wanted, bool) or wanted not in range(1, len(found) + 1)):
            raise DenseShortcutError(
                f"there is no stage {wanted!r}: the network has stages 1 to {len(found)}, named {', '.join(names)}."
            )
    return [stage for n, stage in enumerate(found, 1) if n in options.stages or stage.name in options.stages]


def _check_blocks(found: list[Found], blocks: Blocks) -> None:
    """Check that every name in a list of blocks exists."""
    if blocks is None or isinstance(blocks, str | re.Pattern) or callable(blocks):
        return
    known = [f"{stage.name}.{stage.names[n]}".lstrip(".") for stage in found for n in stage.blocks]
    for name in blocks:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            told = f"did you mean {near[0]!r}" if near else f"they are {', '.join(known)}"
            raise DenseShortcutError(f"there is no block {name!r} in the network's stages: {told}.")


def _sources(model: nn.Module, stage: Found, segment: Segment, options: Options) -> tuple[tuple[int, ...], ...]:
    """The maps that each block of a segment sums; none for a block that is not chosen."""
    chosen = []
    for k, n in enumerate(range(segment.first, segment.stop)):
        name = f"{stage.name}.{stage.names[n]}".lstrip(".")
        chosen.append((k + 1) % options.every == 0 and _is_chosen(name, model.get_submodule(name), options.blocks))
    return sources(chosen, pattern=options.pattern, window=options.window)


def _is_chosen(name: str, block: nn.Module, blocks: Blocks) -> bool:
    if blocks is None:
        return True
    if isinstance(blocks, str | re.Pattern):
        return re.search(blocks, name) is not None
    return bool(blocks(name, block)) if callable(blocks) else name in blocks


def _check_options(options: Options) -> None:
    for what, value, known in (
        ("aggregate", options.aggregate, AGGREGATES),
        ("back end", options.backend, BACKENDS),
        ("pattern", options.pattern, tuple(PATTERNS)),
    ):
        if value not in known:
            raise DenseShortcutError(f"unknown {what} {value!r}: choose one of {', '.join(known)}.")
    for name in ("window", "every", "groups"):
        value = getattr(options, name)
        if value is not None and (type(value) is not int or value < 1):
            raise DenseShortcutError(f"{name}={value!r} is not valid: give a whole number, 1 or above.")
    if options.stages is not None and (isinstance(options.stages, str) or not isinstance(options.stages, Iterable)):
        raise DenseShortcutError(f"stages={options.stages!r} is one stage: give a list, [{options.stages!r}].")
    for what, word, names in (("norm", options.norm, NORMS), ("init", options.start(), INITS)):
        if isinstance(word, str) and word not in names:
            raise DenseShortcutError(f"unknown {what} {word!r}: choose one of {', '.join(names)}.")
    if not options.center and (callable(options.norm) or options.norm in (None, "none")):
        raise DenseShortcutError(
            "center=False is for a norm by name, such as norm='group': leave it out, and let a factory make norms "
            "without centring."
        )
    if isinstance(options.norm, nn.Module):
        raise DenseShortcutError(
            f"norm is a single {type(options.norm).__name__}, but every map needs its own: give a callable that takes "
            "a channel count and returns a module."
        )
    if options.keep_identity and options.weighting != "channel":
        raise DenseShortcutError(
            f"weighting={options.weighting!r} cannot start at zero, so the network would not start as its host with "
            "keep_identity: leave one of the two out."
        )
    if isinstance(options.blocks, str):
        try:
            re.compile(options.blocks)
        except re.error as error:
            raise DenseShortcutError(f"blocks={options.blocks!r} is not a regular expression: {error}.") from error


def _check_model(model: nn.Module) -> None:
    """Raise for a network that is wrapped, scripted, traced or plugged in already, and for anything but a module."""
    if not isinstance(model, nn.Module):
        raise DenseShortcutError(
            f"{model!r} is not a network: give an nn.Module, such as timm.create_model('resnet50')."
        )
    wrappers = {
        "OptimizedModule": "compiled: plug the network in first and compile it then",
        "DistributedDataParallel": "wrapped in DistributedDataParallel: plug the network in first and wrap it then",
        "DataParallel": "wrapped in DataParallel: plug the network in first and wrap it then",
        "FullyShardedDataParallel": "wrapped in FullyShardedDataParallel: plug the network in first and wrap it then",
    }
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in wrappers and type(module).__module__.startswith("torch."):
            raise DenseShortcutError(f"{name or 'the network'} is {wrappers[kind]}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise DenseShortcutError("the network is scripted, so its code cannot be changed: plug the original in.")
    if isinstance(model, torch.fx.GraphModule):
        raise DenseShortcutError("the network is a traced graph, which has no blocks: plug the original in.")
    if dense_stages(model):
        raise DenseShortcutError("the network is plugged in already: call dense_shortcuts.unplug(model) first.")


def plug_in(
    model: nn.Module,
    *,
    aggregate: str = "stage",
    norm: Norm = "auto",
    groups: int | None = None,
    center: bool = True,
    init: str | None = None,
    weighting: str = "channel",
    pattern: str = "all",
    window: int | None = None,
    every: int = 1,
    stages: Sequence[int | str] | None = None,
    blocks: Blocks = None,
    inner: bool = False,
    inner_start: float = 0.0,
    keep_identity: bool = False,
    backend: str = "auto",
    example: Any = None,
) -> nn.Module:
    """The same network with dense shortcuts (DSNet), changed in place: weights, module names and hooks are kept.

    Args:
        model: a network with residual blocks in a sequence, of timm, torchvision, transformers or your own.
        aggregate: "stage" sums the earlier feature maps X_i, "block" the earlier branch outputs F_i, "dense_identity"
            the X_i as they are, without norm and weight (the control).
        norm: "group", "batch", "layer" (over C, H and W of an image; for tokens over C), "instance", "none" (or None,
            which `timm.create_model` does not pass on), or a callable that takes a channel count and returns a module.
            "auto" is "layer" for tokens, and "batch" for feature maps.
        groups: groups of the group norm; None means 32, or fewer to keep four channels per group.
        center: whether the norm subtracts the mean, as in the paper; False divides by the root mean square alone, so
            maps behind a ReLU stay non-negative and keep their direction.
        init: initial weights: "nearest" (1 for the nearest map, 0 for the rest), "uniform" (1/l each), "ones", "zeros",
            "random" (-1 to 1). None means "uniform", or "zeros" with keep_identity, or "nearest" with gates.
        weighting: "channel", as in the paper; "softmax", "gate" or "attention", as in related methods (`weighting.py`).
        pattern: "all" earlier maps, or only those a power of two back ("powers", about log2(L) maps per block).
        window: sum only the nearest `window` maps; None for all.
        every: add a dense shortcut to every n-th block of a segment only; the others keep the host's.
        stages: which stages, by number from 1 in the network's order or by module name; None for all.
        blocks: which blocks: a list of module names, a regular expression (text or compiled) to search in them, or a
            callable that takes name and module; the others keep the host's shortcut. None for all.
        inner: DS2, a weighted shortcut around the 3x3 of each bottleneck as well.
        inner_start: initial value of its weight v.
        keep_identity: keep the host's own shortcut beside the dense one. The network then starts as its host, unless
            `init`, `inner_start` or "dense_identity" changes that.
        backend: "auto", "plain" (PyTorch only, any device), "native" (compiled, CPU) or "triton" (CUDA).
        example: an input of the network, a tuple of its arguments or a dict of its keywords. Only shapes and dtypes are
            used: the network runs on tensors without data to show what it does with its blocks. None makes images of
            the size that the network names, or of a common one.

    Returns:
        `model`.

    Raises:
        DenseShortcutError: see `plan`; the network is then unchanged.

    Source: Sec. 3 of "ResNet or DenseNet? Introducing Dense Shortcuts to ResNet", WACV 2021.
    """
    options = Options(
        aggregate=aggregate,
        norm=norm,
        groups=groups,
        center=center,
        init=init,
        weighting=weighting,
        pattern=pattern,
        window=window,
        every=every,
        stages=stages,
        blocks=blocks,
        inner=inner,
        inner_start=inner_start,
        keep_identity=keep_identity,
        backend=backend,
    )
    planned = plan_options(model, options, example)
    _match_hosts(model, planned)
    for stage in planned.found:
        _plug_stage(model.get_submodule(stage.name), stage, planned)
    layer_groups.group_with_blocks(model)
    return model


def _match_hosts(model: nn.Module, planned: Plan) -> None:
    """Move what will be added to the host's device, dtype and mode; this may fail, so it precedes all changes."""
    for stage in planned.found:
        container = model.get_submodule(stage.name)
        for segment_plan in (each for each in planned.stages if each.name == stage.name):
            first = container.get_submodule(stage.names[segment_plan.segment.first])
            _match(segment_plan.shortcut, first, container.training)
            for name, inner in segment_plan.inner.items():
                block = container.get_submodule(name)
                _match(inner, block, block.training)


def _plug_stage(container: nn.Module, stage: Found, planned: Plan) -> None:
    plans = {each.segment: each for each in planned.stages if each.name == stage.name}
    for segment, segment_plan in plans.items():
        for n in range(segment.first, segment.stop):
            name = stage.names[n]
            adapters.plug(container.get_submodule(name), stage.blocks[n], segment_plan.inner.get(name))
    shortcuts = {segment: segment_plan.shortcut for segment, segment_plan in plans.items()}
    aggregate, keep_identity = planned.options.aggregate, planned.options.keep_identity
    dense = containers.dense_class(container)
    dense.adopt(container, shortcuts, aggregate=aggregate, keep_identity=keep_identity)


def unplug(model: nn.Module) -> nn.Module:
    """The host again, restored in place: its classes, weights and state-dict keys, without what `plug_in` added.

    Raises:
        DenseShortcutError: the network is not plugged in, or is a result of `fuse`.
    """
    stages = dense_stages(model)
    if not stages:
        raise DenseShortcutError("the network is not plugged in: there is nothing to unplug.")
    if any(stage.fused for stage in stages.values()):
        raise DenseShortcutError("the network is fused for inference: unplug the one it was made from.")
    for stage in stages.values():
        blocks = stage.blocks
        for segment in stage.segments:
            for block in blocks[segment.first : segment.stop]:
                adapters.unplug(block)
        stage.release()
    layer_groups.ungroup(model)
    return model


def dense_stages(model: nn.Module) -> dict[str, DenseStage]:
    """The plugged stages of a network, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DenseStage)}


def shortcut_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter that `plug_in` added, with its name in the network."""
    return [
        (f"{prefix}.{name}", parameter)
        for prefix, module in model.named_modules()
        if isinstance(module, DenseShortcut | InnerShortcut)
        for name, parameter in module.named_parameters()
    ]


def shortcut_norms(model: nn.Module) -> list[nn.Module]:
    """The norms N of every dense shortcut of a network."""
    return [norm for module in model.modules() if isinstance(module, DenseShortcut) for norm in module.norms]


def _match(added: nn.Module, host: nn.Module, training: bool) -> None:
    """Move an added module to the host's device and floating dtype, and set its mode."""
    like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
    added.to(device=like.device, dtype=like.dtype)
    added.train(training)
