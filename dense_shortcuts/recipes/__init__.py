"""The recipes that come with the package: settings of runs and grids of sweeps as YAML, and a script for SLURM."""

import difflib
from pathlib import Path

from ..errors import DenseShortcutError

FOLDER = Path(__file__).parent


def find(given: Path | str) -> Path:
    """The file that is meant by a path, or by the name of a recipe with or without `.yaml`.

    Raises:
        DenseShortcutError: no such file and no such recipe.
    """
    path = Path(given)
    if path.is_file():
        return path
    names = sorted(recipe.stem for recipe in FOLDER.glob("*.yaml"))
    if str(given).removesuffix(".yaml") in names:
        return FOLDER / path.with_suffix(".yaml")
    near = difflib.get_close_matches(path.stem, names, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise DenseShortcutError(f"{given} is no file and no recipe{meant}: the recipes are {', '.join(names)}.")
