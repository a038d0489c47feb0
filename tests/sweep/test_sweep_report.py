"""The table's arithmetic, on runs that are made up."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest
from scipy import stats

from dense_shortcuts.experiments.sweep import report
from dense_shortcuts.experiments.sweep.report import Run
from dense_shortcuts.experiments.sweep.spec import read_sweep

COST = {"peak_bytes": 2**20, "parameters": 1000, "multiply_adds": 5_000_000, "train_images_per_second": 100.0}


def run(seed: int, last: float, seconds: float = 20.0) -> Run:
    return Run(seed, (last / 2, last), (seconds / 2, seconds))


@pytest.fixture
def lines():
    """Two rows with three seeds in common and one more for the second, which takes twice as long."""
    done = {
        "host": [run(0, 10.0), run(1, 12.0), run(2, 11.0)],
        "DSNet": [run(0, 14.0, 40.0), run(1, 15.0, 40.0), run(2, 17.0, 40.0), run(3, 99.0, 40.0)],
    }
    return report.make_lines(read_sweep(Path("s.yaml")), done, {"host": COST, "DSNet": COST})


def test_the_difference_is_over_the_seeds_of_both_and_p_is_students_for_pairs(lines):
    host, dense = lines
    assert host.difference is None and host.p_value is None
    differences = [4.0, 3.0, 6.0]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    t = mean / (deviation / math.sqrt(3))
    assert dense.difference == pytest.approx(mean)
    assert dense.p_value == pytest.approx(2 * stats.t.sf(t, 2))


def test_accuracy_at_equal_time_is_on_the_line_between_two_epochs(lines):
    host, dense = lines
    assert host.at_equal_time == (10.0, 12.0, 11.0)
    assert dense.at_equal_time == (7.0, 7.5, 8.5, 49.5)
    assert report.accuracy_at(run(0, 10.0), 5.0) == 2.5  # halfway to the first epoch


def test_no_p_from_one_pair_or_from_equal_differences():
    assert report.paired_t([run(0, 5.0)], [run(0, 4.0)]) == (1.0, None)
    assert report.paired_t([run(0, 5.0), run(1, 6.0)], [run(0, 4.0), run(1, 5.0)]) == (1.0, None)
    assert report.paired_t([run(0, 5.0)], [run(1, 4.0)]) == (None, None)


def test_the_table_gives_mean_deviation_and_n_and_says_how_few_seeds_there_are(lines):
    text = report.markdown(lines, read_sweep(Path("s.yaml")))
    costs = "1,000 | 5.0 M | 100 | 1 MiB | 12.3 (a source) |"
    assert f"| host | 0.05 | 3 | 11.00 ± 1.00 |  |  | 2 | 20 | 11.00 ± 1.00 | {costs}" in text
    assert "| DSNet | 0.05 | 4 | 36.25 ± 41.85 | +4.33 |" in text
    assert "n = 3" in text and "paired t test" in text and "after 20 s" in text


def test_a_row_can_be_compared_with_another_than_the_first(lines):
    sweep = read_sweep(Path("s.yaml"))
    other = dataclasses.replace(sweep.rows[1], name="long", against="DSNet")
    sweep = dataclasses.replace(sweep, rows=(*sweep.rows, other))
    done = {"host": [run(0, 10.0)], "DSNet": [run(0, 14.0)], "long": [run(0, 20.0)]}
    long = report.make_lines(sweep, done, dict.fromkeys(done, COST))[2]
    assert long.difference == 6.0
    assert "+6.00 (DSNet)" in report.cells(long, False)


def test_the_csv_files_hold_the_same_figures(lines):
    rows = list(csv.DictReader(report.as_csv([report.flat(line) for line in lines]).splitlines()))
    assert (rows[1]["row"], rows[1]["n"], rows[1]["against"]) == ("DSNet", "4", "host")
    assert float(rows[1]["mean"]) == 36.25 and float(rows[1]["difference"]) == pytest.approx(13 / 3)


def test_rows_with_another_number_of_epochs_share_a_plot(lines):
    longer = dataclasses.replace(lines[1], runs=(Run(0, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0)),))
    report.plot(Path("p.png"), [lines[0], longer])
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
