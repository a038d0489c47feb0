"""Many processes on CPU: the curve of one process within rounding, each test image once, resumed by another number."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from process_helpers import Group, fit, tiny
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dense_shortcuts import DenseShortcutError, recipes
from dense_shortcuts.cli import parse
from dense_shortcuts.experiments.train import loop
from dense_shortcuts.experiments.train.checkpoint import WEIGHTS
from dense_shortcuts.experiments.train.data import load_data
from dense_shortcuts.experiments.train.loop import make_loader, placed, prepare
from dense_shortcuts.experiments.train.network import build_network
from dense_shortcuts.experiments.train.processes import average_statistics, make_accelerator
from dense_shortcuts.experiments.train.states import newest_whole, read_predicted, read_shapes, saved_states
from dense_shortcuts.files import read_tensors

# Each is to give the same curve over any number of processes.
SAME = {
    "ddp, batch norms synchronised": tiny(norm="batch", sync_bn=True, clip_grad=0.5),
    "ddp, group norm throughout, in two parts": tiny(model="resnet_tiny_gn", accumulate=2, ema_decay=0.9),
    "fsdp": tiny(model="resnet_tiny_gn", strategy="fsdp", ema_decay=0.9, clip_grad=0.5, opt="adamw", lr=0.005),
    "fsdp, the host, synchronised": tiny(strategy="fsdp", sync_bn=True, aggregate="identity"),
    "fsdp, in parts, recomputed": tiny(
        model="resnet_tiny_gn", strategy="fsdp", accumulate=2, grad_checkpointing=True, epochs=1
    ),
}
WITH = {2: list(SAME), 4: ["ddp, batch norms synchronised", "fsdp"]}
RAGGED = (3, 33, 50)  # test images: fewer than the processes, one in the last batch, and some
RESUMED = tiny(model="resnet_tiny_gn", strategy="fsdp", ema_decay=0.9, epochs=3, sched="multistep", milestones=(1, 2))


def everything(folder: Path, count: int):
    """The work of `count` processes; what they find goes into found.json."""

    def work(rank: int) -> None:
        for name in WITH[count]:
            fit(SAME[name], folder / name)
        found = {"ragged": {images: ragged(images) for images in RAGGED}}
        found |= {"spread": spread(folder / "spread"), "statistics": statistics(rank), "no_sync": parts(folder / "no")}
        found |= {"unsynchronised": fit(tiny(norm="batch", epochs=1), folder / "unsynchronised")[0]["train_loss"]}
        fit(with_epochs(count), folder.parent / "resumed")
        found |= {"timeout": dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()}
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.destroy_process_group()

    return work


def with_epochs(count: int):
    """Four processes do the first epoch of `RESUMED`, two the second; its schedule does not ask for the last one."""
    return dataclasses.replace(RESUMED, epochs={4: 1, 2: 2, 1: 3}[count])


def ragged(images: int) -> list:
    config = tiny(limit_test=images).resolved()
    data, accelerator = load_data(config), make_accelerator(config)
    model = placed(build_network(config, 10), config, accelerator.device)
    network, loader = accelerator.prepare(model, make_loader(data.test, config))
    figures, predicted = loop.test_network(network, loader, 10, accelerator)
    accelerator.free_memory()
    return [figures, predicted.tolist()]


def spread(folder: Path) -> dict:
    """How a network lies over the processes."""
    folder.mkdir(exist_ok=True)
    config = tiny(strategy="fsdp").resolved()
    accelerator = make_accelerator(config)
    model = prepare(config, load_data(config), folder, accelerator).model
    here = torch.tensor([sum(p.to_local().numel() for p in model.parameters())])
    all_here = here.clone()
    dist.all_reduce(all_here)
    accelerator.free_memory()
    return {
        "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
        "here": here.item(),
        "everywhere": all_here.item(),
        "numbers": sum(p.numel() for p in model.parameters()),
    }


def statistics(rank: int) -> list[float]:
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank)
    average_statistics(norm)
    return norm.running_mean.tolist()


def parts(folder: Path) -> int:
    """How often gradients stay in their process, in an epoch of two steps in four parts each."""
    entered, before = [], DistributedDataParallel.no_sync

    def counted(self):
        entered.append(1)
        return before(self)

    DistributedDataParallel.no_sync = counted
    try:
        fit(tiny(accumulate=4, epochs=1), folder)
    finally:
        DistributedDataParallel.no_sync = before
    return len(entered)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same by one process, where nothing is split, synchronised or accumulated."""
    folder = tmp_path_factory.mktemp("alone")
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, config in SAME.items():
        fit(dataclasses.replace(config, accumulate=1), folder / name)
    fit(RESUMED, folder / "resumed")
    return folder


@pytest.fixture(scope="module")
def folders(alone, tmp_path_factory):
    """What four and then two processes leave; `alone` has imported what they need."""
    folder = tmp_path_factory.mktemp("together")
    for count in (4, 2):
        Group(count, everything(folder / str(count), count), folder / str(count)).succeed()
    return folder


def curve(folder: Path) -> list[float]:
    return [row[key] for row in loop.read_metrics(folder / loop.METRICS) for key in ("train_loss", "test_loss")]


@pytest.mark.long
@pytest.mark.parametrize(("count", "name"), [(count, name) for count, names in WITH.items() for name in names])
def test_many_processes_have_the_curve_and_the_weights_of_one(folders, alone, count, name):
    here, expected = folders / str(count) / name, alone / name
    assert curve(here) == pytest.approx(curve(expected), rel=1e-4)
    assert loop.read_metrics(here / loop.METRICS)[-1]["test_top1"] == pytest.approx(
        loop.read_metrics(expected / loop.METRICS)[-1]["test_top1"],
        abs=2.01,  # one image may fall over
    )
    weights, others = read_tensors(here / WEIGHTS)[0], read_tensors(expected / WEIGHTS)[0]
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, others[key], rtol=2e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("count", [2, 4])
def test_every_test_image_counts_once_in_a_ragged_last_batch(folders, count):
    found = json.loads((folders / str(count) / "found.json").read_text())["ragged"]
    AcceleratorState._reset_state(reset_partial_state=True)
    for images in RAGGED:
        figures, predicted = found[str(images)]
        expected, all_predicted = ragged(images)
        assert predicted == all_predicted and len(predicted) == images
        assert figures == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_fsdp_leaves_each_process_its_part_and_takes_the_stages_as_units(folders, count):
    found = json.loads((folders / str(count) / "found.json").read_text())["spread"]
    assert found["units"] == ["", "layer1", "layer2", "layer3"]
    assert found["everywhere"] == found["numbers"]
    assert found["here"] < 1.35 * found["numbers"] / count


@pytest.mark.parametrize("count", [2, 4])
def test_the_switches_act(folders, alone, count):
    found = json.loads((folders / str(count) / "found.json").read_text())
    assert found["timeout"] == tiny().timeout
    assert found["no_sync"] == 2 * 3
    assert found["statistics"] == [(count - 1) / 2] * 2
    synchronised = curve(folders / str(count) / "ddp, batch norms synchronised")[0]
    assert abs(found["unsynchronised"] - synchronised) > 1e-3


def test_states_of_a_split_network_are_in_shards_and_go_on_with_another_number_of_processes(folders, alone):
    four, two = folders / "4" / "fsdp", folders / "2" / "fsdp"
    for folder, count in ((four, 4), (two, 2)):
        assert [path.name for path in saved_states(folder)] == ["state-0002", "state-0001"]
        assert len(list((folder / "state-0002").glob("*.safetensors"))) == count
        assert not list(folder.glob(".*"))
    resumed = folders / "resumed"
    assert [path.name for path in saved_states(resumed)] == ["state-0002", "state-0001"]
    AcceleratorState._reset_state(reset_partial_state=True)
    (resumed / "model.json").unlink()
    fit(RESUMED, resumed)
    assert [path.name for path in saved_states(resumed)] == ["state-0003.safetensors", "state-0002"]
    assert curve(resumed) == pytest.approx(curve(alone / "resumed"), rel=1e-4)


def test_a_shard_that_is_cut_short_or_gone_is_found_and_the_state_before_it_taken(folders, tmp_path):
    folder = Path(shutil.copytree(folders / "4" / "fsdp", tmp_path / "fsdp"))
    shard = sorted((folder / "state-0002").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert newest_whole(folder) == folder / "state-0001"
    shard.unlink()
    with pytest.raises(DenseShortcutError, match="lacks a shard of"):
        read_shapes(folder / "state-0002")
    assert newest_whole(folder) == folder / "state-0001"
    assert len(read_predicted(folder)) == 50


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(DenseShortcutError, match="--accumulate 3, does not divide into whole images: take a multiple"):
        make_accelerator(tiny(accumulate=3))
    with pytest.raises(DenseShortcutError, match="mixup and cutmix need a multiple of 64"):
        make_accelerator(tiny(accumulate=32, mixup=0.2))
    with pytest.raises(DenseShortcutError, match="does not go with --compile"):
        tiny(strategy="fsdp", compile=True).resolved()


@pytest.mark.parametrize("begun", [False, True])
def test_the_slurm_script_begins_a_run_and_goes_on_with_it(tmp_path, begun):
    for name, text in (("scontrol", "echo node1; echo node2"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if begun:
        (tmp_path / "runs" / "dsnet50-imagenet").mkdir(parents=True)
        (tmp_path / "runs" / "dsnet50-imagenet" / "config.yaml").touch()
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    script = recipes.FOLDER / "slurm.sbatch"
    done = subprocess.run(
        ["bash", script],
        env=slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "imagenet", "RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[:5] == ["torchrun", "--nnodes", "2", "--nproc_per_node", "8"] and "node1:29500" in words
    command = parse(words[words.index("dense_shortcuts.cli") + 1 :])
    if begun:
        assert command.resume == tmp_path / "runs" / "dsnet50-imagenet"
    else:
        assert (command.config.epochs, command.config.batch_size, command.config.data_dir) == (90, 4096, "imagenet")
