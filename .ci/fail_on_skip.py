# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for the lane in which every optional dependency is there: a skip is a failure.

Loaded with ``PYTHONPATH=.ci PYTEST_PLUGINS=fail_on_skip pytest``. Expected failures stay what they are.
"""

import pytest


def fail_if_skipped(report):
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: nothing may be skipped in this lane. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    fail_if_skipped(report)
    return report
