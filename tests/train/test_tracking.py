"""Trackers: what they are shown, which one is taken, and what is said where one is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dense_shortcuts import DenseShortcutError, extras
from dense_shortcuts.experiments.train import tracking


def test_tensorboard_is_shown_the_metrics_of_each_epoch(tiny, fit, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = fit(tiny(tracker="tensorboard"), tmp_path / "run" / "network")
    shown = accumulators.EventAccumulator(str(tmp_path / "run" / tracking.FOLDER / "network")).Reload()
    assert set(shown.Tags()["scalars"]) == set(rows[0])
    for name in ("test_top1", "train_loss"):
        points = [(event.step, event.value) for event in shown.Scalars(name)]
        assert points == [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in rows]


def test_a_resumed_run_drops_what_tensorboard_was_shown_of_later_epochs(tiny, tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from accelerate import PartialState
    from tensorboard.summary.writer import event_file_writer

    # files are read in the order of their names: seconds, process, and a count, of which 10 would stand before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    PartialState()
    config = tiny(tracker="tensorboard").resolved()
    for epochs_done, value in ((0, 1.0), (1, 2.0)):
        tracker = tracking.make_tracker(config, tmp_path / "run" / "network", epochs_done)
        for epoch in range(epochs_done, 3):
            tracker.log({"x": value}, step=epoch + 1)
        tracker.finish()
    shown = accumulators.EventAccumulator(str(tmp_path / "run" / tracking.FOLDER / "network")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("x")] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_none_leaves_no_file_and_the_default_is_tensorboard_where_it_is_installed(tiny, fit, tmp_path, monkeypatch):
    fit(tiny(tracker="none", epochs=1), tmp_path / "run" / "network")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"network"}
    assert tracking.chosen_tracker(tiny()) == ("tensorboard" if tracking.is_installed("tensorboard") else "none")
    monkeypatch.setattr(tracking, "is_installed", lambda name: False)
    assert tracking.chosen_tracker(tiny()) == "none"


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "track"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_told(name, extra, tiny, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda name: False)
    sentence = f"--tracker {name} needs {name}: pip install 'dense-shortcuts[{extra}]'."
    with pytest.raises(DenseShortcutError, match=re.escape(sentence)):
        tracking.chosen_tracker(tiny(tracker=name))


def test_trackio_keeps_the_metrics_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    code = f"""
import sqlite3, pathlib
from accelerate import PartialState
from dense_shortcuts.experiments.train.config import TrainConfig
from dense_shortcuts.experiments.train.tracking import make_tracker
PartialState()
tracker = make_tracker(TrainConfig(tracker="trackio").resolved(), pathlib.Path({str(tmp_path)!r}, "run", "network"), 0)
tracker.log({{"test_top1": 12.5}}, step=1)
tracker.finish()
from trackio.sqlite_storage import SQLiteStorage
print(SQLiteStorage.get_logs("dense-shortcuts", "run-network")[0]["test_top1"])
"""
    settings = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=True)
    assert "12.5" in done.stdout.splitlines()
    assert any(Path(tmp_path / "trackio").iterdir())
