"""Sweeps for real, tiny: what one leaves, workers side by side, one that is killed, runs that fail."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from process_helpers import Group
from sweep.conftest import SWEEP

from dense_shortcuts.cli import main
from dense_shortcuts.experiments.sweep.spec import read_sweep
from dense_shortcuts.experiments.sweep.store import Store
from dense_shortcuts.experiments.train import loop
from dense_shortcuts.experiments.train.loop import read_metrics
from dense_shortcuts.experiments.train.rerun import unclocked

LABELS = {"host": "identity", "dsnet": "stage-batch"}
KEYS = ["host/seed-0", "dsnet/seed-0", "host/seed-1", "dsnet/seed-1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished sweep."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "s.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense_shortcuts.experiments.sweep.costs.ROUNDS", 1)
        assert main(["sweep", str(folder / "s.yaml"), "--output", str(folder)]) == 0
    return folder / "s"


def metrics(sweep: Path, key: str) -> list[dict]:
    return unclocked(read_metrics(sweep / key / LABELS[key.split("/")[0]] / "metrics.jsonl"))


def states(sweep: Path) -> dict[str, str]:
    store = Store(sweep, read_sweep(Path("s.yaml")).cells())
    return {key: state for key, (state, _) in store.states().items()}


def trials(sweep: Path, state: str = "COMPLETE") -> list:
    store = Store(sweep, read_sweep(Path("s.yaml")).cells())
    return [trial for trial in store.study.trials if trial.state.name == state]


def test_a_sweep_leaves_runs_table_figures_and_plot(finished):
    assert {path.name for path in finished.iterdir()} >= {"table.md", "table.csv", "runs.csv", "plot.png", "costs.json"}
    runs = list(csv.DictReader((finished / "runs.csv").open()))
    assert [(run["row"], run["seed"]) for run in runs] == [("host", "0"), ("host", "1"), ("DSNet", "0"), ("DSNet", "1")]
    for run in runs:
        key = f"{run['row'].lower()}/seed-{run['seed']}"
        assert float(run["test_top1"]) == metrics(finished, key)[-1]["test_top1"]
    assert "12.3 (a source)" in (finished / "table.md").read_text()
    assert json.loads((finished / "dsnet/seed-1/environment.json").read_text())["seed"] == 1
    assert metrics(finished, "dsnet/seed-0") != metrics(finished, "dsnet/seed-1")


def test_a_finished_sweep_runs_nothing_again_and_says_so(finished, capsys):
    folder = Path(shutil.copytree(finished, "runs/s"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert main(["sweep", "s.yaml", "--status"]) == 0
    out = capsys.readouterr().out
    assert "host, seed 0: done, " in out and out.endswith("4 runs: 4 done\n")
    assert main(["sweep", "s.yaml"]) == 0
    assert " epoch " not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert len(trials(folder)) == 4


def test_the_status_of_a_sweep_that_was_not_begun(capsys):
    assert main(["sweep", "s.yaml", "--status"]) == 2
    assert "runs/s holds no sweep: the same command without --status begins it." in capsys.readouterr().err
    assert not Path("runs").exists()


def die_in_the_second_epoch_of_the_second_run(rank: int) -> int:
    """A worker of two epochs a run that is killed; for forked processes only."""
    original, calls = loop.train_epoch, []

    def deadly(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    loop.train_epoch = deadly
    return main(["sweep", "s.yaml"])


@pytest.mark.long
def test_a_killed_worker_is_followed_by_another_that_runs_nothing_twice(finished, tmp_path):
    killed = Group(1, die_in_the_second_epoch_of_the_second_run, tmp_path / "output")
    assert killed.codes() == [-signal.SIGKILL], killed.said(0)
    assert "DSNet, seed 0 (1 of 4 done)" in killed.said(0)
    sweep = Path("runs/s")
    assert states(sweep) == dict(zip(KEYS, ["done", "interrupted", "waiting", "waiting"], strict=True))
    done = sweep / "host/seed-0/identity/model.safetensors"
    before = done.stat().st_mtime_ns

    assert main(["sweep", "s.yaml"]) == 0
    assert set(states(sweep).values()) == {"done"}
    assert done.stat().st_mtime_ns == before
    assert sorted(trial.user_attrs["cell"] for trial in trials(sweep)) == sorted(KEYS)
    assert [trial.user_attrs["cell"] for trial in trials(sweep, "FAIL")] == ["dsnet/seed-0"]
    assert "resumed by" in (sweep / "dsnet/seed-0/run.log").read_text()
    for key in KEYS:
        assert metrics(sweep, key) == metrics(finished, key)


def test_two_workers_share_the_runs(finished, tmp_path):
    Path("s.yaml").write_text(SWEEP.replace("[0, 1]", "[0]"))
    other = Group(1, lambda rank: main(["sweep", "s.yaml"]), tmp_path / "output")
    while "host, seed 0 (0 of 2 done)" not in other.said(0):
        assert other.processes[0].is_alive(), other.said(0)
        time.sleep(0.05)
    assert main(["sweep", "s.yaml"]) == 0
    other.succeed()
    sweep = Path("runs/s")
    assert sorted(trial.user_attrs["cell"] for trial in trials(sweep)) == ["dsnet/seed-0", "host/seed-0"]
    assert len({trial.user_attrs["host"] for trial in trials(sweep)}) == 2
    for key in KEYS[:2]:
        assert metrics(sweep, key) == metrics(finished, key)


def test_a_run_that_fails_is_told_and_the_others_are_run(capsys):
    text = SWEEP.replace("{norm: batch}", "{norm: batch, lr: 1.0e+30}").replace("[0, 1]", "[0]")
    Path("s.yaml").write_text(text)
    assert main(["sweep", "s.yaml"]) == 2
    told = capsys.readouterr()
    assert "1 of 2 runs failed, the first of them dsnet/seed-0: the loss of stage-batch was not finite" in told.err
    assert told.err.count("\n") == 1
    assert "DSNet, seed 0: failed: the loss" in told.out and "2 runs: 1 done, 1 failed" in told.out
    assert "| host | 0.05 | 1 |" in Path("runs/s/table.md").read_text()


def test_a_sweep_in_many_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", "s.yaml"]) == 2
    assert "start `dsnet sweep` once for each GPU" in capsys.readouterr().err
