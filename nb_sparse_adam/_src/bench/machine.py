# SPDX-License-Identifier: Apache-2.0
"""What the machine has."""

from __future__ import annotations

from pathlib import Path


def memory(what: str) -> float | None:
    """Return a line of /proc/meminfo, such as "MemAvailable", in GB; None where there is none."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{what}:"):
                return round(int(line.split()[1]) / 1e6, 1)
    except OSError:
        pass
    return None
