# SPDX-License-Identifier: Apache-2.0
"""Every line of the comparison: who steps through which case, which figures come of it, and their targets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nb_sparse_adam._src.annotations import StepCounts
from nb_sparse_adam._src.bench.cases import Case
from nb_sparse_adam._src.bench.contenders import Contender, Grouping, NumpyUnique, Ours
from nb_sparse_adam._src.bench.in_torch import DropInRows, FusedBag
from nb_sparse_adam._src.bench.limits import Limit
from nb_sparse_adam._src.bench.line import Entry, Figure, Line
from nb_sparse_adam._src.bench.peers import FbgemmBag, PaddleRows, TorchBag, TorchEntries, TorchRows
from nb_sparse_adam._src.bench.recommender_lines import RECOMMENDER_LINES
from nb_sparse_adam._src.bench.table_lines import TABLE_LINES


def _ours(
    case: str,
    step_counts: str,
    on_nonfinite: str = "raise",
    name: str | None = None,
    threads: int | None = None,
) -> Entry:
    def make(case: Case, given: int) -> Contender:
        return Ours(
            case,
            step_counts=step_counts,
            threads=given if threads is None else threads,
            on_nonfinite=on_nonfinite,
        )

    return Entry(name or step_counts, case, make)


def _limit(
    case: str, step_counts: StepCounts, reads: int = 1, name: str = "limit", threads: int | None = None
) -> Entry:
    def make(case: Case, given: int) -> Contender:
        return Limit(
            case, step_counts=step_counts, threads=given if threads is None else threads, reads=reads
        )

    return Entry(name, case, make)


def _peer(name: str, case: str, peer: str, make: Callable[..., Contender], **options: Any) -> Entry:
    return Entry(name, case, lambda case, threads: make(case, threads=threads, **options), peer)


_torch_rows = functools.partial(_peer, "torch", peer="torch", make=TorchRows)
_torch_bag = functools.partial(_peer, "torch", peer="torch", make=TorchBag)

IN_A_ROW = 4
"""Steps timed together where shares of the limit are measured, all gradients of a case: a few percent count.
Not where a contender looks up bags before each.
"""

_MEMORY = "Beside the limit that memory sets"
_PEERS = "Beside others"
_IN_TORCH = "In torch: nb_sparse_adam.torch"
_SMALL = "Small steps"
_SCALE = "As things grow"
_START = "Starting"


def _rows(dim: int, case: str) -> Line:
    return Line(
        f"rows-{dim}",
        "{n} sorted rows of {table}, row counts",
        _MEMORY,
        (
            _ours(case, "row", "propagate", "propagate"),
            _limit(case, "row"),
            _ours(case, "row", "raise", "raise"),
            _limit(case, "row", 2, "limit, gradient read twice"),
        ),
        (
            Figure('of the limit, "propagate"', "limit", "propagate", at_least=0.95),
            Figure('of the limit, "raise"', "limit, gradient read twice", "raise", at_least=0.95),
        ),
        loop=IN_A_ROW,
    )


def _elements(key: str, what: str, case: str, at_least: float) -> Line:
    return Line(
        key,
        f"{what}, element counts",
        _MEMORY,
        (
            _ours(case, "element", "propagate"),
            _limit(case, "element"),
            _ours(case, "row", "propagate"),
        ),
        (
            Figure("of the limit", "limit", "element", at_least=at_least),
            Figure("times as long as row counts", "element", "row"),
        ),
        loop=IN_A_ROW,
    )


def _bags(key: str, what: str, case: str) -> Line:
    return Line(
        key,
        f"{{bags}} bags of {{lookups}}, {what}",
        _PEERS,
        (
            _ours(case, "element"),
            _ours(case, "row"),
            _torch_bag(case=case),
            _peer("FBGEMM SGD", case, "fbgemm", FbgemmBag, optimizer="EXACT_SGD"),
            _peer("FBGEMM AdaGrad", case, "fbgemm", FbgemmBag, optimizer="EXACT_ADAGRAD"),
            Entry("grouping", case, lambda case, threads: Grouping(case, threads=threads)),
            _limit(case, "element", 2),
        ),
        (
            Figure("torch / element", "torch", "element", at_least=8),
            Figure("torch / row", "torch", "row", at_least=8),
            Figure("FBGEMM SGD / element", "FBGEMM SGD", "element", at_least=1),
            Figure("FBGEMM SGD / row", "FBGEMM SGD", "row", at_least=1),
            Figure("FBGEMM AdaGrad / element", "FBGEMM AdaGrad", "element", at_least=4),
            Figure("FBGEMM AdaGrad / row", "FBGEMM AdaGrad", "row", at_least=4),
            Figure("of the limit, grouping included", "limit", "element"),
        ),
    )


def _drop_in(ids: str, case: str) -> Line:
    return Line(
        f"torch-optimizer-{case.removeprefix('rows-')}",
        f"{{n}} {ids} ids in {{table}}, not coalesced",
        _IN_TORCH,
        (
            _peer("SparseAdam", case, "torch", DropInRows, coalesced=False),
            _torch_rows(case=case, coalesced=False),
        ),
        (Figure("torch / SparseAdam", "torch", "SparseAdam", at_least=6),),
    )


def _fused(ids: str, case: str) -> Line:
    return Line(
        f"torch-{case}",
        f"backward and update, {{bags}} bags of {{lookups}} {ids} ids in {{table}}",
        _IN_TORCH,
        (_peer("EmbeddingBag", case, "torch", FusedBag), _torch_bag(case=case)),
        (Figure("torch / EmbeddingBag", "torch", "EmbeddingBag", at_least=8),),
    )


def _small(rows: int, microseconds: float, torchs: float) -> Line:
    """What a call costs. The times are those of another machine, torch's there included: hence the ratio."""
    case = f"small-{rows}x16"
    return Line(
        f"small-{rows}",
        f"{{n}} row{'s' * (rows > 1)} of {{table}}",
        _SMALL,
        (_ours(case, "element"), _torch_rows(case=case, coalesced=True)),
        (
            Figure("a step", "element", at_most=microseconds / 1e6, unit="s"),
            Figure("torch / element", "torch", "element", at_least=round(torchs / microseconds, 1)),
        ),
        loop=200,
    )


def _threads(key: str, title: str, case: str, step_counts: StepCounts) -> Line:
    return Line(
        f"threads-{key}",
        f"1 -> 2 threads: {title}",
        _SCALE,
        (
            _ours(case, step_counts, name="one", threads=1),
            _ours(case, step_counts, name="two", threads=2),
            _limit(case, step_counts, 2, "limit, one", threads=1),
            _limit(case, step_counts, 2, "limit, two", threads=2),
        ),
        (
            Figure("times faster", "one", "two", at_least=1.8),
            Figure("times faster is the limit", "limit, one", "limit, two"),
        ),
        loop=IN_A_ROW,
    )


def _processes(layer: str, at_most: float) -> Line:
    cases = {"rows": "rows-2Mx64", "bags": "bag-zipf"}
    return Line(
        f"processes-{layer}",
        f"two processes, 2 threads each, on 2 cores: {layer}",
        _SCALE,
        tuple(_ours(case, "row", name=name) for name, case in cases.items()),
        tuple(
            Figure(
                f"times as long as alone, {name}",
                f"{name}, beside another",
                f"{name}, alone",
                at_most=at_most,
            )
            for name in cases
        ),
        measure="processes",
        layer=layer,
        gigabytes=12,
        quick=False,
    )


def _first_step() -> Line:
    cases = {"rows": "rows-2Mx64", "bags": "bag-uniform", "CSR": "csr-400kx1024"}
    return Line(
        "first-step",
        "the first step of a process, kernels compiled or found on disk",
        _START,
        tuple(_ours(case, "element", name=name) for name, case in cases.items()),
        tuple(
            Figure(f"{name}, {how}", f"{name}, {how}", unit="s")
            for name in cases
            for how in ("compiled", "from disk")
        ),
        measure="first_step",
        gigabytes=2,
        quick=False,
    )


_ALL = [
    _rows(16, "rows-6Mx16"),
    _rows(32, "rows-3Mx32"),
    _rows(64, "rows-2Mx64"),
    _rows(128, "rows-1Mx128"),
    _elements("element-64", "{n} sorted rows of {table}", "rows-2Mx64", 0.9),
    _elements("element-16", "{n} sorted rows of {table}", "rows-6Mx16", 0.9),
    _elements("element-half", "{n} sorted rows of {table}, half zero", "rows-2Mx64-half", 0.75),
    Line(
        "csr",
        "CSR, {per_row} entries in each of {n} rows of {table}",
        _MEMORY,
        (
            _ours("csr-400kx1024", "element"),
            _limit("csr-400kx1024", "element"),
            _peer("torch", "csr-400kx1024", "torch", TorchEntries, coalesced=True),
        ),
        (
            Figure("of the limit", "limit", "element", at_least=0.7),
            Figure("torch / element", "torch", "element"),
        ),
        loop=IN_A_ROW,
    ),
    Line(
        "rows-shuffled",
        "{n} shuffled rows of {table}",
        _PEERS,
        (
            _ours("rows-2Mx64-shuffled", "row"),
            Entry("grouping", "rows-2Mx64-shuffled", lambda case, threads: Grouping(case, threads=threads)),
            _torch_rows(case="rows-2Mx64-shuffled", coalesced=False),
        ),
        (
            Figure("torch / row", "torch", "row"),
            Figure("of it grouping", "grouping", "row"),
        ),
    ),
    Line(
        "rows-coalesced",
        "{n} sorted rows of {table}",
        _PEERS,
        (
            _ours("rows-2Mx64", "element"),
            _ours("rows-2Mx64", "row"),
            _ours("rows-2Mx64", "global", "propagate", 'global, "propagate"'),
            _torch_rows(case="rows-2Mx64", coalesced=True),
        ),
        (
            Figure("torch / element", "torch", "element", at_least=6),
            Figure("torch / row", "torch", "row", at_least=6),
            Figure('torch / global, "propagate"', "torch", 'global, "propagate"', at_least=6),
        ),
    ),
    Line(
        "paddle",
        "{n} sorted rows of {table}",
        _PEERS,
        (
            _ours("rows-2Mx64", "element"),
            _ours("rows-2Mx64", "row"),
            _peer("Paddle", "rows-2Mx64", "paddle", PaddleRows),
        ),
        (
            Figure("Paddle / element", "Paddle", "element", at_least=12),
            Figure("Paddle / row", "Paddle", "row", at_least=12),
        ),
    ),
    Line(
        "rows-zipf",
        "{n} Zipf(1.2) ids in {table}",
        _PEERS,
        (
            _ours("rows-zipf", "element"),
            _ours("rows-zipf", "row"),
            _torch_rows(case="rows-zipf", coalesced=False),
            Entry("grouping, one thread", "rows-zipf", lambda case, _: Grouping(case, threads=1)),
            Entry("numpy.unique", "rows-zipf", lambda case, _: NumpyUnique(case)),
        ),
        (
            Figure("torch / element", "torch", "element", at_least=6),
            Figure("torch / row", "torch", "row", at_least=6),
            Figure("numpy.unique / grouping", "numpy.unique", "grouping, one thread", at_least=3),
        ),
    ),
    _bags("bag-uniform", "uniform in {table}", "bag-uniform"),
    _bags("bag-zipf", "Zipf(1.2) in {table}", "bag-zipf"),
    Line(
        "linear",
        "linear model, {samples} samples of {nonzeros} features in {table}",
        _PEERS,
        (
            _ours("linear", "element"),
            _ours("linear", "row"),
            _torch_bag(case="linear"),
            Entry("grouping", "linear", lambda case, threads: Grouping(case, threads=threads)),
            _limit("linear", "element", 2),
        ),
        (
            Figure("torch / element", "torch", "element", at_least=10),
            Figure("torch / row", "torch", "row", at_least=10),
            Figure("of the limit, grouping included", "limit", "element"),
        ),
    ),
    _drop_in("uniform", "rows-uniform"),
    _drop_in("Zipf(1.2)", "rows-zipf"),
    _fused("uniform", "bag-uniform"),
    _fused("Zipf(1.2)", "bag-zipf"),
    _small(1, 15, 68),
    _small(32, 20, 94),
    Line(
        "hot",
        "{bags} bags of {lookups} in {table}, one row takes half of the ids",
        _SCALE,
        (
            _ours("bag-hot", "element", name="hot"),
            _ours("bag-hot-without", "element", name="without it"),
        ),
        (Figure("times as long as without it", "hot", "without it", at_most=1.5),),
    ),
    Line(
        "large",
        "80M instead of 10M rows of 16",
        _SCALE,
        (
            _ours("rows-10Mx16", "row", name="10M"),
            _ours("rows-80Mx16", "row", name="80M"),
        ),
        (Figure("times as long", "80M", "10M", at_most=1.4),),
        gigabytes=19,
        quick=False,
    ),
    _threads("rows", "{n} sorted rows of {table}", "rows-2Mx64", "row"),
    _threads("elements", "{n} sorted rows of {table}, element counts", "rows-2Mx64", "element"),
    _threads("bags", "{bags} bags of {lookups} in {table}", "bag-uniform", "row"),
    _processes("workqueue", 2.5),
    _processes("tbb", 2.5),
    _processes("omp", 3.2),
    Line(
        "torch-memory",
        "peak memory in torch, in gradients of a row an id: {bags} bags of {lookups} in {table}",
        _SCALE,
        (
            _peer("EmbeddingBag", "bag-uniform", "torch", FusedBag),
            _torch_bag(case="bag-uniform"),
        ),
        (Figure("torch - EmbeddingBag", "torch", "EmbeddingBag", at_least=1, difference=True),),
        measure="resident",
    ),
    Line(
        "scratch",
        "memory beyond gradient and state",
        _SCALE,
        (
            _ours("rows-zipf", "element", name="rows"),
            _ours("bag-zipf", "element", name="bags"),
            _ours("linear", "element", name="linear model"),
        ),
        tuple(Figure(f"bytes an id, {name}", name, at_most=16) for name in ("rows", "bags", "linear model")),
        measure="scratch",
    ),
    _first_step(),
    *TABLE_LINES,
    *RECOMMENDER_LINES,
]

LINES: dict[str, Line] = {line.key: line for line in _ALL}
