"""timm's layer groups, on which layer-wise learning rates and freezing rely, for a plugged network."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn.stage import DenseStage

Patterns = dict[str, Any]


@dataclass(frozen=True)
class GroupMatcher:
    """`group_matcher` of a plugged timm network: the host's patterns, and each block's shortcut in the block's group.

    timm puts names that no pattern matches into the head's group.
    """

    blocks: Patterns
    stages: Patterns

    def __call__(self, coarse: bool = False) -> Patterns:
        return self.stages if coarse else self.blocks


def group_with_blocks(model: nn.Module) -> None:
    """Put each block's shortcut into the block's group, if timm's patterns give the block one."""
    matcher: Any = getattr(model, "group_matcher", None)
    if not callable(matcher) or "group_matcher" in vars(model):
        return
    patterns = [matcher(coarse=coarse) for coarse in (False, True)]
    if all(isinstance(given, dict) for given in patterns):
        owners = list(_owners(model))
        vars(model)["group_matcher"] = GroupMatcher(*(_with_shortcuts(given, owners) for given in patterns))


def ungroup(model: nn.Module) -> None:
    """Undo `group_with_blocks`."""
    if isinstance(vars(model).get("group_matcher"), GroupMatcher):
        del model.group_matcher


def _owners(model: nn.Module) -> Iterator[tuple[str, str]]:
    """A regular expression for the parameters of each block's shortcut, and the block's module name.

    Parameters of norms, which only custom norms have, belong to the first block of their segment.
    """
    for name, stage in model.named_modules():
        if not isinstance(stage, DenseStage):
            continue
        prefix, names = f"{name}." if name else "", stage.block_names
        for segment, shortcut in stage.shortcuts.items():
            own = re.escape(f"{prefix}{segment.shortcut}.")
            for n, k in enumerate(shortcut.summing):
                yield rf"^{own}weights\.{n}$", f"{prefix}{names[segment.first + k]}"
            yield rf"^{own}norms\.", f"{prefix}{names[segment.first]}"


def _with_shortcuts(patterns: Patterns, owners: list[tuple[str, str]]) -> Patterns:
    """timm's patterns, with one for each shortcut before those that match its block."""
    added = defaultdict(list)
    for shortcut, block in owners:
        found = _group(patterns, block)
        if found is not None:
            added[found[0]].append((shortcut, found[1]))
    return {key: added[key] + _listed(given) if key in added else given for key, given in patterns.items()}


def _group(patterns: Patterns, block: str) -> tuple[str, tuple[int, ...]] | None:
    """The key and the numbers that timm's patterns give to the content of a block; None if no pattern matches."""
    for key, given in patterns.items():
        for expression, numbers in _listed(given):
            match = re.match(expression, f"{block}.")
            if match is not None:
                return key, (*map(int, match.groups()), *(numbers or ()))
    return None


def _listed(given: Any) -> list[tuple[str, tuple[int, ...] | None]]:
    """timm's patterns under one key, given as one expression or as pairs of expression and numbers."""
    if given is None:
        return []
    return [(given, None)] if isinstance(given, str) else list(given)
