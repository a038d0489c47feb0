"""What a sweep runs: the rows of its table and the seeds, read from a YAML file (docs/sweeps.md describes it)."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ... import recipes
from ...errors import DenseShortcutError
from ..train.config import TrainConfig, from_settings, read_settings

KEYS = ("base", "grid", "seeds", "tune")
ENTRY_KEYS = ("name", "settings", "grid", "against", "same_budget_as", "published")
ELSEWHERE = {"seed": "`seeds:`", "name": "the row's name", "output": "--output"}  # settings that a sweep gives itself


@dataclass(frozen=True)
class Row:
    """A row of the table: one network and recipe, run with every seed.

    Attributes:
        config: its settings; the seed is filled in by `Sweep.cells`.
        against: the row it is compared with; None for the first row.
        same_budget_as: the row whose time and memory its network is widened to.
        published: an accuracy published for it, with its source.
    """

    name: str
    config: TrainConfig
    against: str | None = None
    same_budget_as: str | None = None
    published: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a row with a seed. `key` is its folder, seen from the sweep's."""

    key: str
    row: str
    seed: int
    config: TrainConfig


@dataclass(frozen=True)
class Tune:
    """Learning rates, of which each row takes the best on so many validation images, held out from training."""

    lr: tuple[float, ...]
    validation: int


@dataclass(frozen=True)
class Sweep:
    """Rows and seeds, the rows as they stand in the file; `tune` is None where every row has its own learning rate."""

    path: Path
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    tune: Tune | None = None

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def cells(self) -> list[Cell]:
        """Every run, all rows with the first seed before any with the second: what is done early compares all rows."""
        return [
            Cell(f"{slug(row.name)}/seed-{seed}", row.name, seed, dataclasses.replace(row.config, seed=seed))
            for seed in self.seeds
            for row in self.rows
        ]


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def read_sweep(path: Path, changes: Sequence[str] = (), data_dir: str | None = None) -> Sweep:
    """The sweep in a YAML file.

    Args:
        changes: settings of the form "epochs=2" with the last word in every row.
        data_dir: folder of the data in every row; None is the file's own.

    Raises:
        DenseShortcutError: a file that cannot be read, an unknown key, a row without a name or with another's, a value
            of the wrong kind.
    """
    content = read_settings(path)
    refuse_unknown(content, KEYS, str(path))
    last = read_changes(changes) | ({"data_dir": data_dir} if data_dir is not None else {})
    base = read_base(content.get("base"), path)
    rows = [row for entry in entries(content, path) for row in expand(entry, base, last, path)]
    check_rows(rows, path)
    return Sweep(path, tuple(rows), read_seeds(content.get("seeds"), path), read_tune(content.get("tune"), path))


def read_base(base: Any, path: Path) -> dict[str, Any]:
    """The settings that all rows share: a mapping, or a recipe beside the file or in the package, less its seed."""
    if isinstance(base, str):
        beside = path.parent / base
        settings = read_settings(recipes.find(beside if beside.is_file() else base))
        return {key: value for key, value in settings.items() if key not in ELSEWHERE}
    if not isinstance(base, dict):
        raise DenseShortcutError(f"{path} needs `base:`, the settings that all rows share or a recipe's file name.")
    return base


def entries(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The entries of `grid:`; a mapping of lists is one entry without a name."""
    grid = content.get("grid")
    if isinstance(grid, dict):
        return [{"grid": grid}]
    if not isinstance(grid, list) or not grid or not all(isinstance(entry, dict) for entry in grid):
        raise DenseShortcutError(
            f"{path} needs `grid:`, either `field: [values]` or a list of rows of the form "
            "`- {name: host, settings: {aggregate: identity}}`."
        )
    return grid


def expand(entry: dict[str, Any], base: Mapping[str, Any], last: Mapping[str, Any], path: Path) -> Iterator[Row]:
    """The rows of an entry: one, or one for each combination of its own grid."""
    where = f"row {entry.get('name')!r} of {path}"
    refuse_unknown(entry, ENTRY_KEYS, where)
    settings, grid = entry.get("settings") or {}, entry.get("grid") or {}
    if not isinstance(settings, dict):
        raise DenseShortcutError(f"`settings:` of {where} must hold lines of the form `norm: batch`.")
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise DenseShortcutError(f"`grid:` of {where} must hold lines of the form `norm: [group, batch]`.")
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        name = " ".join([*([str(entry["name"])] if "name" in entry else []), *(f"{k}={v}" for k, v in chosen.items())])
        values = {**base, **settings, **chosen, **last}
        for key in set(values) & set(ELSEWHERE):
            raise DenseShortcutError(f"{where} sets {key}, which a sweep takes from {ELSEWHERE[key]}: remove it.")
        yield Row(
            name,
            from_settings(values, f"row {name!r} of {path}"),
            entry.get("against"),
            entry.get("same_budget_as"),
            str(entry.get("published", "")),
        )


def check_rows(rows: Sequence[Row], path: Path) -> None:
    """Refuse rows that cannot be told apart, or that refer to none."""
    folders = [slug(row.name) for row in rows]
    for row, folder in zip(rows, folders, strict=True):
        if not folder or folders.count(folder) > 1:
            raise DenseShortcutError(f"{path} has two rows named {row.name!r}, or one without a name: name each.")
        for key in ("against", "same_budget_as"):
            other = getattr(row, key)
            if other is not None and (other == row.name or other not in [r.name for r in rows]):
                raise DenseShortcutError(f"`{key}: {other}` in row {row.name!r} of {path} is no other row's name.")
        if row.same_budget_as in [r.name for r in rows if r.same_budget_as]:
            raise DenseShortcutError(f"row {row.name!r} of {path} takes the budget of a row that has none of its own.")
        if row.config.precision != rows[0].config.precision:
            raise DenseShortcutError(f"row {row.name!r} of {path} has another precision: set it in `base:` for all.")


def read_seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    valid = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    if not valid or len(set(seeds)) != len(seeds):
        raise DenseShortcutError(f"{path} needs `seeds:`, a list of different whole numbers such as [0, 1, 2].")
    return tuple(seeds)


def tuning(sweep: Sweep) -> Sweep:
    """The runs that choose learning rates: each row with each rate, in the rows' order, with the first seed."""
    assert sweep.tune is not None
    rows = [
        Row(f"{row.name}, lr {lr:g}", dataclasses.replace(row.config, lr=lr, validation=sweep.tune.validation))
        for row in sweep.rows
        for lr in sweep.tune.lr
    ]
    return Sweep(sweep.path, tuple(rows), sweep.seeds[:1])


def read_tune(tune: Any, path: Path) -> Tune | None:
    if tune is None:
        return None
    known = isinstance(tune, dict) and set(tune) == {"lr", "validation"}
    rates, validation = (tune["lr"], tune["validation"]) if known else ([], 0)
    positive = isinstance(rates, list) and all(type(rate) in (int, float) and rate > 0 for rate in rates)
    if not known or not positive or len(set(rates)) < 2 or type(validation) is not int:
        raise DenseShortcutError(f"`tune:` of {path} must be of the form `{{lr: [0.05, 0.1, 0.2], validation: 1000}}`.")
    return Tune(tuple(map(float, rates)), validation)


def read_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Settings from the command line, their values read as YAML's."""
    found = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise DenseShortcutError(f"--set {change!r} is not of the form field=value, such as epochs=2.")
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DenseShortcutError(f"--set {change!r} has a value that YAML cannot read: quote it.") from error
    return found


def refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {near[0]!r}" if near else f"the keys are {', '.join(known)}"
            raise DenseShortcutError(f"{where} has the unknown key {key!r}: {advice}.")
