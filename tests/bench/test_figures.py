"""Ratios, exponents and goals from seconds that are given, not measured."""

import pytest

from dense_shortcuts.experiments.bench import report
from dense_shortcuts.experiments.bench.config import BenchConfig
from dense_shortcuts.experiments.bench.figures import exponent, extra_seconds, growths, memory_ratio, speed_ratio
from dense_shortcuts.experiments.bench.goals import GOALS, outcomes
from dense_shortcuts.experiments.bench.measure import Result, Row
from dense_shortcuts.experiments.bench.traffic import ShortcutBytes
from dense_shortcuts.ops.backend import own_backend


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


def cpu_rows(train: float, peak: int) -> list[Row]:
    own = own_backend("cpu")[0]
    return [
        row("timm.resnet50", [1.0, 1.0]),
        *(row(f"dsnet50/{n}/{own}", [train] * 2, peak) for n in ("group", "batch")),
    ]


@pytest.mark.parametrize(("train", "peak", "verdict"), [(1.0, 109, "met"), (1.2, 111, "not met")])
def test_goals_are_held_to_figures_at_their_own_settings(train, peak, verdict):
    config = BenchConfig().resolved("cpu")
    found = outcomes([result(cpu_rows(train, peak))], config, "cpu", threads=2)
    assert len(found) == 2 * len(GOALS)
    assert {o.verdict for o in found if o.goal.startswith("cpu")} == {verdict}
    assert {o.verdict for o in found if o.goal.startswith("cuda")} == {"not run here"}
    others = [
        outcomes([result(cpu_rows(train, peak))], config, "cpu", threads=1),
        outcomes([result(cpu_rows(train, peak), shape=(4, 3, 128, 128))], config, "cpu", threads=2),
        outcomes([result(cpu_rows(train, peak), mode="compiled")], config, "cpu", threads=2),
    ]
    assert {o.verdict for each in others for o in each} == {"not run here"}


def test_a_goal_of_either_mode_takes_the_better_one():
    own = own_backend("cuda")[0]
    config = BenchConfig(device="cuda").resolved("cuda")
    shape = (256, 3, 224, 224)

    def at(mode: str, seconds: float) -> Result:
        rows = [row("torchvision.resnet50", [1.0]), row("torchvision.densenet121", [2.0])]
        return result([*rows, row(f"dsnet50/group/{own}", [seconds])], shape, mode)

    found = outcomes([at("eager", 1.25), at("compiled", 1.0)], config, "NVIDIA H100 80GB HBM3", threads=8)
    group = {o.goal: (o.measured, o.mode, o.verdict) for o in found if o.norm == "group"}
    assert group["cuda: train, dsnet50 over torchvision.resnet50"] == (1.0, "compiled", "met")
    assert group["cuda, eager: train, dsnet50 over torchvision.resnet50 (stretch)"] == (0.8, "eager", "not met")
    assert group["cuda: train, dsnet50 over torchvision.densenet121"] == (2.0, "compiled", "met")
    assert group["cuda: train, dsnet152 over torchvision.resnet152"][2] == "not run here"
    elsewhere = outcomes([at("eager", 1.0)], config, "NVIDIA A100", threads=8)
    assert {o.verdict for o in elsewhere} == {"not run here"}


def test_all_goals_of_a_network_are_held_to_one_mode():
    """Speed by one mode and memory by the other would be met by no network that anybody can run."""
    own, config, shape = own_backend("cuda")[0], BenchConfig(device="cuda").resolved("cuda"), (256, 3, 224, 224)

    def at(mode: str, seconds: float, peak: int) -> Result:
        others = [row("torchvision.resnet50", [1.0]), row("torchvision.densenet121", [2.0])]
        return result([*others, row(f"dsnet50/group/{own}", [seconds], peak)], shape, mode)

    def verdicts(*results: Result) -> dict[str, tuple]:
        found = outcomes(results, config, "NVIDIA H100 80GB HBM3", threads=8)
        wanted = [o for o in found if o.norm == "group" and o.goal.startswith("cuda: ") and "dsnet50" in o.goal]
        return {o.goal.split(": ")[1]: (o.mode, o.verdict) for o in wanted}

    train, memory = "train, dsnet50 over torchvision.resnet50", "memory, dsnet50 over torchvision.resnet50"
    apart = verdicts(at("eager", 1.5, 100), at("compiled", 1.0, 120))  # speed met by one, memory by the other
    assert {mode for mode, _ in apart.values()} == {"compiled"}
    assert (apart[train][1], apart[memory][1]) == ("met", "not met")
    both = verdicts(at("compiled", 1.0, 120), at("eager", 1.0, 100))
    assert set(both.values()) == {("eager", "met")}
