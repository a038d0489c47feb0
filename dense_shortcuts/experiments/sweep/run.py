"""A worker of a sweep: take a run, train it or go on with it, tell the study, until none is left; then the table."""

import collections
import dataclasses
import os
from pathlib import Path

import torch

from ...errors import DenseShortcutError
from ...extras import need
from ..train.config import TrainConfig
from ..train.data import load_data
from ..train.loop import METRICS, read_metrics
from ..train.network import network_label
from ..train.pretrained import weights_file
from ..train.run import CONFIG, execute, resume
from . import report
from .costs import saved_costs, with_budgets
from .spec import Cell, Sweep, tuning
from .store import DATABASE, Claim, Store

TUNING = "tune"  # the folder, in the sweep's, of the runs that choose learning rates


def sweep(asked: Sweep, folder: Path) -> None:
    """Run what is left of a sweep and write its table, as one of any number of workers.

    Args:
        asked: the rows and seeds of the file.
        folder: the sweep's folder; made if it is not there.

    Raises:
        DenseShortcutError: a missing library, bad input of any kind, or runs that failed; all others were run before.
    """
    need("a sweep", "sweep")
    need("a sweep", "train")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DenseShortcutError("a sweep's workers are separate processes: start `dsnet sweep` once for each GPU.")
    for row in asked.rows:  # weights that are not there are told before hours of other rows
        if row.config.weights is not None:
            weights_file(row.config.weights)
    classes = number_of_classes(asked)
    make_folder(folder)
    store = Store(folder, asked.cells())
    with store.lock:
        settled = with_budgets(asked, folder, classes)
    settled = with_rates(settled, folder)
    store = begun(settled, folder)
    work_off(store, folder)
    with store.lock:
        if any(state == "done" for state, _ in store.states().values()):
            report.write(settled, folder, saved_costs(settled, folder, classes), store.states())
            print(f"\ntable, figures and plot: {folder}")
    show(settled, folder, store)
    refuse_failed(store)


def begun(asked: Sweep, folder: Path) -> Store:
    """The study of a sweep with every run queued that is left."""
    store = Store(folder, asked.cells())
    store.enqueue()
    return store


def work_off(store: Store, folder: Path) -> None:
    """Do every run of a sweep that nobody else does."""
    while (claim := store.claim()) is not None:
        done = sum(state == "done" for state, _ in store.states().values())
        print(f"\n{claim.cell.row}, seed {claim.cell.seed} ({done} of {len(store.cells)} done)")
        work(claim, folder)


def refuse_failed(store: Store) -> None:
    """Raise DenseShortcutError if a run failed."""
    failed = {key: note for key, (state, note) in store.states().items() if state == "failed"}
    if failed:
        key, note = next(iter(failed.items()))
        raise DenseShortcutError(
            f"{len(failed)} of {len(store.cells)} runs failed, the first of them {key}: {note.rstrip('.')}; "
            "the same command tries them again."
        )


def with_rates(asked: Sweep, folder: Path) -> Sweep:
    """The sweep with each row's learning rate, chosen on validation images by runs of the first seed in TUNING."""
    if asked.tune is None:
        return asked
    make_folder(folder / TUNING)
    tried = tuning(asked)
    store = begun(tried, folder / TUNING)
    work_off(store, folder / TUNING)
    while any(state == "running" for state, _ in store.states().values()):  # by other workers
        work_off(store, folder / TUNING)
    refuse_failed(store)
    scores = iter([last_metrics(folder / TUNING / cell.key, cell.config)["test_top1"] for cell in tried.cells()])
    rows = []
    for row in asked.rows:
        found = {lr: next(scores) for lr in asked.tune.lr}
        lr = max(found, key=found.__getitem__)
        rows.append(dataclasses.replace(row, config=dataclasses.replace(row.config, lr=lr)))
    return dataclasses.replace(asked, rows=tuple(rows))


def work(claim: Claim, folder: Path) -> None:
    """Do a run and tell how it ended. A run that was interrupted stays as it is, for the next worker."""
    try:
        run = run_cell(claim.cell, folder)
        claim.done(last_metrics(run, claim.cell.config)["test_top1"])
    except (DenseShortcutError, torch.OutOfMemoryError) as error:
        claim.failed(" ".join(str(error).split()))
    finally:
        claim.lock.release()


def run_cell(cell: Cell, folder: Path) -> Path:
    """Train a cell's network in its folder, or go on with it."""
    run = folder / cell.key
    if (run / CONFIG).is_file():
        return resume(run, "train")
    return execute(dataclasses.replace(cell.config, output=str(run.parent), name=run.name), "train", resumed=None)


def last_metrics(run: Path, config: TrainConfig) -> dict[str, float]:
    return read_metrics(run / network_label(config) / METRICS)[-1]


def status(asked: Sweep, folder: Path) -> None:
    """Print where each run stands; starts and changes nothing.

    Raises:
        DenseShortcutError: a missing library, or a sweep that was not begun.
    """
    need("a sweep", "sweep")
    if not (folder / DATABASE).is_file():
        raise DenseShortcutError(f"{folder} holds no sweep: the same command without --status begins it.")
    if asked.tune is not None and (folder / TUNING).is_dir():
        tried = tuning(asked)
        show(tried, folder / TUNING, Store(folder / TUNING, tried.cells()))
    show(asked, folder, Store(folder, asked.cells()))


def show(asked: Sweep, folder: Path, store: Store) -> None:
    """Print a line for each run that is not done yet, then the counts."""
    states = store.states()
    for cell in asked.cells():
        state, note = states[cell.key]
        epochs = len(read_metrics(folder / cell.key / network_label(cell.config) / METRICS))
        progress = f", {epochs} of {cell.config.epochs} epochs" if state in ("running", "interrupted") else ""
        done = f", {last_metrics(folder / cell.key, cell.config)['test_top1']:.2f} %" if state == "done" else ""
        print(f"{cell.row}, seed {cell.seed}: {state}{progress}{done}{': ' + note if note else ''}")
    counts = collections.Counter(state for state, _ in states.values())
    print(f"{len(states)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))


def number_of_classes(asked: Sweep) -> int:
    """Classes of the data, which all rows share."""
    config = asked.rows[0].config
    return len(load_data(dataclasses.replace(config, limit_train=1, limit_test=1).resolved()).classes)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DenseShortcutError(f"cannot make {folder} ({error.strerror}): choose another --output.") from error
