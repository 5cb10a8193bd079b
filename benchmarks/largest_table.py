# SPDX-License-Identifier: Apache-2.0
"""The largest `EmbeddingTable` that fits the machine: the memory and the time that it takes to fill it.

    python -m benchmarks.largest_table [--rows N] [--dim N] [--json FILE] [--png FILE]

Ids come at random, 65,536 a call. Beside each call as many bytes are written to memory that is as new. Every
million rows, or twentieth of them: resident memory, beside what rows and index are made of; the times of the
calls since; look-ups of ids that are there. Without ``--rows``: as many as nine tenths of the free memory
hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# What only this needs is imported where it is used: asv imports this file with the package of older commits.

EVERY = 1_000_000  # rows


def measure(rows: int, dim: int) -> list[dict[str, float]]:
    """Fill a table, and say what it took on the way."""
    from nb_sparse_adam._src.bench.table_runs import BATCH, growing, seconds_of
    from nb_sparse_adam._src.engine.threads import max_threads

    every = min(EVERY, max(rows // 20, 1))
    found: list[dict[str, float]] = []
    calls: list[float] = []
    writes: list[float] = []
    for call in growing(rows, dim, max_threads()):
        table, ids = call.table, call.ids
        calls.append(call.seconds)
        writes.append(call.writes)
        if len(table) // every > len(found):
            numbers = table.stats()
            found.append(
                {
                    "rows": numbers["rows"],
                    "resident": call.grown,
                    "bytes of rows": numbers["bytes_of_rows"],
                    "bytes of the index": numbers["bytes_of_index"],
                    "median of calls": float(np.median(calls)),
                    "longest of calls": max(calls),
                    "longest of writes": max(writes),
                    "a look-up": seconds_of(partial(table.lookup, ids, train=False)) / BATCH,
                }
            )
            calls.clear()
            writes.clear()
            print(f"{numbers['rows']:,} rows, {found[-1]['resident'] / 1e9:.2f} GB", file=sys.stderr)
    return found


def draw(result: dict[str, Any]) -> Any:
    """Draw memory and times against the number of rows: a figure of matplotlib's."""
    from matplotlib.figure import Figure

    points = result["points"]
    rows = np.array([point["rows"] for point in points]) / 1e6

    def curve(name: str, scale: float) -> Any:
        return np.array([point[name] for point in points]) * scale

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    memory_axes, time_axes = figure.subplots(1, 2)
    made_of = curve("bytes of rows", 1e-9) + curve("bytes of the index", 1e-9)
    memory_axes.plot(rows, curve("resident", 1e-9), label="resident memory")
    memory_axes.plot(rows, made_of, "--", label="bytes of rows and index")
    memory_axes.plot(rows, curve("bytes of the index", 1e-9), label="of these the index")
    memory_axes.set(xlabel="million rows", ylabel="GB", title="What it takes", ylim=0)
    time_axes.plot(rows, curve("median of calls", 1e3), label="a call with 65,536 new ids, median")
    time_axes.plot(rows, curve("longest of calls", 1e3), ".", label="longest of these since the last million")
    time_axes.plot(rows, curve("longest of writes", 1e3), ".", label="longest of plain writes beside them")
    time_axes.set(xlabel="million rows", ylabel="ms", title="How long calls take", ylim=0)
    for axes in (memory_axes, time_axes):
        axes.set(xlim=0, ylim=0)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_ticks([tick for tick in axis.get_ticklocs() if low <= tick <= high])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("largest-table.json"))
    parser.add_argument("--png", type=Path)
    given = parser.parse_args(arguments)
    from nb_sparse_adam._src.bench import chart
    from nb_sparse_adam._src.bench.comparison import describe
    from nb_sparse_adam._src.bench.machine import memory
    from nb_sparse_adam._src.bench.settings import Settings
    from nb_sparse_adam._src.engine.threads import max_threads

    rows = given.rows
    if rows is None:
        free = memory("MemAvailable")
        if free is None:
            parser.error("the system does not say how much memory is free, expected --rows")
        rows = int(0.9 * free * 1e9 / (12 * given.dim + 32 + 24))
    machine = describe(Settings(peers=(), threads=max_threads(), quick=False))
    result = {**machine, "dim": given.dim, "points": measure(rows, given.dim)}
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.png is not None:
        given.png.write_bytes(chart.png(draw(result), result))


if __name__ == "__main__":
    main()
