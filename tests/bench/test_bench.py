"""`dsnet bench` at a tiny size: what it leaves, what it refuses."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dense_shortcuts.cli import main
from dense_shortcuts.errors import DenseShortcutError
from dense_shortcuts.experiments.bench import measure, models, run
from dense_shortcuts.experiments.bench.config import BenchConfig
from dense_shortcuts.experiments.bench.goals import GOALS
from dense_shortcuts.experiments.bench.models import comparisons
from dense_shortcuts.experiments.environment import backends

TINY = ["--device", "cpu", "--batch-size", "2", "--image-size", "32", "--rounds", "1", "--modes", "eager"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_folded_networks_have_no_batch_norm_left_and_cannot_be_trained(capsys):
    config = BenchConfig(models=("dsnet50/batch/plain", "public_dsnet50"), what=("infer",), folded=True, rounds=1)
    config = config.resolved("cpu")
    (comparison,) = comparisons(config, "cpu")
    images = torch.randn(1, 3, 32, 32)
    for entry in comparison.entries:
        torch.manual_seed(0)
        host = entry.build().eval()
        torch.manual_seed(0)
        contender = measure.Contender(entry, "eager", images, torch.zeros(1, dtype=torch.long), config)
        left = [m for m in contender.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert not left or entry.name == "public_dsnet50"  # its shortcuts' norms follow no convolution
        with torch.no_grad():
            torch.testing.assert_close(contender.model(images), host(images), rtol=1e-3, atol=1e-3)
    assert main(["bench", *TINY, "--models", "dsnet50/batch/plain", "--folded"]) == 2
    assert "add --what infer" in capsys.readouterr().err


def test_bench_leaves_json_and_tables(capsys):
    command = ["bench", *TINY, "--models", "dsnet50/batch", "--output", "a", "--threads", "1"]
    assert main(command) == 0
    assert {p.name for p in Path("a").iterdir()} == {"results.json", "tables.md"}

    found = json.loads(Path("a/results.json").read_text())
    assert found["command"] == "dsnet " + " ".join(command)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] and found["started"]
    assert (found["threads"], found["device_type"], found["settings"]["precision"]) == (1, "cpu", "no")
    (comparison,) = found["comparisons"]
    assert (comparison["peer"], comparison["mode"], comparison["shape"]) == ("timm.resnet50", "eager", [2, 3, 32, 32])
    peer, dense = comparison["rows"]
    assert (peer["name"], dense["name"]) == ("timm.resnet50", "dsnet50/batch")
    assert peer["speed_ratio"] == {what: {"median": 1.0, "least": 1.0, "most": 1.0} for what in ("train", "infer")}
    assert peer["memory_ratio"] == 1.0 and peer["shortcut_bytes"] is None
    for row in (peer, dense):
        assert [len(row["seconds"][what]) for what in ("train", "infer")] == [1, 1]
        assert row["peak_bytes"] > 12 * row["parameters"]  # weights, gradients and momentum in float32
        for what in ("train", "infer"):
            assert row["images_per_second"][what] == pytest.approx(2 / row["seconds"][what][0])
    for what in ("train", "infer"):
        ratio = peer["seconds"][what][0] / dense["seconds"][what][0]
        assert dense["speed_ratio"][what]["median"] == pytest.approx(ratio)
        assert dense["launched"][what] > peer["launched"][what] > 0
    assert peer["parameters"] == 25_557_032
    assert dense["shortcut_bytes"]["moved"] > dense["shortcut_bytes"]["least"] > 0
    assert len(found["goals"]) == 5 and {goal["verdict"] for goal in found["goals"]} == {"not run here"}

    tables = Path("a/tables.md").read_text()
    assert "| dsnet50/batch |" in tables and "not run here" in tables
    assert found["git"] is None or f"commit {found['git']['commit'][:7]}" in tables
    said = capsys.readouterr()
    assert "dsnet50/batch" in said.out and said.err == ""


def test_a_depth_sweep_fits_how_cost_grows(capsys):
    sweep = ["--depths", "1", "2", "4", "--models", "dense/batch/plain", "--image-size", "8"]
    assert main(["bench", *TINY, *sweep, "--output", "a"]) == 0
    found = json.loads(Path("a/results.json").read_text())
    assert [c["depth"] for c in found["comparisons"]] == [1, 2, 4] and found["goals"] == []
    assert [[row["name"] for row in c["rows"]] for c in found["comparisons"]] == [["host", "dense/batch/plain"]] * 3
    growth = {g["what"]: g for g in found["growth"]}
    assert set(growth) == {"train", "infer", "bytes", "least bytes"}
    assert list(growth["bytes"]["by_depth"]) == ["1", "2", "4"] and 1.0 < growth["bytes"]["exponent"] < 2.0
    assert "exponent" in capsys.readouterr().out


def test_compiled_networks_are_compared_with_compiled_ones_and_none_runs_uncompiled(monkeypatch):
    """Nine networks of one class: by default PyTorch would run the ninth as it stands."""
    config = BenchConfig(models=("dense/batch/plain",), depths=(1,), rounds=1, what=("infer",)).resolved("cpu")
    (comparison,) = comparisons(config, "cpu")
    entries = [models.Entry(f"{i}", e.build, e.build_host) for i in range(5) for e in comparison.entries]
    compiled = []
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda m: original(m, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    )
    nine = models.Comparison("nine", "0", tuple(entries), comparison.channels, comparison.classes, 2)
    result = measure.compare(nine, "compiled", 8, config, torch.device("cpu"), lambda line: None)
    assert len(result.rows) == 10 == len(compiled) and result.left_out == {} and result.mode == "compiled"
    assert all(row.launched == {} and row.shortcut_bytes is None for row in result.rows)


def test_a_network_that_cannot_run_is_left_out_with_the_reason():
    config = BenchConfig(depths=(1,), models=("dense/group/plain",), rounds=1, what=("infer",)).resolved("cpu")
    (comparison,) = comparisons(config, "cpu")

    def too_large() -> torch.nn.Module:
        raise torch.OutOfMemoryError("out of memory")

    broken = models.Entry("broken", too_large, too_large)
    mixed = models.Comparison("mixed", "host", (*comparison.entries, broken), 256, 256, 2, 1)
    result = measure.compare(mixed, "eager", 8, config, torch.device("cpu"), lambda line: None)
    assert [row.name for row in result.rows] == ["host", "dense/group/plain"]
    assert result.left_out == {"broken": "OutOfMemoryError: out of memory"}


def test_a_peer_that_cannot_run_is_one_sentence(capsys):
    """A transformer asserts that images have its own size."""
    assert main(["bench", *TINY, "--models", "plugged.vit*"]) == 2
    error = capsys.readouterr().err
    assert "the peer timm.vit_small_patch16_224 cannot run here (AssertionError: Input height" in error


def test_other_hosts_are_measured_beside_what_they_are_plugged():
    config = BenchConfig(models=("plugged.*",), rounds=1, what=("train",)).resolved("cpu")
    planned = comparisons(config, "cpu")
    assert [[entry.name for entry in each.entries] for each in planned] == [
        [f"timm.{host}", f"plugged.{host}"] for host in models.HOSTS
    ]
    small = next(each for each in planned if "mobilenetv3" in each.label)
    result = measure.compare(small, "eager", 32, config, torch.device("cpu"), lambda line: None)
    host, plugged = result.rows
    assert plugged.parameters > host.parameters and plugged.launched["train"] > host.launched["train"]
    assert plugged.seconds["train"] and plugged.shortcut_bytes is None and result.left_out == {}


def test_the_catalogue_has_every_network_for_every_norm_and_back_end_that_runs():
    config = BenchConfig(models=("*",)).resolved("cpu")
    found = comparisons(config, "cpu")
    names = {entry.name for each in found for entry in each.entries}
    hosts = {f"{source}.resnet{d}" for source in ("torchvision", "timm") for d in (50, 101, 152)}
    dense_nets = {f"torchvision.densenet{d}" for d in (121, 169, 201)} | {"timm.rdnet_tiny"}
    usable = [f"/{name}" for name, refusal in backends("cpu").items() if not refusal]
    dsnets = {f"dsnet{d}/{n}{b}" for d in (50, 101, 152) for n in ("group", "batch") for b in ("", *usable)}
    others = {f"{kind}.{host}" for kind in ("timm", "plugged") for host in models.HOSTS}
    assert names == hosts | dense_nets | dsnets | others | {f"public_dsnet{d}" for d in (50, 101, 152)}
    peers = {"timm.resnet50", "timm.resnet101", "timm.resnet152"} | {f"timm.{host}" for host in models.HOSTS}
    assert {"/plain", "/native"} <= set(usable) and {each.peer for each in found} == peers
    asked = comparisons(BenchConfig(models=("dsnet*",), modes=("compiled",), batch_size=3).resolved("cpu"), "cpu")
    assert [(each.batch_size, each.modes) for each in asked] == [(3, ("compiled",))] * 3


def test_a_name_without_a_back_end_is_what_users_get():
    (comparison,) = comparisons(BenchConfig(depths=(1,), models=("dense/group*",)).resolved("cpu"), "cpu")
    chosen = {entry.name: entry.build()[0].shortcut.backend for entry in comparison.entries[1:]}
    assert chosen == {"dense/group": "auto", "dense/group/plain": "plain", "dense/group/native": "native"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_goals_are_measured_by_the_plain_command_and_those_of_other_hosts_where_they_are_asked_for(device):
    measured = set()
    for asked in ((), ("plugged.*",)):
        config = BenchConfig(models=asked).resolved(device)
        assert config.image_size == (224,) and config.precision == ("bf16" if device == "cuda" else "no")
        for each in planned(config, device):
            measured |= {
                (e.name, each.batch_size, mode, w) for e in each.entries for mode in each.modes for w in config.what
            }
    for goal in GOALS:
        if goal.device == device:
            what = "train" if goal.what == "memory" else goal.what
            sizes = {
                size
                for name, size, mode, w in measured
                if (name, w) == (goal.network, what) and goal.mode in (None, mode)
            }
            assert sizes and goal.batch_size in (None, *sizes), goal


def planned(config: BenchConfig, device: str) -> list[models.Comparison]:
    """What is planned for a device that need not be here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "backends", lambda device: {"plain": ""})
        return comparisons(config, device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet5"], "no network is named 'resnet5': choose among "),
        (["--models", "dsnet50/group/cuda"], "no network is named 'dsnet50/group/cuda'"),
        (["--batch-size", "0"], "--batch-size is 0: it must be 1 or above"),
        (["--image-size", "16"], "--image-size 16 is too small"),
        (["--depths", "4", "-1"], "--depths is -1"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--batch-size", "1", "--image-size", "32"], "leaves a batch norm one pixel"),
        (
            ["--depths", "1", "--models", "host", "--image-size", "1", "--batch-size", "1"],
            "--image-size 1 leaves a batch",
        ),
        (["--output", "here"], "here exists already: choose another --output"),
        (["--output", "file.txt/a"], "cannot make file.txt/a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_with_code_2_and_leaves_nothing(arguments, message, capsys):
    Path("here").mkdir()
    Path("file.txt").write_text("not a folder")
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsnet: error: ") and error.count("\n") == 1 and message in error
    assert sorted(os.listdir()) == ["file.txt", "here"] and not os.listdir("here")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--gpu"]], ids=" ".join)
def test_cuda_is_refused_where_there_is_none(flags, capsys):
    assert main(["bench", *flags]) == 2
    error = capsys.readouterr().err
    assert f"{' '.join(flags)}: PyTorch finds no CUDA device here" in error and error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`--gpu` on the CPU, with two passes to look at; the first one is made wrong."""
    stage = BenchConfig(gpu=True, depths=(1,), models=("dense/group",), image_size=(8,), precision="no", rounds=1)
    monkeypatch.setattr(run, "choose_device", lambda config: torch.device("cpu"))
    monkeypatch.setattr(run, "faults", lambda backend, device, tell: (2, [f"join on {device} of {backend.__name__}"]))
    return stage


def test_a_pass_that_differs_from_the_reference_is_reported_and_the_rest_is_measured(as_on_a_gpu):
    with pytest.raises(DenseShortcutError, match=r"differ from the reference, 1 times: see a/tables\.md"):
        run.bench(dataclasses.replace(as_on_a_gpu, output=Path("a")), "dsnet bench --gpu")
    tables = Path("a/tables.md").read_text()
    assert "2 cases, 1 differ" in tables and "- join on cpu of dense_shortcuts.ops.backends.triton\n" in tables
    (comparison,) = json.loads(Path("a/results.json").read_text())["comparisons"]
    assert [list(row["seconds"]) for row in comparison["rows"]] == [["train"]] * 2


def test_nothing_is_begun_when_the_time_is_up(as_on_a_gpu, monkeypatch):
    (comparison,) = comparisons(as_on_a_gpu.resolved("cpu"), "cpu")
    result = measure.compare(
        comparison, "eager", 8, as_on_a_gpu.resolved("cpu"), torch.device("cpu"), lambda line: None, until=0.0
    )
    assert [row.name for row in result.rows] == ["host"] and list(result.left_out) == ["dense/group"]
    monkeypatch.setattr(run, "LAST_BEGIN", -1)
    monkeypatch.setattr(run, "faults", lambda *_: (2, []))
    run.bench(dataclasses.replace(as_on_a_gpu, output=Path("a")), "dsnet bench --gpu")
    assert json.loads(Path("a/results.json").read_text())["comparisons"] == []
    assert "- left out: stage of 1 block, eager (the time of --gpu was up)" in Path("a/tables.md").read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_the_heap_is_kept_so_that_freed_memory_is_not_fetched_again_page_by_page():
    """In a process of its own, with a heap of its own."""
    code = """if True:
        import resource, torch
        from dense_shortcuts.experiments.bench.measure import kept_heap

        def fetched(size):
            faults = []
            for _ in range(4):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                maps = [torch.ones(size) for _ in range(3)]  # each by itself from the system, were it not kept
                del maps
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            return min(faults[1:])

        before = fetched(2**24)
        with kept_heap():
            kept = fetched(2**24)
        print(before, kept, fetched(3 * 2**24))  # each larger than what may be left of the heap
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, kept, behind = map(int, run.stdout.split())
    assert 10 * kept < before and 10 * kept < behind  # 192 MiB are 49,152 pages, or 96 huge ones
