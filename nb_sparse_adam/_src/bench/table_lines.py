# SPDX-License-Identifier: Apache-2.0
"""The lines of the comparison that are about `EmbeddingTable`."""

from __future__ import annotations

from typing import Any

from nb_sparse_adam._src.bench import table_runs
from nb_sparse_adam._src.bench.cases import CASES, Case
from nb_sparse_adam._src.bench.contenders import Contender, Ours
from nb_sparse_adam._src.bench.line import Entry, Figure, Line
from nb_sparse_adam._src.bench.tables import DictLookup, DictUpdate, TableLookup, TableUpdate, Take

_SECTION = "EmbeddingTable"
_MOST_OF_A_DICT = 2_000_000  # rows: a dict and its ids take some 150 bytes a row


def _entries(case: str, updates: bool) -> tuple[Entry, ...]:
    """Who updates, or looks up; a dict of Python's as long as it fits."""

    def fixed(case: Case, threads: int) -> Contender:
        return Ours(case, step_counts="row", threads=threads) if updates else Take(case)

    def known(case: Case, threads: int) -> Contender:
        return TableUpdate(case, threads=threads, after_lookup=True)

    def table(case: Case, threads: int) -> Contender:
        make = TableUpdate if updates else TableLookup
        return make(case, threads=threads)

    def dictionary(case: Case, threads: int) -> Contender:
        return (DictUpdate if updates else DictLookup)(case, threads=threads)

    found = [Entry("fixed" if updates else "numpy", case, fixed), Entry("table", case, table)]
    if updates:
        found.append(Entry("looked up", case, known))
    if CASES[case].rows <= _MOST_OF_A_DICT:
        found.append(Entry("dict", case, dictionary, "torch"))
    return tuple(found)


def _line(key: str, title: str, entries: tuple[Entry, ...], *figures: Figure, **options: Any) -> Line:
    """Make a line, with a figure of the dict where there is one."""
    of_dict = (Figure("dict and torch / table", "dict", "table"),) if entries[-1].name == "dict" else ()
    return Line(f"table-{key}", f"{title} in {{table}}", _SECTION, entries, (*figures, *of_dict), **options)


def _updates(key: str, what: str, case: str, at_most: float | None = None, **options: Any) -> Line:
    return _line(
        f"update-{key}", f"update of {what}", _entries(case, updates=True),
        Figure("times a fixed table's, ids just looked up", "looked up", "fixed", at_most=at_most),
        Figure("times a fixed table's, other ids", "table", "fixed"),
        **options,
    )  # fmt: skip


def _lookups(key: str, what: str, case: str, **options: Any) -> Line:
    figure = Figure("times numpy's, of an array's rows", "table", "numpy")
    return _line(f"lookup-{key}", f"look-up of {what}", _entries(case, updates=False), figure, **options)


_SIZES = ("10k", "100k", "1M", "10M", "50M")
_GIGABYTES = {"10M": 12, "50M": 22}
_UNIFORM = "{n} uniform ids"


def _of_size(size: str) -> tuple[Line, Line]:
    """Lines of a table of that many rows."""
    options: dict[str, Any] = {"by_name": True, "gigabytes": _GIGABYTES.get(size, 8)}
    case = f"rows-{size}x16-again"
    return _updates(size, _UNIFORM, case, **options), _lookups(size, _UNIFORM, case, **options)


def _named(names: tuple[str, ...]) -> tuple[Entry, ...]:
    """Entries for numbers of one measurement, which nobody steps for."""

    def none(case: Case, threads: int) -> Contender:
        raise NotImplementedError

    return tuple(Entry(name, "rows-20Mx16", none) for name in names)


TABLE_LINES = (
    _updates("zipf-64", "{n} Zipf(1.2) ids", "rows-zipf", at_most=1.15),
    _updates("zipf-16", "{n} Zipf(1.2) ids", "rows-zipf-16", at_most=1.15),
    _updates("uniform-64", "{n} uniform ids", "rows-2Mx64-shuffled", at_most=1),
    _updates("uniform-16", "{n} uniform ids", "rows-2Mx16-shuffled", at_most=1),
    _lookups("zipf-64", "{n} Zipf(1.2) ids", "rows-zipf"),
    _lookups("uniform-16", "{n} uniform ids", "rows-2Mx16-shuffled"),
    *(line for size in _SIZES for line in _of_size(size)),
    Line(
        "table-stream",
        f"new ids, {table_runs.BATCH} a call, in {{table}}",
        _SECTION,
        _named(table_runs.STREAM + table_runs.STREAM_MEMORY),
        (
            Figure("a call, the median", "half of the calls", unit="s"),
            Figure("a call, 999 of 1000", "999 in 1000", unit="s"),
            Figure("longest less that of writes", "longest", "longest, plain writes", at_most=0.05, unit="s",
                   difference=True),
            Figure("an id", "seconds an id", unit="s"),
            Figure("bytes over those of rows", table_runs.STREAM_MEMORY[0], at_most=1.15),
            Figure("bytes of the index, an id", table_runs.STREAM_MEMORY[1], at_most=24),
        ),
        measure="stream",
        quick=False,
        gigabytes=8,
    ),
    Line(
        "table-index",
        "50M ids in the index, one thread",
        _SECTION,
        tuple(entry._replace(case="rows-50Mx16-again") for entry in _named(table_runs.INDEX)),
        (
            Figure("a look-up", "a look-up", at_most=1 / 20e6, unit="s"),
            Figure("of random lines", "a random line", "a look-up", at_least=0.7),
            Figure("a look-up of others", "a look-up of what is not there", unit="s"),
            Figure("an insert, all threads", "an insert", at_most=1 / 8e6, unit="s"),
            Figure("an insert, one thread", "an insert, one thread", unit="s"),
        ),
        measure="index",
        quick=False,
        gigabytes=8,
        by_name=True,
    ),
)  # fmt: skip
