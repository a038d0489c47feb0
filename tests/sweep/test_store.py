"""Workers that share a study: who gets which run, and what becomes of one whose worker died."""

from pathlib import Path

import pytest

from dense_shortcuts import DenseShortcutError
from dense_shortcuts.experiments.sweep import store as stores
from dense_shortcuts.experiments.sweep.spec import read_sweep
from dense_shortcuts.experiments.sweep.store import DATABASE, Store


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes a worker of the sweep, which waits for no other."""
    monkeypatch.setattr(stores, "PATIENCE", 0.0)

    def make(*changes: str) -> Store:
        store = Store(tmp_path, read_sweep(Path("s.yaml"), changes).cells())
        store.enqueue()
        return store

    return make


def take_all(store: Store) -> tuple[list, list[str]]:
    """Every run that is left, as claims, which are this worker's for as long as they are kept; and their keys."""
    claims = list(iter(store.claim, None))
    return claims, [claim.cell.key for claim in claims]


def die(claim) -> None:
    """What the system does for a worker that is killed."""
    claim.lock.release()


def finish(claim, folder: Path) -> None:
    """What a worker leaves that has trained a run."""
    (folder / claim.cell.key).mkdir(parents=True)
    claim.done(50.0)
    claim.lock.release()


def test_workers_get_different_runs_in_the_files_order(worker):
    first, second = worker(), worker()
    claims = [first.claim(), second.claim(), first.claim(), second.claim()]
    assert [claim.cell.key for claim in claims] == [*first.cells]
    assert first.claim() is None and second.claim() is None
    assert {state for state, _ in first.states().values()} == {"running"}
    for claim in claims:
        finish(claim, first.folder)
    assert worker().claim() is None
    assert {state for state, _ in second.states().values()} == {"done"}
    assert len(first.study.trials) == 4


def test_a_dead_workers_run_is_given_out_again_and_a_live_ones_is_not(worker):
    dead, alive = worker(), worker()
    left, kept = dead.claim(), alive.claim()
    die(left)
    assert alive.states()[left.cell.key][0] == "interrupted"
    later = worker()
    _claims, keys = take_all(later)
    assert sorted(keys) == sorted(key for key in later.cells if key != kept.cell.key)


def test_a_failed_run_is_tried_again_when_a_worker_starts_and_not_before(worker):
    store = worker()
    claim = store.claim()
    claim.failed("the loss became nan")
    claim.lock.release()
    assert store.states()[claim.cell.key] == ("failed", "the loss became nan")
    _claims, keys = take_all(store)
    assert claim.cell.key not in keys and len(keys) == 3
    assert worker().claim().cell.key == claim.cell.key


def test_a_finished_run_that_was_removed_is_run_again(worker):
    store = worker()
    claims, _keys = take_all(store)
    for claim in claims:
        finish(claim, store.folder)
    (store.folder / "host/seed-1").rmdir()
    assert {key: state for key, (state, _) in store.states().items()}["host/seed-1"] == "waiting"
    _claims, keys = take_all(worker())
    assert keys == ["host/seed-1"]


def test_a_file_that_grew_adds_runs_and_one_that_shrank_leaves_some_out(worker):
    before = worker()
    text = Path("s.yaml").read_text()
    Path("s.yaml").write_text(text.replace("[0, 1]", "[1, 2]"))
    after = worker()
    _claims, keys = take_all(after)
    assert sorted(keys) == ["dsnet/seed-1", "dsnet/seed-2", "host/seed-1", "host/seed-2"]
    assert before.states()["host/seed-0"][0] == "failed"  # nobody runs it any more
    Path("s.yaml").write_text(text)
    _others, keys = take_all(worker())
    assert keys == ["host/seed-0", "dsnet/seed-0"]


def test_other_settings_than_a_run_was_begun_with_are_refused(worker):
    worker()
    with pytest.raises(DenseShortcutError, match="'host' was begun with epochs = 2 and the file now has 3"):
        worker("epochs=3")
    worker("data_dir=elsewhere", "workers=0")  # these may differ between workers


def test_a_broken_database_is_told(tmp_path, worker):
    (tmp_path / DATABASE).write_bytes(b"no database, but long enough to be read as one" * 10)
    with pytest.raises(DenseShortcutError, match=r"sweep\.db is no database of a sweep"):
        worker()
