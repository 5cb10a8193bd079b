# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.parameter_server` found, as tables of a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.pages import tables


def moves_table(result: dict[str, Any]) -> str:
    """Pulls and pushes beside bare actors, and beside a table in the same process."""
    rows = []
    for each in result["moves"]:
        taken = each["milliseconds"]
        rows.append(
            [
                f"{each['what']} {each['rows']:,} rows",
                str(each["shards"]),
                f"{taken['server']:.1f} ms",
                f"{taken['bare']:.1f} ms",
                f"{each['in the shard']:.1f} ms",
                f"{each['of the bare actors, less the shard']:.2f}",
                f"{taken['in process']:.1f} ms",
            ]
        )
    head = ["", "shards", "server", "bare actors", "in the shard", "ratio, less the shard", "in one process"]
    return tables.table(head, rows)


def log_table(result: dict[str, Any]) -> str:
    """Pushes with a log, and without."""
    return tables.table(
        ["push", '`"snapshot"`', "p99", '`"log"`', "p99"],
        [
            [
                f"{each['rows']:,} rows",
                *(
                    f"{each[what][durability]:.1f} ms"
                    for durability in ("snapshot", "log")
                    for what in ("milliseconds", "p99")
                ),
            ]
            for each in result["log"]
        ],
    )


def scaling_table(result: dict[str, Any]) -> str:
    """Rows a second, for shards and workers."""
    return tables.table(
        ["shards", "workers", "pulled and pushed a second", "p50", "p99"],
        [
            [
                str(each["shards"]),
                str(each["workers"]),
                f"{each['million rows a second']:.2f} million rows",
                f"{each['p50']:.0f} ms",
                f"{each['p99']:.0f} ms",
            ]
            for each in result["scaling"]
        ],
    )


def recovery_table(result: dict[str, Any]) -> str:
    """How long a shard is away, and how long a snapshot keeps pushes out."""
    rows = []
    for each in result["recovery"]:
        written = each["seconds for the snapshot"]
        rows.append(
            [
                each["from"],
                f"{each['seconds']:.1f} s",
                f"{written:.1f} s" if written else "",
                f"{each['milliseconds without pushes']:.1f} ms" if written else "",
            ]
        )
    million = result["recovery"][0]["rows"] / 1e6
    head = [f"{million:g} million rows, from", "back after", "written in", "pushes wait"]
    return tables.table(head, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "server moves": moves_table,
    "server log": log_table,
    "server scaling": scaling_table,
    "server recovery": recovery_table,
}
