"""Weights that a run starts from: where they lie, and how they go into a network that need not be the same."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import DenseShortcutError
from ...files import read_tensors
from ...surgery.load import load
from .checkpoint import WEIGHTS

_logger = logging.getLogger(__name__)


def weights_file(given: str) -> Path:
    """The safetensors file that is meant by it, a network's folder or the folder of a run with one network.

    Raises:
        DenseShortcutError: there is none, or there are several.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    found = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob(f"*/{WEIGHTS}"))
    if len(found) > 1:
        networks = ", ".join(each.parent.name for each in found)
        raise DenseShortcutError(f"--weights {path} holds several networks ({networks}): give the folder of one.")
    if not found:
        raise DenseShortcutError(
            f"--weights {path} is neither a safetensors file nor a folder with a trained network: give one of these."
        )
    return found[0]


def start_from(model: nn.Module, given: str) -> None:
    """Load the weights that a timm network starts from, plugged or not, and log what stays at its own start.

    That is a classifier of another size, as for other classes, and the shortcuts where the weights are a host's.

    Raises:
        DenseShortcutError: no such file, or something else does not fit; nothing is loaded then.
    """
    file = weights_file(given)
    tensors, _ = read_tensors(file)
    own = model.state_dict()
    classifier = classifier_keys(model)
    fits = all(key in tensors and tensors[key].shape == own[key].shape for key in classifier)
    try:
        load(model, tensors if fits else tensors | {key: own[key] for key in classifier})
    except DenseShortcutError as error:
        raise DenseShortcutError(f"--weights {file}: {error}") from error
    if fits:
        _logger.info("started from %s", file)
    else:
        _logger.warning(
            "started from %s without its classifier (%s), which is of another size", file, ", ".join(classifier)
        )


def classifier_keys(model: Any) -> list[str]:
    """Names of the parameters of a timm network's classifier, of which it may have two; none where it does not say."""
    given = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = given if isinstance(given, tuple) else (given,)
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return [key for key in model.state_dict() if key.startswith(tuple(f"{name}." for name in names))]
