"""Faults that are really made: killed processes, a full disk, a broken checkpoint, a bad loss, a lost process."""

import datetime
import errno
import os
import random
import resource
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from process_helpers import Group, tiny
from torch import distributed as dist

from dense_shortcuts import DenseShortcutError, files
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train import loop, run, states
from dense_shortcuts.experiments.train.config import TrainConfig, write_yaml
from dense_shortcuts.experiments.train.log import RUN_LOG
from dense_shortcuts.experiments.train.loop import METRICS, read_metrics
from dense_shortcuts.experiments.train.rerun import unclocked
from dense_shortcuts.experiments.train.states import saved_states, state_path
from dense_shortcuts.experiments.weight_log import SHORTCUTS, read_record

LABEL = "stage-group"
RECIPE = tiny(epochs=10, lr=0.2, deterministic=True, drop_path=0.2, mixup=0.2, ema_decay=0.9, limit_test=20)

# Where a process may be killed: a function, before it, after it or in its middle, and up to which of its calls.
AT_START = [
    (run, "load_data", "after", 1),
    (run, "make_folder", "before", 1),
    (run, "write_text", "before", 2),
    (run, "write_text", "after", 2),
    (run, "make_folder", "after", 1),
]
LATER = [
    (run, "load_data", "after", 1),
    (loop, "restore", "before", 1),
    (loop, "restore", "after", 1),
    (loop, "drop_later_lines", "before", 1),
    (loop, "train_epoch", "after", 2),
    (loop, "update_meters", "after", 6),  # two steps and a batch of test images an epoch
    (loop, "append_line", "before", 2),
    (loop, "append_line", "after", 2),
    (loop, "save_state", "after", 2),
    (files, "save_file", "before", 2),
    (files, "save_file", "middle", 2),
    (files, "sync_folder", "before", 3),
    (states, "forget", "before", 2),
    (states, "forget", "after", 2),
]
AT_END = (loop, "write_model", "before", 1)
KILLS = 20


def die_in(module, name: str, moment: str, call: int) -> None:
    """Have this process end by SIGKILL around the call with this number of a function; for forked processes only."""
    original, calls = getattr(module, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return original(*args, **kwargs)
        if moment == "middle":
            Path(args[1]).write_bytes(b"half of a checkpoint")
        elif moment == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, deadly)


def begin_and_die(folder: Path, fatal: tuple, rank: int) -> int:
    """The work of a process that is to die."""
    die_in(*fatal)
    return main(command(folder))


def command(folder: Path) -> list[str]:
    """The command that begins the run in `folder`, or goes on with it."""
    if folder.exists():
        return ["train", "--resume", str(folder)]
    return ["train", "--recipe", str(folder.parent / "r.yaml"), "--output", str(folder.parent), "--name", folder.name]


@pytest.fixture
def recipe(tmp_path):
    """Writes the recipe that `command` takes."""

    def write(config: TrainConfig) -> None:
        (tmp_path / "r.yaml").write_text(write_yaml(config))

    return write


@pytest.fixture(autouse=True)
def quick_report(monkeypatch):
    """What a network costs is no part of these tests, and is measured by the clock."""
    monkeypatch.setattr(run, "inference_speed", lambda models, config: [1.0] * len(models))
    monkeypatch.setattr(run, "training_step_memory", lambda config, num_classes: 1)


def results(folder: Path) -> tuple:
    """Metrics, the record of the shortcuts, and the names of all files, of weights and states with their bytes."""
    network = folder / LABEL
    files = {path.name: path.suffix == ".safetensors" and path.read_bytes() for path in network.iterdir()}
    return unclocked(read_metrics(network / METRICS)), read_record(network / SHORTCUTS), files


@pytest.mark.long
def test_a_run_killed_twenty_times_at_random_moments_ends_as_if_it_had_not_been(recipe, tmp_path):
    recipe(RECIPE)
    assert main(command(tmp_path / "whole")) == 0
    folder, drawn, deaths = tmp_path / "killed", random.Random(109), []
    for kill in range(KILLS):
        places = AT_START if not folder.exists() else LATER
        module, name, moment, calls = AT_END if kill == KILLS - 1 else drawn.choice(places)
        fatal = (module, name, moment, drawn.randint(1, calls))
        group = Group(1, partial(begin_and_die, folder, fatal), tmp_path / "output")
        assert group.codes() == [-signal.SIGKILL], group.said(0)
        deaths.append(name)
    assert {"save_file", "forget", "update_meters", "write_text"} <= set(deaths)  # in a save, in training, at the start
    assert main(command(folder)) == 0
    assert results(folder) == results(tmp_path / "whole")
    assert not [path for path in folder.rglob(".*")], "what a killed process left half done"
    log = (folder / RUN_LOG).read_text()
    assert log.count("resumed by `dsnet train`") + log.count("begun by") <= KILLS + 1
    assert "goes on from" in log and log.endswith("the run is finished\n")


def in_epoch(epoch: int, act) -> None:
    """Have this process do something when an epoch, counted from 1, begins; for forked processes only."""
    original = loop.train_epoch

    def acting(training, config, number, accelerator, display):
        if number + 1 == epoch:
            act(training)
        return original(training, config, number, accelerator, display)

    loop.train_epoch = acting


SHORT = tiny(epochs=4, deterministic=True, drop_path=0.2, limit_test=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same run without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "inference_speed", lambda models, config: [1.0] * len(models))
        (folder.parent / "r.yaml").write_text(write_yaml(SHORT))
        assert main(command(folder)) == 0
    return folder


def test_a_disk_that_fills_costs_nothing_that_was_saved(recipe, whole, tmp_path):
    recipe(SHORT)
    folder, room = tmp_path / "full", 60_000  # for half a state

    def work(rank: int) -> int:
        in_epoch(3, lambda training: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
        return main(command(folder))

    group = Group(1, work, tmp_path / "output")
    assert group.codes() == [2]
    last = group.said(0).splitlines()[-1]
    assert last.startswith(
        f"dsnet: error: no room to write {folder}/stage-group/state-0003.safetensors (File too large)"
    )
    assert last.endswith("what was saved before is whole, so free some space and go on with the run by --resume.")
    assert "stopped: no room to write" in (folder / RUN_LOG).read_text()
    assert [path.name for path in saved_states(folder / LABEL)] == ["state-0002.safetensors", "state-0001.safetensors"]
    assert not list((folder / LABEL).glob(".*"))
    assert main(command(folder)) == 0
    assert results(folder) == results(whole)


def test_a_disk_that_fills_within_the_librarys_own_writing_is_told_too(tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(DenseShortcutError, match=r"no room to write .*: what was saved before is whole"):
        files.write_tensors(tmp_path / "a", {}, {})
    with monkeypatch.context() as patch, pytest.raises(DenseShortcutError, match=r"no room to write .*metrics"):
        patch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        loop.append_line(tmp_path / METRICS, "{}")
    other = files.SafetensorError("Error while serializing: Permission denied (os error 13)")
    with pytest.raises(files.SafetensorError), files.told_when_full(tmp_path):
        raise other
    with pytest.raises(OSError, match="I/O error"), files.told_when_full(tmp_path):
        raise OSError(errno.EIO, "I/O error")


def test_of_a_truncated_state_the_one_before_is_taken_and_the_log_says_so(recipe, whole, tmp_path):
    recipe(SHORT)
    folder = tmp_path / "cut"

    def work(rank: int) -> int:
        die_in(loop, "train_epoch", "before", 4)
        return main(command(folder))

    assert Group(1, work, tmp_path / "output").codes() == [-signal.SIGKILL]
    newest = state_path(folder / LABEL, 3)
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert main(command(folder)) == 0
    log = (folder / RUN_LOG).read_text()
    assert "passed over state-0003.safetensors: " in log and "is not a whole safetensors file" in log
    assert "stage-group: goes on from state-0002.safetensors, its newest whole state, after 2 epochs" in log
    assert results(folder) == results(whole)

    (folder / LABEL / "model.json").unlink()
    for path in saved_states(folder / LABEL):
        path.write_bytes(b"")
    with pytest.raises(DenseShortcutError, match=r"no state in .* is whole \(state-0004.*remove them to train it from"):
        states.newest_whole(folder / LABEL)


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_is_not_finite_ends_all_processes_with_its_step_and_the_way_back(recipe, whole, tmp_path, count):
    recipe(SHORT)
    folder = tmp_path / "bad"

    def work(rank: int) -> int:
        def spoil(training) -> None:
            original, calls = training.loss, []

            def bad(output, target):
                calls.append(1)
                return original(output, target) * (float("nan") if len(calls) == 2 and rank == count - 1 else 1.0)

            training.loss = bad

        in_epoch(3, spoil)
        return main(command(folder))

    group = Group(count, work, tmp_path / "output")
    assert group.codes() == [2] * count
    for rank in range(count):
        assert (
            "dsnet: error: the loss of stage-group was not finite in step 2 of epoch 3: "
            "change lr (lower), clip_grad (1) or precision (no) "
            "in the run's config.yaml and go on by --resume from state-0002.safetensors, "
            "which is of epoch 2 and good." in group.said(rank)
        )
    if count == 1:
        assert main(command(folder)) == 0
        assert results(folder) == results(whole)


def backend():
    """What carries the messages between the processes."""
    return dist.group.WORLD._get_backend(torch.device("cpu"))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others_in_time_and_the_run_goes_on(recipe, tmp_path, number):
    recipe(tiny(epochs=3, model="resnet_tiny_gn", limit_test=20))

    def whole_run(rank: int) -> int:
        return main(command(tmp_path / "whole"))

    def broken_run(rank: int) -> int:
        if rank == 1:
            in_epoch(3, lambda training: os.kill(os.getpid(), number))
        else:  # a busy machine must not make it wait in vain before that
            in_epoch(3, lambda training: backend()._set_default_timeout(datetime.timedelta(seconds=2)))
        return main(command(tmp_path / "lost"))

    assert Group(2, whole_run, tmp_path / "output").codes() == [0, 0]
    group = Group(2, broken_run, tmp_path / "output")
    group.processes[0].join()
    os.kill(group.processes[1].pid, signal.SIGKILL)
    assert group.codes() == [2, -signal.SIGKILL]
    [error] = [line for line in group.said(0).splitlines() if line.startswith("dsnet: error: ")]
    assert error.startswith("dsnet: error: process 0 of 2 lost contact with another one (")
    assert error.endswith("see what that one said last, then start the processes again with --resume.")
    assert "stopped: process 0 of 2 lost contact" in (tmp_path / "lost" / RUN_LOG).read_text()

    assert Group(2, lambda rank: main(command(tmp_path / "lost")), tmp_path / "output").codes() == [0, 0]
    assert results(tmp_path / "lost") == results(tmp_path / "whole")


def test_an_interruption_and_what_follows_are_in_the_log(recipe, tmp_path):
    recipe(SHORT)
    folder = tmp_path / "stopped"

    def work(rank: int) -> int:
        in_epoch(2, lambda training: os.kill(os.getpid(), signal.SIGTERM))
        return main(command(folder))

    assert Group(1, work, tmp_path / "output").codes() == [128 + signal.SIGTERM]
    lines = [line.split("] ", 1)[1] for line in (folder / RUN_LOG).read_text().splitlines()]
    [begun] = [line for line in lines if line.startswith("begun by `dsnet train`: 1 process, on cpu, 1 threads, ")]
    assert begun.endswith("back end, deterministic")
    assert "stage-group: epoch 1 is done and saved in state-0001.safetensors" in lines
    assert lines[-1] == "interrupted by a signal"


def test_deterministic_mode_is_on_while_the_run_trains_and_off_after_it(tmp_path, monkeypatch):
    seen = []
    original = run.train_network

    def watching(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        original(*args)

    monkeypatch.setattr(run, "train_network", watching)
    for name, on in (("off", False), ("on", True)):
        config = tiny(epochs=1, deterministic=on, output=str(tmp_path), name=name)
        run.train(config)
        assert f"deterministic: {str(on).lower()}" in (tmp_path / name / "config.yaml").read_text()
    assert seen == [False, True] and not torch.are_deterministic_algorithms_enabled()
