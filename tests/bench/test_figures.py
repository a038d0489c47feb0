"""Ratios, exponents and goals from seconds that are given, not measured."""

import pytest

from dense_shortcuts.experiments.bench import report
from dense_shortcuts.experiments.bench.config import BenchConfig
from dense_shortcuts.experiments.bench.figures import exponent, extra_seconds, growths, memory_ratio, speed_ratio
from dense_shortcuts.experiments.bench.goals import GOALS, outcomes
from dense_shortcuts.experiments.bench.measure import Result, Row
from dense_shortcuts.experiments.bench.traffic import ShortcutBytes


def row(name: str, train: list[float], peak: int = 100) -> Row:
    return Row(name, 1, {"train": train, "infer": [t / 4 for t in train]}, {"train": 9, "infer": 3}, peak)


def result(rows: list[Row], shape=(8, 3, 128, 128), mode="eager", depth=None) -> Result:
    return Result("depth 50", mode, rows[0].name, shape, depth, rows, {})


def test_ratios_are_taken_round_by_round_and_then_their_median():
    """The machine is ten times slower in the second round: medians of the seconds would give 2 / 4."""
    peer, slow = row("peer", [1.0, 10.0, 2.0]), row("slow", [2.0, 40.0, 4.0])
    assert speed_ratio(slow, peer, "train") == (0.5, 0.25, 0.5)
    assert speed_ratio(peer, peer, "train") == (1.0, 1.0, 1.0)
    assert extra_seconds(slow, peer, "train") == 2.0
    assert memory_ratio(row("big", [1.0], 150), row("peer", [1.0], 100)) == 1.5
    assert speed_ratio(Row("a", 1), Row("b", 1), "train") is None


def test_the_exponent_of_a_sweep_is_that_of_its_power_law():
    assert exponent({d: 3 * d**1.5 for d in (4, 8, 16, 64)}) == pytest.approx(1.5)
    assert exponent({4: 1.0}) is None and exponent({4: -1.0, 8: 1.0}) is None
    sweep = []
    for depth in (4, 8, 16):
        dense = row("dense", [1.0 * depth + depth**2])
        dense.shortcut_bytes = ShortcutBytes(7 * depth**2, depth, depth)
        sweep.append(result([row("host", [1.0 * depth]), dense], depth=depth))
    found = {growth.what: growth.exponent for growth in growths(sweep)}
    expected = {"train": 2, "infer": 2, "bytes": 2, "least bytes": 1}
    assert {what: pytest.approx(p) for what, p in expected.items()} == found
    tables = report.growth_tables(growths(sweep))
    assert len(tables) == 4 and tables["extra time of a training step, ms"][1][-1] == "2.00"


CPU = (8, 3, 224, 224)


def cpu_rows(train: float, peak: int) -> list[Row]:
    return [row("timm.resnet50", [1.0, 1.0]), *(row(f"dsnet50/{n}", [train] * 2, peak) for n in ("group", "batch"))]


@pytest.mark.parametrize(("train", "peak", "verdict"), [(1.0, 102, "met"), (1.2, 104, "not met")])
def test_goals_are_held_to_figures_at_their_own_settings(train, peak, verdict):
    config = BenchConfig().resolved("cpu")
    eager, compiled = (result(cpu_rows(train, peak), CPU, mode) for mode in ("eager", "compiled"))
    found = outcomes([eager], config, threads=2)
    assert {o.goal for o in found} == {str(g) for g in GOALS if g.network.startswith("dsnet50") and g.device == "cpu"}
    assert {o.verdict for o in found if "eager" in o.goal} == {verdict}
    assert {o.verdict for o in found if "compiled" in o.goal} == {"not run here"}
    assert {o.verdict for o in outcomes([eager, compiled], config, threads=2)} == {verdict}
    others = [
        outcomes([eager], config, threads=1),
        outcomes([eager], BenchConfig(precision="bf16").resolved("cpu"), threads=2),
        outcomes([result(cpu_rows(train, peak), shape=(4, 3, 224, 224))], config, threads=2),
        outcomes([result(cpu_rows(train, peak), shape=(8, 3, 128, 128))], config, threads=2),
    ]
    assert {o.verdict for each in others for o in each} == {"not run here"}


def test_a_network_without_goals_has_no_outcome():
    rows = [row("timm.resnet50", [1.0]), row("dsnet50/group/native", [1.0])]
    assert outcomes([result(rows, CPU)], BenchConfig().resolved("cpu"), threads=2) == []


def on_cuda(mode: str, seconds: float, peak: int, images: int = 256) -> Result:
    rows = [row("torchvision.resnet50", [1.0]), row("dsnet50/group", [seconds], peak)]
    return result(rows, (images, 3, 224, 224), mode)


def verdicts(*results: Result) -> dict[str, tuple]:
    found = outcomes(results, BenchConfig(device="cuda").resolved("cuda"), threads=8)
    return {o.goal: (o.measured, o.mode, o.verdict) for o in found}


SPEED, MEMORY = (f"cuda, either mode: {what}, dsnet50/group" for what in ("train", "memory"))


@pytest.mark.parametrize("images", [64, 256])
def test_a_goal_of_either_mode_takes_the_better_one_at_any_batch_size(images):
    found = verdicts(on_cuda("eager", 1.25, 100, images), on_cuda("compiled", 1.0, 100, images))
    assert found == {SPEED: (1.0, "compiled", "met"), MEMORY: (1.0, "compiled", "met")}


def test_all_goals_of_a_network_are_held_to_one_mode():
    """Speed by one mode and memory by the other would be met by no network that anybody can run."""
    apart = verdicts(on_cuda("eager", 1.5, 100), on_cuda("compiled", 1.0, 120))
    assert len({mode for _, mode, _ in apart.values()}) == 1
    assert sorted(verdict for _, _, verdict in apart.values()) == ["met", "not met"]
    both = verdicts(on_cuda("compiled", 1.0, 120), on_cuda("eager", 1.0, 100))
    assert both == {SPEED: (1.0, "eager", "met"), MEMORY: (1.0, "eager", "met")}
