"""`dsnet bench` at a tiny size: what it leaves, what it refuses."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dense_shortcuts.cli import main
from dense_shortcuts.experiments.bench import measure, models
from dense_shortcuts.experiments.bench.config import BenchConfig
from dense_shortcuts.experiments.bench.models import comparisons
from dense_shortcuts.experiments.environment import backends

TINY = ["--device", "cpu", "--batch-size", "2", "--image-size", "32", "--rounds", "1"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_folded_networks_have_no_batch_norm_left_and_cannot_be_trained(capsys):
    config = BenchConfig(models=("dsnet50/batch/plain", "public_dsnet50"), what=("infer",), folded=True, rounds=1)
    config = config.resolved("cpu")
    for comparison in comparisons(config, "cpu")[0][:1]:
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


def test_bench_leaves_json_tables_and_a_plot(capsys):
    command = ["bench", *TINY, "--models", "dsnet50/batch/plain", "--output", "a", "--threads", "1"]
    assert main(command) == 0
    assert {p.name for p in Path("a").iterdir()} == {"results.json", "tables.md", "plot.png"}

    found = json.loads(Path("a/results.json").read_text())
    assert found["command"] == "dsnet " + " ".join(command)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] and found["started"]
    assert (found["threads"], found["device_type"], found["settings"]["precision"]) == (1, "cpu", "no")
    (comparison,) = found["comparisons"]
    assert (comparison["peer"], comparison["mode"], comparison["shape"]) == ("timm.resnet50", "eager", [2, 3, 32, 32])
    peer, dense = comparison["rows"]
    assert (peer["name"], dense["name"]) == ("timm.resnet50", "dsnet50/batch/plain")
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
    assert len(found["goals"]) == 18 and {goal["verdict"] for goal in found["goals"]} == {"not run here"}

    tables = Path("a/tables.md").read_text()
    assert "dsnet50/batch/plain" in tables and "not run here" in tables
    pixels = np.asarray(Image.open("a/plot.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == (31, 119, 180)).all(1).sum() > 1000  # the bars
    said = capsys.readouterr()
    assert "dsnet50/batch/plain" in said.out and said.err == ""


def test_a_depth_sweep_fits_how_cost_grows(capsys):
    sweep = ["--depths", "1", "2", "4", "--models", "dense/batch/plain", "--image-size", "8"]
    assert main(["bench", *TINY, *sweep, "--output", "a"]) == 0
    found = json.loads(Path("a/results.json").read_text())
    assert [c["depth"] for c in found["comparisons"]] == [1, 2, 4] and found["goals"] == []
    assert [[row["name"] for row in c["rows"]] for c in found["comparisons"]] == [["host", "dense/batch/plain"]] * 3
    growth = {g["what"]: g for g in found["growth"]}
    assert set(growth) == {"train", "infer", "bytes", "least bytes"}
    assert list(growth["bytes"]["by_depth"]) == ["1", "2", "4"] and 1.0 < growth["bytes"]["exponent"] < 2.0
    assert "exponent" in capsys.readouterr().out and Path("a/plot.png").stat().st_size > 10_000


def test_compiled_networks_are_compared_with_compiled_ones_and_none_runs_uncompiled(monkeypatch):
    """Nine networks of one class: by default PyTorch would run the ninth as it stands."""
    config = BenchConfig(models=("dense/batch/plain",), depths=(1,), rounds=1, what=("infer",)).resolved("cpu")
    (comparison,), _ = comparisons(config, "cpu")
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
    (comparison,), _ = comparisons(config, "cpu")

    def too_large() -> torch.nn.Module:
        raise torch.OutOfMemoryError("out of memory")

    broken = models.Entry("broken", too_large, too_large)
    mixed = models.Comparison("mixed", "host", (*comparison.entries, broken), 256, 256, 2, 1)
    result = measure.compare(mixed, "eager", 8, config, torch.device("cpu"), lambda line: None)
    assert [row.name for row in result.rows] == ["host", "dense/group/plain"]
    assert result.left_out == {"broken": "OutOfMemoryError: out of memory"}


def test_the_catalogue_has_every_network_for_every_norm_and_back_end_that_runs():
    config = BenchConfig(models=("*",)).resolved("cpu")
    found, refusals = comparisons(config, "cpu")
    names = {entry.name for each in found for entry in each.entries}
    hosts = {f"{source}.resnet{d}" for source in ("torchvision", "timm") for d in (50, 101, 152)}
    dense_nets = {f"torchvision.densenet{d}" for d in (121, 169, 201)} | {"timm.rdnet_tiny"}
    usable = [name for name, refusal in backends("cpu").items() if not refusal]
    dsnets = {f"dsnet{d}/{n}/{b}" for d in (50, 101, 152) for n in ("group", "batch") for b in usable}
    assert names == hosts | dense_nets | dsnets | {f"public_dsnet{d}" for d in (50, 101, 152)}
    assert "plain" in usable and not set(usable) & set(refusals)
    assert {each.peer for each in found} == {"timm.resnet50", "timm.resnet101", "timm.resnet152"}
    on_cuda = comparisons(BenchConfig(models=("dsnet*",)).resolved("cuda"), "cpu")[0]
    assert [each.batch_size for each in on_cuda] == [8, 8, 8]


def test_the_plain_command_measures_the_goals_of_its_device():
    cpu, cuda = (BenchConfig().resolved(device) for device in ("cpu", "cuda"))
    assert (cpu.image_size, cpu.modes, cpu.precision) == ((128,), ("eager",), "no")
    assert (cuda.image_size, cuda.modes, cuda.precision) == ((224,), ("eager", "compiled"), "bf16")
    assert timm.is_model("resnet152") and "dsnet152/*" in cuda.models
    (only,), _ = comparisons(cpu, "cpu")
    assert only.entries[0].name == only.peer == "timm.resnet50" and only.batch_size == 8


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
def test_cuda_is_refused_where_there_is_none(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "finds no CUDA device here" in capsys.readouterr().err and not Path("runs").exists()


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
