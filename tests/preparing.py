# SPDX-License-Identifier: Apache-2.0
"""Gradients as records made by hand, prepared, and what was found; and the same, slow and obvious."""

from dataclasses import dataclass

import numpy as np
from records import Step

from nb_sparse_adam._src.engine import records
from nb_sparse_adam._src.engine.prepare import PART, PREPARE, PREPARE_WIDE
from nb_sparse_adam._src.engine.records import (
    BAGS,
    COMPRESSED,
    COO,
    CSC,
    CSR,
    DISTINCT,
    ENTRIES,
    RAISE,
    ROWS,
    SEGMENTS,
)
from nb_sparse_adam._src.engine.scratch import BLOCK, DIGIT_BITS, bytes_needed


@dataclass
class Given:
    """A gradient, and the table that it is for. Parameters as the fields of the records."""

    form: int
    rows: int
    dim: int
    ids: np.ndarray
    values: np.ndarray  # (any, dim), or (n, 1) of entries
    columns: np.ndarray | None = None
    offsets: np.ndarray | None = None
    weights: np.ndarray | None = None
    mean: bool = False
    on_nonfinite: int = RAISE
    parts: int = 1
    tasks: int = 1

    @property
    def entries(self):
        return self.form in (CSR, CSC, COO)


def address_of(array):
    return 0 if array is None else array.ctypes.data


class Prepared:
    """The records of a step, prepared."""

    def __init__(self, step, threads=1, parallel=None, run=True, wide=False):
        self.step = step
        count, self.scratch = len(step), []
        self.tables = np.zeros(count, records.TABLE)
        self.gradients = np.zeros(count, records.GRADIENT)
        self.found = np.zeros(count, records.FOUND)
        self.found["fault"] = 99
        first_part = first_task = 0
        for i, given in enumerate(step):
            table, g = self.tables[i], self.gradients[i]
            table["rows"], table["dim"] = given.rows, given.dim
            n = len(given.ids)
            size = bytes_needed(
                given.form, n, given.rows, given.dim, len(given.values), given.values.itemsize, given.parts,
                given.mean, given.weights is not None, wide,
            )  # fmt: skip
            self.fence = 64
            scratch = np.full(size + 2 * self.fence, 0xA5, np.uint8)
            g["form"], g["on_nonfinite"] = given.form, given.on_nonfinite
            g["ids"], g["ids_length"], g["ids_bytes"] = address_of(given.ids), n, given.ids.itemsize
            if given.columns is not None:
                g["columns"], g["columns_bytes"] = address_of(given.columns), given.columns.itemsize
            if given.offsets is not None:
                g["offsets"], g["offsets_length"] = address_of(given.offsets), len(given.offsets)
                g["offsets_bytes"] = given.offsets.itemsize
            g["values"], g["values_rows"] = address_of(given.values), len(given.values)
            g["values_stride"] = given.values.strides[0] // given.values.itemsize
            if len(given.values) < 2:
                g["values_stride"] = given.values.shape[1]
            g["values_dim"], g["values_bytes"] = given.values.shape[1], given.values.itemsize
            g["weights"], g["mean"] = address_of(given.weights), given.mean
            g["parts"], g["tasks"] = given.parts, given.tasks
            g["first_part"], g["first_task"] = first_part, first_task
            g["scratch"] = address_of(scratch) + self.fence
            self.scratch.append(scratch)
            first_part, first_task = first_part + given.parts, first_task + given.tasks
        self.parts = np.full(first_part * PART.itemsize // 8, -7).view(PART)
        self.tasks = np.full(first_task * records.TASK.itemsize // 8, -7).view(records.TASK)
        self.counters = np.full(threads << DIGIT_BITS, -7, np.int64 if wide else np.int32)
        names = ("tables", "gradients", "found", "parts", "tasks", "counters")
        self.job = Step(**{name: getattr(self, name) for name in names}).record
        self.threads = threads
        drivers = PREPARE_WIDE if wide else PREPARE
        parallel = threads > 1 if parallel is None else parallel
        self.driver = drivers.parallel if parallel else drivers.serial
        if run:
            self.run()

    def run(self):
        self.driver(self.threads, self.job)
        for scratch in self.scratch:  # nothing was written beside it
            assert (scratch[: self.fence] == 0xA5).all()
            assert (scratch[-self.fence :] == 0xA5).all()

    def array(self, i, place, length, dtype):
        scratch = self.scratch[i]
        at = int(place) - address_of(scratch)
        assert at >= self.fence
        return scratch[at : at + length * np.dtype(dtype).itemsize].view(dtype)

    def result(self, i=0):
        """What was found of gradient i, as a dictionary that `expected` gives as well."""
        given, f, g = self.step[i], self.found[i], self.gradients[i]
        got = {name: int(f[name]) for name in ("fault", "place", "got", "before")}
        if f["fault"]:
            return {**got, "value": float(f["value"])}
        got |= {"kind": int(f["kind"]), "units": int(f["units"]), "suspicious": int(f["suspicious"])}
        got["largest"] = float(f["largest"])
        tasks = self.tasks[g["first_task"] : g["first_task"] + g["tasks"]]
        assert (tasks["gradient"] == i).all()
        np.testing.assert_array_equal(tasks["part"], np.arange(given.tasks))
        assert (tasks["parts"] == given.tasks).all()
        assert (tasks["skipped"] == 0).all()
        n, units = len(given.ids), int(f["units"])
        lists = np.int64 if f["wide"] else np.int32
        runs = [(int(t["first"]), int(t["last"])) for t in tasks]
        if f["kind"] == COMPRESSED:
            # Each part's rows lie together; no run of a task crosses the gap between two of them.
            length = (int(f["starts"]) - int(f["present_rows"])) // np.dtype(lists).itemsize
            rows = self.array(i, f["present_rows"], length, lists)
            starts = self.array(i, f["starts"], length, lists)
            got["rows"] = [int(rows[s]) for lo, hi in runs for s in range(lo, hi)]
            got["bounds"] = [(int(starts[s]), int(starts[s + 1])) for lo, hi in runs for s in range(lo, hi)]
            assert sum(hi - lo for lo, hi in runs) == units
            return got
        places = [s for lo, hi in runs for s in range(lo, hi)]
        assert places == list(range(int(f["present"]) if f["kind"] == ENTRIES else units))
        if f["kind"] == DISTINCT:
            return got
        real, blocks = given.values.dtype, int(f["blocks"])
        if blocks:
            sums = self.array(i, f["block_sums"], blocks * given.dim, real)
            sums[:] = 1  # there is room for them, and nothing else
        packed, starts = self.array(i, f["packed"], n, np.int64), self.array(i, f["starts"], units + 1, lists)
        shift = int(f["row_shift"])
        got["ids"], got["payloads"] = (packed >> shift).tolist(), (packed & ((1 << shift) - 1)).tolist()
        got["starts"], got["longest"] = starts.tolist(), int(f["longest"])
        if f["kind"] == ENTRIES:
            got["row_starts"] = self.array(i, f["row_starts"], int(f["present"]) + 1, lists).tolist()
            return got
        got["blocks"], longs = blocks, int(f["long_length"])
        got["long"] = self.array(i, f["long"], longs, np.int64).tolist()
        got["long_first"] = self.array(i, f["long_first"], longs + 1, np.int64).tolist()
        if given.weights is not None:
            got["bag_of"] = self.array(i, f["bag_of"], n, lists).tolist()
        if given.mean:
            got["reciprocals"] = self.array(i, f["reciprocals"], len(given.values), real).tolist()
        return got


# --- slow and obvious -------------------------------------------------------------------------------------


def _first(wrong):
    return int(np.flatnonzero(wrong)[0])


def _fault(code, place=0, got=0, before=0, value=0.0):
    return {"fault": code, "place": place, "got": got, "before": before, "value": value}


def _id_fault(code, ids, limit):
    wrong = (ids < 0) | (ids >= limit)
    return _fault(code, _first(wrong), int(ids[_first(wrong)])) if wrong.any() else None


def _offset_fault(offsets, n, count):
    before = 0
    for place, got in enumerate(offsets.tolist()):
        closes = place == count  # the end of the last
        if got > n or got < before or (place == 0 and got != 0) or (closes and got != n):
            return _fault(records.OFFSET, place, got, before)
        before = got
    return None


def _fault_of(given):
    n = len(given.ids)
    faults = []
    if given.form in (ROWS, BAGS, COO):
        faults.append(_id_fault(records.ID, given.ids, given.rows))
    if given.form == COO:
        faults.append(_id_fault(records.COLUMN, given.columns, given.dim))
    if given.offsets is not None:
        count = {BAGS: len(given.values), CSR: given.rows, CSC: given.dim}[given.form]
        faults.append(_offset_fault(given.offsets, n, count))
    if given.form in (CSR, CSC):
        faults.append(_id_fault(records.COLUMN, given.ids, given.dim if given.form == CSR else given.rows))
    if given.on_nonfinite == RAISE:
        for code, values in ((records.NOT_FINITE, given.values), (records.WEIGHT_NOT_FINITE, given.weights)):
            if values is not None and not np.isfinite(values).all():
                flat = values.reshape(-1)
                place = _first(~np.isfinite(flat))
                faults.append(_fault(code, place, value=float(flat[place])))
    return next((fault for fault in faults if fault), None)


def expected(given):
    """What `Prepared.result` is to be."""
    fault = _fault_of(given)
    if fault:
        return fault
    n = len(given.ids)
    ids = given.ids.astype(np.int64)
    result = {"fault": 0, "place": 0, "got": 0, "before": 0}
    result["largest"] = _largest(given)
    if given.form == ROWS and (np.diff(ids) > 0).all():
        return {**result, "kind": DISTINCT, "units": n, "suspicious": _suspicious(given, 1)}
    bags = None
    if given.offsets is not None:
        ends = given.offsets.astype(np.int64)
        if given.form == BAGS and len(ends) == len(given.values):
            ends = np.append(ends, n)
        bags = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    keys, payloads = ids, np.arange(n)
    if given.form == BAGS and given.weights is None:
        payloads = bags
    if given.form == CSR:
        if all((np.diff(row) > 0).all() for row in np.split(ids, ends[1:-1])):
            rows = np.flatnonzero(np.diff(ends))
            bounds = [(int(ends[r]), int(ends[r + 1])) for r in rows]
            common = {"kind": COMPRESSED, "units": len(rows), "suspicious": _suspicious(given, 1)}
            return {**result, **common, "rows": rows.tolist(), "bounds": bounds}
        keys = bags * given.dim + ids
    elif given.form == CSC:
        keys = ids * given.dim + bags
    elif given.form == COO:
        keys = ids * given.dim + given.columns
    order = np.argsort(keys, kind="stable")
    keys, payloads = keys[order], payloads[order]
    starts = np.append(np.flatnonzero(np.diff(keys, prepend=-1)), n)
    lengths = np.diff(starts)
    longest = int(lengths.max(initial=0))
    result |= {"kind": ENTRIES if given.entries else SEGMENTS, "units": len(starts) - 1, "longest": longest}
    result |= {"ids": keys.tolist(), "payloads": payloads.tolist(), "starts": starts.tolist()}
    result["suspicious"] = _suspicious(given, max(longest, 1))
    if given.entries:
        rows = keys[starts[:-1]] // max(given.dim, 1)
        result["row_starts"] = [*np.flatnonzero(np.diff(rows, prepend=-1)).tolist(), len(rows)]
        return result
    long = np.flatnonzero(lengths > BLOCK)
    first = np.append(0, np.cumsum(-(-lengths[long] // BLOCK)))
    result |= {"long": long.tolist(), "long_first": first.tolist(), "blocks": int(first[-1])}
    if given.weights is not None:
        result["bag_of"] = bags.tolist()
    if given.mean:
        sizes = np.maximum(np.diff(ends), 1).astype(given.values.dtype)
        result["reciprocals"] = (1 / sizes).tolist()
    return result


def _largest(given):
    if given.on_nonfinite == records.PROPAGATE:
        return 0.0
    largest = float(np.abs(given.values).max(initial=0))
    if given.weights is not None:
        largest *= float(np.abs(given.weights).max(initial=0))
    return largest


def _suspicious(given, terms):
    if given.on_nonfinite == records.PROPAGATE:
        return 0
    limits = np.finfo(given.values.dtype)
    few = terms * float(limits.eps) < 0.1
    return int(not (few and _largest(given) * terms * 1.25 < float(np.sqrt(limits.max))))
