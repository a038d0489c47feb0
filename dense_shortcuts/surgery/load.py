"""Loads weights and never drops a key silently."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import DenseShortcutError
from ..files import read_tensors
from ..nn.inner_shortcut import InnerShortcut
from ..nn.shortcut import DenseShortcut

_logger = logging.getLogger(__name__)

# As `find_stages` names the shortcuts of a container's segments: shortcut, shortcut2, ..
_SHORTCUT_KEY = re.compile(r"(^|\.)(shortcut\d*\.(weights|norms)|inner\.(weight|norm))(\.|$)")


def load(model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, shortcuts: str = "keep") -> list[str]:
    """Load the weights of a host or of a plugged network; shortcuts that a host lacks get their initial values.

    Names and shapes are compared, but they do not determine a plan: with or without `keep_identity`, aggregates "stage"
    and "block", group and layer norm, and patterns with equally many maps have the same. Save the keywords of `plug_in`
    with the weights, as `dsnet train` does, and plug in with them before loading.

    Args:
        model: a network, plugged in or not, on any device but the meta device.
        source: a state dict, or the path of a .safetensors file.
        shortcuts: what to do with shortcut keys that the model does not have: "keep" raises, "drop" leaves them out.

    Returns:
        The shortcut keys that the source does not have; they were reset to their initial values (`reset_parameters`)
        and are logged. Empty if every key was found.

    Raises:
        DenseShortcutError: a model on the meta device; missing, unexpected or differently shaped keys, all of which are
            named. Nothing is loaded then.
    """
    if shortcuts not in ("keep", "drop"):
        raise DenseShortcutError(f"unknown shortcuts={shortcuts!r}: choose 'keep' or 'drop'.")
    state = dict(read_tensors(Path(source))[0] if isinstance(source, str | Path) else source)
    _check_device(model)
    own = model.state_dict()
    extra = sorted(state.keys() - own.keys())
    if shortcuts == "drop":
        dropped = [key for key in extra if _looks_like_shortcut(key)]
        extra = [key for key in extra if key not in dropped]
        state = {key: value for key, value in state.items() if key not in dropped}
        if dropped:
            _logger.warning("left out %d shortcut keys: %s", len(dropped), ", ".join(dropped))

    missing = sorted(own.keys() - state.keys())
    fillable = shortcut_keys(model)
    started = [key for key in missing if key in fillable]
    # Either all shortcut keys are missing (a host's weights) or none; if some are, the weights are of another plan.
    partial = bool(started) and bool(fillable & state.keys())
    faults = {
        "unexpected": extra,
        "missing": missing if partial else [key for key in missing if key not in fillable],
        "of another shape": sorted(key for key in state.keys() & own.keys() if state[key].shape != own[key].shape),
    }
    if any(faults.values()):
        told = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in faults.items() if keys)
        hint = " (shortcuts='drop' leaves shortcut keys out)" if any(map(_looks_like_shortcut, extra)) else ""
        raise DenseShortcutError(
            f"the weights are of another network, build the one they were saved from{hint} - {told}."
        )
    model.load_state_dict(state, strict=False)
    if started:
        _start_shortcuts(model)
        _logger.warning(
            "%d shortcut keys are not in the weights and stay at their start: %s", len(started), ", ".join(started)
        )
    return started


def _check_device(model: nn.Module) -> None:
    """Raise for a network on the meta device, into which PyTorch would copy nothing."""
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise DenseShortcutError(
            f"{len(empty)} tensors of the network are on the meta device, such as {empty[0]}: call "
            "model.to_empty(device='cpu') before loading, and set buffers that are in no state dict."
        )


def _start_shortcuts(model: nn.Module) -> None:
    """Reset everything that `plug_in` added to its initial values: after `to_empty` it holds arbitrary data."""
    for added in _added(model).values():
        for module in added.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()


def shortcut_keys(model: nn.Module) -> set[str]:
    """State-dict keys of everything that `plug_in` added."""
    return {f"{prefix}.{key}" for prefix, module in _added(model).items() for key in module.state_dict()}


def _added(model: nn.Module) -> dict[str, nn.Module]:
    return {n: module for n, module in model.named_modules() if isinstance(module, DenseShortcut | InnerShortcut)}


def _looks_like_shortcut(key: str) -> bool:
    """Whether a key of an unknown state dict has the form of a shortcut key."""
    return _SHORTCUT_KEY.search(key) is not None
