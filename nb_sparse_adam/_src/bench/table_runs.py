# SPDX-License-Identifier: Apache-2.0
"""What an `EmbeddingTable` takes when it grows, and how fast its index is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import EmbeddingTable
from nb_sparse_adam._src.bench.cases import SEED, Case
from nb_sparse_adam._src.bench.contenders import HYPER
from nb_sparse_adam._src.table.memory import reserve

BATCH = 1 << 16  # ids of a call
ASKED = 1 << 21  # ids that are looked up to time the index

STREAM = ("half of the calls", "999 in 1000", "longest", "longest, plain writes", "seconds an id")
STREAM_MEMORY = ("bytes of rows, beside what they are made of", "bytes of the index, an id")
INDEX = ("a look-up", "a look-up of what is not there", "a random line", "an insert", "an insert, one thread")


class Call(NamedTuple):
    """A look-up of new ids.

    Attributes
    ----------
    table : EmbeddingTable
        After it.
    ids : (BATCH,) int64 array
    seconds : float
        That it took.
    writes : float
        Seconds that it took then to write as many bytes to memory that is as new: a machine that stops for
        others stops for both.
    grown : int
        Bytes of memory that the process has more than when the table was empty.
    """

    table: EmbeddingTable
    ids: NDArray[np.int64]
    seconds: float
    writes: float
    grown: int


def growing(rows: int, dim: int, threads: int) -> Iterator[Call]:
    """Give a table new ids at random, a batch at a time, until it has as many rows, or one batch."""
    table = EmbeddingTable(dim, num_threads=threads, **HYPER)
    rng = np.random.default_rng(SEED)
    table.lookup(np.arange(BATCH))
    table.evict(down_to=0)
    before = resident()
    for _ in range(max(rows // BATCH, 1)):
        ids = rng.integers(-(2**63), 2**63 - 1, BATCH)
        seconds = seconds_of(lambda ids=ids: table.lookup(ids))  # type: ignore[misc]
        writes = seconds_of(lambda: reserve(BATCH * (3 * dim + 8) * 4, "plain writes").fill(1))
        yield Call(table, ids, seconds, writes, resident() - before)


def stream(case: Case, threads: int) -> dict[str, float]:
    """Give a table as many new ids as the case has rows, a batch at a time; time each call."""
    calls, writes, worst, numbers = [], [], 0.0, {"rows": 0, "bytes_of_index": 0}
    for call in growing(case.rows, case.dim, threads):
        calls.append(call.seconds)
        writes.append(call.writes)
        numbers = call.table.stats()
        if numbers["rows"] >= min(1_000_000, case.rows // 2):
            worst = max(worst, (call.grown - numbers["bytes_of_index"]) / numbers["bytes_of_rows"])
    seconds = np.sort(calls)
    of_calls = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.999)], seconds[-1]
    times = (*of_calls, max(writes), seconds.sum() / numbers["rows"])
    return {
        **dict(zip(STREAM, map(float, times), strict=True)),
        **dict(zip(STREAM_MEMORY, (worst, numbers["bytes_of_index"] / numbers["rows"]), strict=True)),
    }


def index(case: Case, threads: int) -> dict[str, float]:
    """Time look-ups and inserts of the index of a table alone, and reads of random lines of its memory.

    Inserts are those with which the index grows once: from 5/7 of the case's rows on, on all threads and on
    one in turn.
    """
    rng = np.random.default_rng(SEED)
    names = rng.integers(-(2**63), 2**63 - 1, case.rows)
    table = EmbeddingTable(1, initializer="zeros", capacity=case.rows + BATCH)
    store = table._store
    for memory in (store._words, store._cells):
        memory.fill(0)  # the system gives it now, and not while it is timed
    timed = max(case.rows * 2 // 7 // BATCH, 2)
    before = max(case.rows - timed * BATCH, 0)
    for first in range(0, before, 4 * BATCH):
        store.insert(names[first : min(first + 4 * BATCH, before)], None, None)
    inserts: tuple[list[float], list[float]] = [], []
    for call in range(timed):
        new, number = names[before + call * BATCH :][:BATCH], (threads, 1)[call % 2]
        insert = partial(store.insert, new, None, number)
        inserts[call % 2].append(seconds_of(insert) / len(new))
    asked = rng.choice(names[: len(table)], ASKED)
    absent = rng.integers(-(2**63), 2**63 - 1, ASKED)
    found = [_median(lambda ids=ids: store.find(ids, 1)) / ASKED for ids in (asked, absent)]  # type: ignore[misc]
    line = _median(_line_reader(store._cells[: store.bytes_of_index // 8], rng)) / ASKED
    return dict(zip(INDEX, (*found, line, *(float(np.mean(each)) for each in inserts)), strict=True))


def _line_reader(words: NDArray[np.int64], rng: np.random.Generator) -> Callable[[], Any]:
    """Make what reads random lines of memory, as many as are looked up."""
    from nb_sparse_adam._src.bench.limits import read_lines

    lines = rng.integers(0, words.size // 8, ASKED)
    out = np.zeros(1, np.int64)
    return lambda: read_lines(words, lines, out)


def resident() -> int:
    """How many bytes of memory the process has now; 0 where the system does not say."""
    try:
        return 1024 * int(re.findall(r"^VmRSS:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[0])
    except OSError:
        return 0


def seconds_of(work: Callable[[], Any]) -> float:
    """Time a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _median(work: Callable[[], Any], times: int = 7) -> float:
    work()
    return float(np.median([seconds_of(work) for _ in range(times)]))
