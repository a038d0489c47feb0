"""Files written whole or not at all, and read with one sentence for what goes wrong; nothing is unpickled."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import DenseShortcutError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder, that takes the place of `path` on leaving; on an error `path` stays.

    Raises:
        DenseShortcutError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is overwritten next time
    try:
        with told_when_full(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, so that a rename outlives a power cut; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into a sentence; safetensors gives the system's number as text only."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _system_error(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DenseShortcutError(
            f"no room to write {path} ({os.strerror(number)}): what was saved before is whole, so free some space and "
            "go on with the run by --resume."
        ) from error


def _system_error(error: BaseException) -> int | None:
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping, or a one-sentence error."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DenseShortcutError(
            f"cannot read {path} ({error.strerror}): give the folder or file of a run that is whole."
        ) from error
    except ValueError as error:
        raise DenseShortcutError(f"{path} is not whole JSON ({error}): restore it or train again.") from error
    if not isinstance(content, dict):
        raise DenseShortcutError(f"{path} does not hold a JSON object: restore it or train again.")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Tensors and, in the file's header, whatever JSON holds: one file, written whole or not at all."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(packed, temporary, {"json": json.dumps(about)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        DenseShortcutError: no such file, or one that is cut short or of another kind.
    """
    with opened(path) as file:
        about = json.loads((file.metadata() or {}).get("json", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a mapping)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a file, of which the header alone is read; it says how long the file must be.

    Raises:
        DenseShortcutError: as `read_tensors`.
    """
    with opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A whole safetensors file, open for reading; what goes wrong is one sentence."""
    if not path.is_file():
        raise DenseShortcutError(f"{path} does not exist: give the path of a checkpoint.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError) as error:
        raise DenseShortcutError(
            f"{path} is not a whole safetensors file ({error}): restore it or train again."
        ) from error
