"""plan -> plug_in -> unplug: the surgery. A plan raises on any doubt before anything is changed."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapters import DENSE_CLASSES, HOST_CLASSES
from .errors import DenseShortcutError
from .norms import Norm
from .ops import BACKENDS
from .shortcut import DenseShortcut, InnerShortcut
from .stage import DenseStage

AGGREGATES = ("stage", "block", "dense_identity")


@dataclass(frozen=True)
class StagePlan:
    """What plugging does to one stage.

    Attributes:
        name: the stage's module name in the host, such as "layer1".
        blocks: the class of its blocks.
        shortcut: the module that will be added to it.
        inner: the DS2 modules that will be added to its blocks, by the block's name in the stage.
    """

    name: str
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
    """What `plug_in` would do; printing it gives a table."""

    stages: tuple[StagePlan, ...]
    aggregate: str
    keep_identity: bool

    @property
    def parameters(self) -> int:
        """Number of parameters added."""
        return sum(stage.parameters for stage in self.stages)

    def __str__(self) -> str:
        rows = [("stage", "blocks", "class", "channels", "pairs", "parameters")]
        rows += [
            (s.name, str(s.depth), s.blocks.__name__, str(s.channels), str(s.pairs), f"{s.parameters:,}")
            for s in self.stages
        ]
        rows.append(("total", "", "", "", str(sum(s.pairs for s in self.stages)), f"{self.parameters:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def plan(
    model: nn.Module,
    *,
    aggregate: str = "stage",
    norm: Norm = "group",
    groups: int | None = None,
    init: str | None = None,
    inner: bool = False,
    keep_identity: bool = False,
    backend: str = "auto",
) -> Plan:
    """What `plug_in` with the same arguments would do. Changes nothing.

    Raises:
        DenseShortcutError: an unknown name, a network with nothing to plug into or already plugged, a block class that
            has no adapter, a group count that does not divide a width.
    """
    if aggregate not in AGGREGATES:
        raise DenseShortcutError(f"unknown aggregate {aggregate!r}: choose one of {', '.join(AGGREGATES)}.")
    if backend not in BACKENDS:
        raise DenseShortcutError(f"unknown back end {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if dense_stages(model):
        raise DenseShortcutError("the network is plugged in already: call dense_shortcuts.unplug(model) first.")
    init = init if init is not None else "zeros" if keep_identity else "nearest"
    stages = []
    for name, stage in _find_stages(model).items():
        blocks = dict(stage.named_children())
        shortcut = DenseShortcut(
            len(blocks),
            _width(name, blocks),
            norm=norm,
            groups=groups,
            init=init,
            weighted=aggregate != "dense_identity",
            backend=backend,
        )
        inners = _inner_shortcuts(name, blocks, norm, groups) if inner else {}
        _check_names(name, stage, blocks)
        stages.append(StagePlan(name, type(next(iter(blocks.values()))), shortcut, inners))
    if inner and not any(s.inner for s in stages):
        raise DenseShortcutError("inner=True (DS2) needs bottleneck blocks and this network has none: leave inner out.")
    return Plan(tuple(stages), aggregate, keep_identity)


def plug_in(
    model: nn.Module,
    *,
    aggregate: str = "stage",
    norm: Norm = "group",
    groups: int | None = None,
    init: str | None = None,
    inner: bool = False,
    keep_identity: bool = False,
    backend: str = "auto",
) -> nn.Module:
    """The same network with dense shortcuts (DSNet), changed in place: weights, module names and hooks are kept.

    Args:
        model: a residual network of timm or torchvision.
        aggregate: "stage" sums the earlier feature maps X_i, "block" the earlier branch outputs F_i, "dense_identity"
            the X_i as they are, without norm and weight (the control).
        norm: "group", "batch", "layer" (over C, H and W of an image), "instance", None, or a callable that takes a
            channel count and returns a module.
        groups: groups of the group norm; None takes 32, fewer where a group would have under four channels.
        init: start of the weights: "nearest" (1 for the nearest map, 0 for the rest), "uniform" (1/l each), "ones",
            "zeros". None takes "nearest", or "zeros" with keep_identity.
        inner: DS2, a weighted shortcut around the 3x3 of each bottleneck as well.
        keep_identity: keep the host's own shortcut beside the dense one. The network then starts as its host.
        backend: form of the operator: "auto", "plain" (PyTorch alone, any device) or "cpu".

    Returns:
        `model`.

    Raises:
        DenseShortcutError: see `plan`; the network is then as it was.

    Source: Sec. 3 of "ResNet or DenseNet? Introducing Dense Shortcuts to ResNet", WACV 2021.
    """
    options = plan(
        model,
        aggregate=aggregate,
        norm=norm,
        groups=groups,
        init=init,
        inner=inner,
        keep_identity=keep_identity,
        backend=backend,
    )
    for stage_plan in options.stages:
        stage = model.get_submodule(stage_plan.name)
        assert isinstance(stage, nn.Sequential)
        _match(stage_plan.shortcut, stage)
        for name, block in stage.named_children():
            block.__class__ = DENSE_CLASSES[type(block)]
            inner_shortcut = stage_plan.inner.get(name)
            if inner_shortcut is not None:
                _match(inner_shortcut, block)
            block.register_module("inner", inner_shortcut)
        DenseStage.adopt(stage, stage_plan.shortcut, aggregate=options.aggregate, keep_identity=options.keep_identity)
    _group_shortcuts_with_blocks(model)
    return model


def unplug(model: nn.Module) -> nn.Module:
    """The host again, in place: its own classes, weights and state-dict keys; what `plug_in` added is dropped.

    Raises:
        DenseShortcutError: the network is not plugged in, or came out of `fuse`.
    """
    stages = dense_stages(model)
    if not stages:
        raise DenseShortcutError("the network is not plugged in: there is nothing to unplug.")
    if any(stage.fused for stage in stages.values()):
        raise DenseShortcutError("the network is fused for inference: unplug the one it was made from.")
    for stage in stages.values():
        for block in stage.blocks:
            del block.inner
            block.__class__ = HOST_CLASSES[type(block)]
        stage.release()
    if isinstance(vars(model).get("group_matcher"), GroupMatcher):
        del model.group_matcher
    return model


@dataclass(frozen=True)
class GroupMatcher:
    """`group_matcher` of a plugged timm network: the host's own patterns, and each block's shortcut with its block.

    timm's layer-wise learning rates and freezing go by it; a name that no pattern matches counts as the head's.
    """

    blocks: dict[str, Any]
    stages: dict[str, Any]

    def __call__(self, coarse: bool = False) -> dict[str, Any]:
        return self.stages if coarse else self.blocks


def dense_stages(model: nn.Module) -> dict[str, DenseStage]:
    """The plugged stages of a network by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DenseStage)}


def shortcut_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter that `plug_in` added, with its name in the network."""
    return [
        (f"{prefix}.{name}", parameter)
        for prefix, module in model.named_modules()
        if isinstance(module, DenseShortcut | InnerShortcut)
        for name, parameter in module.named_parameters()
    ]


def _group_shortcuts_with_blocks(model: nn.Module) -> None:
    """Where timm's patterns know a block as stage.number, let the shortcut into that block belong to it."""
    matcher: Any = getattr(model, "group_matcher", None)
    if not callable(matcher) or "group_matcher" in vars(model):
        return
    blocks, number = matcher(coarse=False), r"\.(\d+)"
    pattern = blocks.get("blocks") if isinstance(blocks, dict) else None
    if isinstance(pattern, str) and pattern.endswith(number):
        shortcuts = pattern.removesuffix(number) + r"\.shortcut\.weights" + number
        blocks = blocks | {"blocks": [(pattern, None), (shortcuts, None)]}
        vars(model)["group_matcher"] = GroupMatcher(blocks, matcher(coarse=True))


def _find_stages(model: nn.Module) -> dict[str, nn.Sequential]:
    """Every nn.Sequential that holds blocks with an adapter, in the host's order."""
    found: dict[str, nn.Sequential] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        classes = [type(child) for child in module.children()]
        adapted = [cls for cls in classes if cls in DENSE_CLASSES]
        if not adapted:
            continue
        if type(module) is not nn.Sequential:
            raise DenseShortcutError(
                f"{name or 'the network'} is a {type(module).__name__} that holds {adapted[0].__name__} blocks: "
                "only blocks in an nn.Sequential, where each feeds the next, can be plugged into."
            )
        other = next((cls for cls in classes if cls not in DENSE_CLASSES), None)
        if other is not None:
            raise DenseShortcutError(_no_adapter(other, name))
        found[name] = module
        seen.update(id(child) for child in module.children())
    if not found:
        raise DenseShortcutError(_nothing_found(model))
    if len(seen) != sum(len(stage) for stage in found.values()):
        raise DenseShortcutError("a block stands in more than one place of the network: share no block between places.")
    return found


def _no_adapter(cls: type[nn.Module], where: str) -> str:
    known = ", ".join(f"{c.__module__.split('.')[0]}'s {c.__name__}" for c in DENSE_CLASSES)
    return (
        f"there is no adapter for the block class {cls.__module__}.{cls.__qualname__} (in {where}), "
        f"so there is nothing to plug into: choose a network of {known}."
    )


def _nothing_found(model: nn.Module) -> str:
    """Names the class that looks most like the network's residual block: by its name, the most frequent one."""
    named = Counter(
        type(module)
        for module in model.modules()
        if re.search("block|bottle|basic|residual|layer", type(module).__name__, re.IGNORECASE)
        and next(module.children(), None) is not None
        and module is not model
    )
    if named:
        return _no_adapter(named.most_common(1)[0][0], type(model).__name__)
    return f"{type(model).__name__} holds no residual blocks: there is nothing to plug into."


def _width(stage: str, blocks: dict[str, nn.Module]) -> int:
    """The stage's width C, once it is known that its blocks share one resolution."""
    for name, block in list(blocks.items())[1:]:
        if block.downsample is not None:
            raise DenseShortcutError(
                f"{stage}.{name} changes the shape in the middle of a stage: put it at the head of its own stage."
            )
    block = next(iter(blocks.values()))
    return DENSE_CLASSES[type(block)].out_channels(block)


def _inner_shortcuts(
    stage: str, blocks: dict[str, nn.Module], norm: Norm, groups: int | None
) -> dict[str, InnerShortcut]:
    inner = {}
    for name, block in blocks.items():
        widths = DENSE_CLASSES[type(block)].inner_widths(block)
        if widths is not None:
            inner[name] = InnerShortcut(*widths, norm=norm, groups=groups)
    return inner


def _check_names(name: str, stage: nn.Sequential, blocks: dict[str, nn.Module]) -> None:
    if "shortcut" in blocks:
        raise DenseShortcutError(f"{name} already has a child named shortcut: rename it.")
    if any(hasattr(block, "inner") for block in blocks.values()):
        raise DenseShortcutError(f"a block of {name} already has an attribute named inner: rename it.")


def _match(added: nn.Module, host: nn.Module) -> None:
    """Give what is added the host's device, floating dtype and mode."""
    like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
    added.to(device=like.device, dtype=like.dtype)
    added.train(host.training)
