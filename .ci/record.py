# SPDX-License-Identifier: Apache-2.0
"""A row of CONTRIBUTING.md's record of test runs: ``python .ci/record.py WHAT LOG...``.

Run by the Python that ran the tests. Each LOG is what one pytest printed; what they passed is added up.
"""

import datetime
import platform
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

PACKAGES = ("numba", "numpy", "scipy", "torch")


def counts(logs):
    """Add up the closing lines of pytest runs: what happened -> how often.

    Parameters
    ----------
    logs : iterable of str
        What each run printed.
    """
    sums = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    for log in logs:
        closing = log.strip().rpartition("\n")[2]
        found = re.findall(r"(\d+) (passed|failed|error|skipped)", closing)
        if not found:
            raise ValueError(f"pytest did not come to its closing line, the last one is {closing!r}")
        for number, outcome in found:
            sums[outcome] += int(number)
    return sums


def version(package):
    """Return the installed version, "-" if there is none."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "-"


def commit():
    """Return the commit at hand, with a plus sign if the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    out = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE)
    return out.stdout.strip() or "-"


def row(what, logs):
    """Return the row, as Markdown."""
    python = platform.python_version() + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
    number = counts(logs)
    failed = number["failed"] + number["error"]
    cells = [
        *[datetime.date.today().isoformat(), commit(), python, *map(version, PACKAGES), what],
        *[str(number["passed"]), str(failed), str(number["skipped"])],
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    print(row(what, [Path(path).read_text(encoding="utf-8") for path in paths]))
