"""Training states: a file an epoch, or a folder of shards; the newest whole one is what a run goes on from.

Shards are written and read by torch.distributed.checkpoint, as safetensors: any number of processes reads them back.
"""

import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import DenseShortcutError
from ...files import read_json, read_tensors, sync_folder, tensor_shapes, told_when_full, write_tensors, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

ABOUT = "state.json"
KEPT = 2  # the newest one may turn out to be broken

_logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def state_path(folder: Path, epoch: int, *, sharded: bool = False) -> Path:
    """Where the state after so many epochs belongs: a file, or a folder with a file for each process."""
    return folder / f"state-{epoch:04d}{'' if sharded else '.safetensors'}"


def saved_states(folder: Path) -> list[Path]:
    """The states in a network's folder, whole or not, the newest first."""
    found = [path for path in folder.glob("state-*") if re.fullmatch(r"state-\d{4,}(\.safetensors)?", path.name)]
    return sorted(found, key=epoch_of, reverse=True)


def epoch_of(path: Path) -> int:
    """Epochs that a state has behind it."""
    return int(path.name.removeprefix("state-").removesuffix(".safetensors"))


def newest_whole(folder: Path) -> Path | None:
    """The newest state that can be read, None where there is none yet; what is passed over goes into the log.

    Raises:
        DenseShortcutError: there are states and none of them is whole.
    """
    states = saved_states(folder)
    for path in states:
        try:
            read_shapes(path)
            return path
        except DenseShortcutError as error:
            _logger.warning("passed over %s: %s", path.name, error)
    if states:
        names = ", ".join(path.name for path in states)
        raise DenseShortcutError(f"no state in {folder} is whole ({names}): remove them to train it from the start.")
    return None


def forget(folder: Path, newest: Path) -> None:
    """Remove all states but `newest` and the one before it; later ones were not whole."""
    states = saved_states(folder)
    earlier = [path for path in states if epoch_of(path) < epoch_of(newest)]
    for path in states:
        if path != newest and path not in earlier[: KEPT - 1]:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_state(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], accelerator: "Accelerator"
) -> None:
    """Write a state whole or not at all; every process calls this. Tensors in shards go into a folder.

    Raises:
        DenseShortcutError: the disk is full.
    """
    if any(map(is_sharded, tensors.values())):
        _write_shards(path, tensors, about, accelerator)
    elif accelerator.is_main_process:
        write_tensors(path, tensors, about)
    if accelerator.is_main_process:
        forget(path.parent, path)


def _write_shards(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], accelerator: "Accelerator"
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    temporary = path.with_name(f".{path.name}.tmp")
    if accelerator.is_main_process:
        remove(temporary)
        temporary.mkdir()
    accelerator.wait_for_everyone()
    try:
        with told_when_full(path):
            writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            try:
                dcp.save(dict(tensors), storage_writer=writer)
            except CheckpointException as error:  # of every process, and no Exception
                raise next(iter(error.failures.values()))[0] from error
        if accelerator.is_main_process:
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            write_text(temporary / ABOUT, json.dumps({**about, "shapes": shapes}))
            sync_folder(temporary)
            remove(path)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        if accelerator.is_main_process:
            remove(temporary)
    accelerator.wait_for_everyone()


def read_shapes(path: Path) -> Shapes:
    """Shape of each tensor of a state.

    Raises:
        DenseShortcutError: the state is not whole.
    """
    if not path.is_dir():
        return tensor_shapes(path)
    shapes = read_json(path / ABOUT)["shapes"]
    entries = _entries(path)
    for name, shape in shapes.items():
        chunks = entries[name].chunks if name in entries else []
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise DenseShortcutError(f"{path} lacks a shard of {name}: restore it or train again.")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _entries(path: Path) -> dict[str, Any]:
    """What torch.distributed.checkpoint knows of each tensor in a folder of shards."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, OSError) as error:
        raise DenseShortcutError(
            f"{path} has a shard that is not whole ({error}): restore it or train again."
        ) from error


def read_state(path: Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state's tensors and what else it holds.

    Args:
        path: of a whole state; a file is read whole by every process, of a folder each reads its own shards.
        like: tensors in shards, by the names of those that are to be in the same shards (`shards_of`).
    """
    if not path.is_dir():
        tensors, about = read_tensors(path)
        return {name: _in_shards(tensor, like.get(name)) for name, tensor in tensors.items()}, about
    about = read_json(path / ABOUT)
    return _read_shards(path, list(about.pop("shapes")), like), about


def _read_shards(path: Path, names: Iterable[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    entries, targets = _entries(path), {}
    for name in names:
        shape, dtype = entries[name].size, entries[name].properties.dtype
        targets[name] = torch.zeros_like(like[name], dtype=dtype) if name in like else torch.zeros(shape, dtype=dtype)
    with warnings.catch_warnings():
        # Without shards to fill there is nothing to agree on, so one process may read alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=not like)
    return targets


def read_predicted(folder: Path) -> Tensor:
    """Classes that a trained network predicted for the test images, (N,), from its newest whole state."""
    path = newest_whole(folder)
    if path is None:
        raise DenseShortcutError(f"{folder} has no saved state: train the network first.")
    return _read_shards(path, ["predicted"], {})["predicted"] if path.is_dir() else read_tensors(path)[0]["predicted"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with shards put together; every process calls this."""
    return {name: t.full_tensor() if is_sharded(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]


def _in_shards(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor in the shards of another one."""
    if like is None:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def shards_of(
    shapes: Shapes, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> dict[str, Tensor]:
    """For each tensor of a state that belongs in shards, the model's tensor whose shards it shares."""
    owners = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        owners |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners |= {f"optimizer.{i}": parameter for i, parameter in enumerate(parameters)}
    found = {}
    for name, shape in shapes.items():
        owner = owners.get(name.rsplit(".", 1)[0] if name.startswith("optimizer.") else name)
        if owner is not None and is_sharded(owner) and tuple(owner.shape) == shape:
            found[name] = owner
    return found
