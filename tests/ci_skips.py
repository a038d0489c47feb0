"""In CI (CI=true in the environment) a test may be skipped for want of a GPU or of real data sets only."""

import os
import re

import pytest

MAY_BE_MISSING = re.compile("CUDA|GPU|DENSE_SHORTCUTS_DATA")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped((yield))


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> pytest.TestReport | pytest.CollectReport:
    """The report, in CI with the outcome "failed" where it was "skipped" for another reason than those allowed."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if not MAY_BE_MISSING.search(reason):
            report.outcome, report.longrepr = "failed", f"CI must run this, but it was skipped: {reason}"
    return report
