"""timm's layer groups, by which layer-wise learning rates and freezing go, for a plugged network."""

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
    """`group_matcher` of a plugged timm network: the host's own patterns, and each block's shortcut with its block.

    A name that no pattern matches would count as the head's.
    """

    blocks: Patterns
    stages: Patterns

    def __call__(self, coarse: bool = False) -> Patterns:
        return self.stages if coarse else self.blocks


def group_with_blocks(model: nn.Module) -> None:
    """Let the shortcut into a block belong to the block's group, where timm's patterns give the block one."""
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
    """A regular expression for the parameters that each block's shortcut adds, and the block's module name.

    Parameters of norms, which only norms of the user's own have, go with the first block of their row.
    """
    for name, stage in model.named_modules():
        if not isinstance(stage, DenseStage):
            continue
        prefix, names = f"{name}." if name else "", stage.block_names
        for row, shortcut in stage.shortcuts.items():
            own = re.escape(f"{prefix}{row.shortcut}.")
            for n, k in enumerate(shortcut.summing):
                yield rf"^{own}weights\.{n}$", f"{prefix}{names[row.first + k]}"
            yield rf"^{own}norms\.", f"{prefix}{names[row.first]}"


def _with_shortcuts(patterns: Patterns, owners: list[tuple[str, str]]) -> Patterns:
    """timm's patterns with one for each shortcut in front of those by which its block is known."""
    added = defaultdict(list)
    for shortcut, block in owners:
        found = _group(patterns, block)
        if found is not None:
            added[found[0]].append((shortcut, found[1]))
    return {key: added[key] + _listed(given) if key in added else given for key, given in patterns.items()}


def _group(patterns: Patterns, block: str) -> tuple[str, tuple[int, ...]] | None:
    """The key and the numbers that timm's patterns give to what is inside a block; None where no pattern matches."""
    for key, given in patterns.items():
        for expression, numbers in _listed(given):
            match = re.match(expression, f"{block}.")
            if match is not None:
                return key, (*map(int, match.groups()), *(numbers or ()))
    return None


def _listed(given: Any) -> list[tuple[str, tuple[int, ...] | None]]:
    """timm's patterns under one key, which are an expression or pairs of one with numbers."""
    if given is None:
        return []
    return [(given, None)] if isinstance(given, str) else list(given)
