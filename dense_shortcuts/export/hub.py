"""The Hugging Face hub: a folder that both timm and this package can load, with a card of the run's figures."""

import json
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from .. import shipped
from ..errors import DenseShortcutError
from ..experiments.train.checkpoint import CARD, WEIGHTS, crop_of, read_model
from ..experiments.train.config import TrainConfig
from ..experiments.train.loop import METRICS, read_metrics
from ..experiments.train.run import ENVIRONMENT, checkpoint_folder, run_config
from ..files import read_json, write_text
from ..models import list_models

FILES = (WEIGHTS, CARD, "config.json", "README.md")


def save_for_hub(checkpoint: Path | str, folder: Path | str | None = None) -> Path:
    """Fill a folder for the hub: weights, timm's config.json, our model.json and a model card.

    timm itself loads a registered network from it, `timm.create_model("local-dir:FOLDER")` or, once uploaded,
    "hf-hub:OWNER/NAME"; `from_pretrained` loads any.

    Args:
        checkpoint: a network's folder in a run, or the model.safetensors in it.
        folder: the folder to fill; None means hub/ in the network's folder.

    Returns:
        the folder.

    Raises:
        DenseShortcutError: a missing or broken checkpoint, or a folder with other files.
    """
    source = checkpoint_folder(Path(checkpoint))
    if folder is None and source == shipped.folder():
        raise DenseShortcutError("the network shipped with the package has no folder to write to: give --output.")
    model, card = read_model(source)
    folder = source / "hub" if folder is None else Path(folder)
    if folder.is_dir() and {path.name for path in folder.iterdir()} - set(FILES):
        raise DenseShortcutError(f"{folder} holds other files: choose an empty folder or a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    write_text(folder / CARD, (source / CARD).read_text(encoding="utf-8"))
    if loads_by_timm(card):
        write_text(folder / "config.json", json.dumps(timm_config(model, card), indent=2) + "\n")
    write_text(folder / "README.md", model_card(source, card))
    return folder


def push_to_hub(
    checkpoint: Path | str, repository: str, *, private: bool = False, token: str | None = None, api: Any = None
) -> str:
    """Upload a trained network to the Hugging Face hub; returns the address of the commit.

    Args:
        checkpoint: a network's folder in a run.
        repository: OWNER/NAME, created if it does not exist.
        private: whether a created repository is private.
        token: None means the one of `hf auth login`.
        api: a huggingface_hub.HfApi; None creates one.

    Raises:
        DenseShortcutError: a missing or broken checkpoint, an invalid name, no connection, or a refusal by the hub.
    """
    import tempfile

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError is that of its HTTP library

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_hub(checkpoint, Path(temporary) / "hub")
        api = HfApi(token=token, library_name="dense-shortcuts") if api is None else api
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Add a network"))
        except (HTTPError, OSError, HFValidationError) as error:
            raise DenseShortcutError(
                f"the hub refused {repository} ({_reason(error)}): check the name and the token."
            ) from error


def from_pretrained(name: Path | str, *, revision: str | None = None, token: str | None = None) -> nn.Module:
    """The network of a folder that `save_for_hub` filled, or of a repository on the hub, in evaluation mode.

    Args:
        name: a local folder, or OWNER/NAME.
        revision: branch, tag or commit of the repository.
        token: for a private repository; None means the one of `hf auth login`.

    Returns:
        the network, plugged in as it was trained; `pretrained_cfg` has size, mean, deviation and class names.

    Raises:
        DenseShortcutError: no such folder or repository, or one that dsnet did not make.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(str(name), revision, token)
    if not (folder / CARD).is_file():
        raise DenseShortcutError(f"{name} holds no {CARD}, so dsnet did not make it: load it with timm.")
    model, card = read_model(folder)
    _describe(model, card)
    return model.eval()


def _downloaded(name: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DenseShortcutError(
            f"{name} is not a folder, and cannot be loaded from the hub ({_reason(error)}): check the name."
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")


def loads_by_timm(card: dict[str, Any]) -> bool:
    """Whether timm can build the network: one of ours with dense shortcuts, or any other without."""
    return (card["model"] in list_models()) == (card["shortcut"]["aggregate"] != "identity")


def timm_config(model: nn.Module, card: dict[str, Any]) -> dict[str, Any]:
    """The content of timm's config.json."""
    ours = card["model"] in list_models()
    options = TrainConfig(model=card["model"], **card["shortcut"]).options() if ours else {}
    return {
        "architecture": card["model"],
        "num_classes": card["num_classes"],
        "num_features": getattr(model, "num_features", None),
        "model_args": options,
        "label_names": card["classes"],
        "pretrained_cfg": preprocessing(card) | {"num_classes": card["num_classes"], "classifier": "fc"},
    }


def preprocessing(card: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared, as a timm configuration."""
    return {
        "input_size": (card["in_chans"], card["img_size"], card["img_size"]),
        "fixed_input_size": False,
        "interpolation": card["interpolation"],
        "crop_pct": crop_of(card),
        "crop_mode": "center",
        "mean": tuple(card["mean"]),
        "std": tuple(card["std"]),
    }


def _describe(model: Any, card: dict[str, Any]) -> None:
    """Set the preprocessing of a loaded network where timm's functions look for it."""
    model.pretrained_cfg = {
        **getattr(model, "pretrained_cfg", {}),
        **preprocessing(card),
        "label_names": card["classes"],
    }


def model_card(source: Path, card: dict[str, Any]) -> str:
    """The README of a network on the hub, from the files of its run: it only has figures that were measured there."""
    config = run_config(source, card)
    head = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "dense-shortcuts"],
    }
    load = "import dense_shortcuts.export\n\n" + 'net = dense_shortcuts.export.from_pretrained("OWNER/NAME")\n'
    if loads_by_timm(card):
        load += '\nimport timm  # the same, by timm\n\nnet = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)\n'
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {card['model']}, {_shortcut(card)}, trained on {card['data']}",
        f"{card['num_classes']} classes; images of {card['img_size']}x{card['img_size']} pixels. Made with "
        f"[Dense Shortcuts](https://arxiv.org/abs/2010.12496) {card['dense_shortcuts']}.",
        f"## Load it\n\n```python\n{load}```",
        f"## Figures\n\n{_figures(source)}",
        f"## Settings\n\n```yaml\n{_settings(config)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _shortcut(card: dict[str, Any]) -> str:
    shortcut = card["shortcut"]
    if shortcut["aggregate"] == "identity":
        return "identity shortcuts"
    return f"dense shortcuts (aggregate={shortcut['aggregate']}, norm={shortcut['norm']})"


def _figures(source: Path) -> str:
    """The run's table, or else the last epoch's figures, or a sentence that there are none."""
    table = source.parent / "table.md"
    if table.is_file():
        where = _machine(source.parent / ENVIRONMENT)
        return f"Network `{source.name}` of the run's table{where}.\n\n{table.read_text(encoding='utf-8').strip()}"
    rows = read_metrics(source / METRICS)
    if not rows:
        return "The run's figures are not beside the checkpoint."
    return f"Accuracy {rows[-1]['test_top1']:.2f} % on the test images after {rows[-1]['epoch']} epochs."


def _machine(path: Path) -> str:
    if not path.is_file():
        return ""
    about = read_json(path)
    return f" (one run, seed {about['seed']}, {about['device']}, PyTorch {about['packages']['torch']})"


def _settings(config: TrainConfig) -> str:
    """The settings that differ from the defaults."""
    default, own = vars(TrainConfig()), vars(config)
    hidden = ("name", "output", "data_dir", "workers")  # of the machine
    changed = {k: v for k, v in own.items() if k not in hidden and v != default[k] and v is not None}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
    return str(yaml.safe_dump({"model": config.model, "data": config.data} | plain, sort_keys=False))
