"""Another norm for a trained network's dense shortcuts, such as batch norm, which folds away; then training on."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import DenseShortcutError
from ..files import write_text
from ..nn.affine_form import is_batch_norm
from ..surgery.plug import dense_stages, shortcut_norms
from .train.checkpoint import read_model
from .train.config import TuneConfig
from .train.network import build_network
from .train.run import checkpoint_folder
from .train.tune import Tuned, accuracy, recalibrate, settings, tune


@dataclass(frozen=True)
class Renormed:
    """Accuracies, %, of a network before its norm was changed, just after, and after training on."""

    before: float
    tuned: Tuned


def renorm(checkpoint: Path | str, norm: str, how: TuneConfig) -> Renormed:
    """Give a trained network's dense shortcuts another norm and train it on; leaves a run in a folder of its own.

    The weights stay. Batch norm starts from the statistics of training images, since it has none of its own.

    Args:
        checkpoint: a network's folder in a run, the model.safetensors in it, or `shipped`.
        norm: "batch", "group", "layer" or "instance".
        how: the further training, without which the norm alone is changed, and the images.

    Raises:
        DenseShortcutError: a network without dense shortcuts or with this norm, images that are not there, a folder
            that exists.
    """
    folder = checkpoint_folder(Path(checkpoint))
    model, card = read_model(folder)
    if not dense_stages(model):
        raise DenseShortcutError(f"{folder} has no dense shortcuts: there is no norm to change.")
    norms = shortcut_norms(model)
    if card["shortcut"]["norm"] == norm or (norm == "batch" and norms and all(map(is_batch_norm, norms))):
        raise DenseShortcutError(f"{folder} has norm={norm} already: choose another norm.")
    config, data = settings(folder, card, how)
    before = accuracy(model, config, data)

    config = dataclasses.replace(config, norm=norm, groups=None)  # type: ignore[arg-type]
    changed = build_network(config, card["num_classes"])
    started = take_weights(changed, model)
    if len(started):
        recalibrate(changed, started, config, data)
    tuned = tune(changed, config, data, how, name=f"{folder.parent.name}-{norm}", command="renorm")
    figures = {
        "before": before,
        **{key: getattr(tuned, key) for key in ("start", "end", "images")},
        "epochs": how.epochs,
    }
    write_text(tuned.folder.parent / "renorm.json", json.dumps(figures, indent=2) + "\n")
    return Renormed(before, tuned)


def take_weights(changed: nn.Module, model: nn.Module) -> nn.ModuleList:
    """Give a network the weights of one that differs in the shortcuts' norms; gives the batch norms without statistics.

    Raises:
        DenseShortcutError: they differ in more than that.
    """
    source = model.state_dict()
    started = {f"{n}." for n, m in changed.named_modules() if is_batch_norm(m) and f"{n}.running_mean" not in source}
    dropped = {f"{n}." for n, m in model.named_modules() if is_batch_norm(m)}
    keys = changed.load_state_dict({k: v for k, v in source.items() if k in changed.state_dict()}, strict=False)
    other = [key for key in keys.missing_keys if key[: key.rindex(".") + 1] not in started]
    other += [key for key in source.keys() - changed.state_dict().keys() if key[: key.rindex(".") + 1] not in dropped]
    if other:
        raise DenseShortcutError(
            f"the networks differ in more than their norms ({', '.join(sorted(other))}): restore it."
        )
    return nn.ModuleList(changed.get_submodule(name[:-1]) for name in sorted(started))
