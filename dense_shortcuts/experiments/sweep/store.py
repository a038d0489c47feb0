"""Which run is waiting, under way, done or failed: an Optuna study in SQLite, shared by the workers of a sweep.

A worker holds a lock on the file of the run that it is at. The system lets go of it when the worker dies, however it
dies, so the next one that looks sees at once that the run needs another worker. SQLite asks the same of the folder.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from ...errors import DenseShortcutError
from .spec import Cell

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

DATABASE, LOCK = "sweep.db", "sweep.lock"
PATIENCE = 10.0  # s; a killed worker's loader processes hold its lock until they notice, which takes five
FREE = ("name", "output", "data_dir", "workers", "tracker")  # settings that may differ between workers

State = Literal["waiting", "running", "interrupted", "failed", "done"]


@dataclass(frozen=True)
class Claim:
    """A run that this worker has to itself until it releases the lock, before which it tells how the run ended."""

    cell: Cell
    trial: "optuna.Trial"
    lock: FileLock

    def done(self, accuracy: float) -> None:
        self.trial.study.tell(self.trial, accuracy)

    def failed(self, reason: str) -> None:
        from optuna.trial import TrialState

        self.trial.set_user_attr("error", reason)
        self.trial.study.tell(self.trial, state=TrialState.FAIL)


class Store:
    """The study of a sweep.

    Args:
        folder: the sweep's folder, which exists.
        cells: the runs of the sweep as its file has them now; the study may hold others, of the file's earlier states.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self.folder, self.cells = folder, {cell.key: cell for cell in cells}
        self.lock = FileLock(folder / LOCK)
        with self.lock:
            self.study = open_study(folder)

    def enqueue(self) -> None:
        """Queue every run that is neither done nor queued nor under way; failed and removed ones get another chance.

        Raises:
            DenseShortcutError: a run was begun with other settings than the file has now.
        """
        with self.lock:
            for key, cell in self.cells.items():
                trials = self._trials(key)
                check_same(cell, trials)
                if not any(trial.state.name in ("WAITING", "RUNNING") or self._is_done(trial) for trial in trials):
                    self._queue(cell)

    def claim(self) -> Claim | None:
        """The next run that nobody is at, which may be one that a dead worker left; None where there is none."""
        claim = self._claim()
        return claim or (self._claim() if self._wait_for_another() else None)

    def states(self) -> dict[str, tuple[State, str]]:
        """Each run's state in the file's order, with the host that runs it or the sentence with which it failed."""
        return {key: self._state(key) for key in self.cells}

    def _claim(self) -> Claim | None:
        from optuna.trial import TrialState

        with self.lock:
            for key in self._running():
                if (lock := self._hold(key)) is not None:  # its worker is dead
                    left = next(trial for trial in self._trials(key) if trial.state == TrialState.RUNNING)
                    self.study.tell(left.number, state=TrialState.FAIL)
                    self._queue(self.cells[key])
                    lock.release()
            while any(trial.state == TrialState.WAITING for trial in self._trials()):
                trial = self.study.ask()
                cell = self.cells.get(trial.user_attrs["cell"])
                if cell is None:  # the file has lost this row since
                    self.study.tell(trial, state=TrialState.FAIL)
                    continue
                trial.set_user_attr("host", f"{socket.gethostname()}, process {os.getpid()}")
                lock = self._hold(cell.key)
                assert lock is not None
                return Claim(cell, trial, lock)
        return None

    def _wait_for_another(self) -> bool:
        """Whether some other worker ended or turned out to be dead within the patience."""
        deadline = time.monotonic() + PATIENCE
        for key in self._running():
            if (lock := self._hold(key, max(0.0, deadline - time.monotonic()))) is not None:
                lock.release()
                return True
        return False

    def _hold(self, key: str, patience: float = 0.0) -> FileLock | None:
        """The lock of a run, None where another worker has it for longer than the patience (s)."""
        path = self.folder / f"{key}.lock"
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(path, timeout=patience)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _queue(self, cell: Cell) -> None:
        from optuna.trial import TrialState, create_trial

        about = {"cell": cell.key, "row": cell.row, "seed": cell.seed, "settings": settings(cell)}
        self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=about))

    def _trials(self, key: str | None = None) -> "list[FrozenTrial]":
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if key in (None, trial.user_attrs["cell"])]

    def _is_done(self, trial: "FrozenTrial") -> bool:
        """Whether a trial was finished and its run is still there."""
        return trial.state.name == "COMPLETE" and (self.folder / trial.user_attrs["cell"]).is_dir()

    def _running(self) -> list[str]:
        return [key for key in self.cells if any(trial.state.name == "RUNNING" for trial in self._trials(key))]

    def _state(self, key: str) -> tuple[State, str]:
        trials = {trial.state.name: trial for trial in self._trials(key)}  # the last of each state
        if any(map(self._is_done, trials.values())):
            return "done", ""
        if "RUNNING" in trials:
            lock = self._hold(key)
            if lock is None:
                return "running", trials["RUNNING"].user_attrs.get("host", "")
            lock.release()
            return "interrupted", ""
        if "FAIL" in trials and "WAITING" not in trials:
            return "failed", trials["FAIL"].user_attrs.get("error", "")
        return "waiting", ""


def open_study(folder: Path) -> "optuna.Study":
    """The study in a folder's database, made if there is none.

    Raises:
        DenseShortcutError: the database is broken.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / DATABASE
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        return optuna.create_study(study_name="sweep", storage=storage, direction="maximize", load_if_exists=True)
    except DatabaseError as error:
        raise DenseShortcutError(
            f"{path} is no database of a sweep: restore it, or remove it (finished runs in the folder stay)."
        ) from error


def settings(cell: Cell) -> dict[str, Any]:
    """What decides a run's result, as JSON holds it."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(cell.config).items()
        if key not in FREE
    }


def check_same(cell: Cell, trials: "Sequence[FrozenTrial]") -> None:
    """Refuse a run that was begun with other settings."""
    now = settings(cell)
    for trial in trials:
        then = trial.user_attrs["settings"]
        changed = [key for key in now if key in then and now[key] != then[key]]
        if changed:
            key = changed[0]
            raise DenseShortcutError(
                f"{cell.row!r} was begun with {key} = {then[key]!r} and the file now has {now[key]!r}: "
                "put it back, or give the sweep another --name."
            )
