"""CI fails where a test is skipped, other than for want of a GPU or of real data sets."""

import ci_skips
import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_runs(): pass

def test_needs_a_library(): pytest.importorskip("no_such_library")

@pytest.mark.skipif(True, reason="no browser")
def test_needs_a_browser(): pass

@pytest.mark.skipif(True, reason="there is no CUDA device")
def test_needs_a_gpu(): pass

def test_needs_data(): pytest.skip("no CIFAR-100 in x: set DENSE_SHORTCUTS_DATA to a folder that holds cifar100/")

@pytest.mark.xfail
def test_fails_as_expected(): assert False
"""


def outcomes(pytester: pytest.Pytester) -> dict[str, int]:
    pytester.makepyfile(TESTS, test_whole_file="import pytest; pytest.importorskip('no_such_library')")
    done = pytester.runpytest_inprocess("--continue-on-collection-errors", plugins=[ci_skips])
    return done.parseoutcomes()


def test_ci_fails_where_a_test_is_skipped_that_it_could_run(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert outcomes(pytester) == {"passed": 1, "skipped": 2, "failed": 1, "errors": 2, "xfailed": 1}


def test_elsewhere_a_skip_is_a_skip(pytester, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert outcomes(pytester) == {"passed": 1, "skipped": 5, "xfailed": 1}
