# SPDX-License-Identifier: Apache-2.0
"""Records of a step made by hand, of NumPy arrays: what Python and preparing write in a real one."""

import numpy as np

from nb_sparse_adam._src.engine import records
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.corrections import corrections
from nb_sparse_adam._src.engine.layout import allocate
from nb_sparse_adam._src.engine.rows import SCRATCH_ROWS
from nb_sparse_adam._src.engine.scratch import BLOCK


def address(array):
    assert array.flags.c_contiguous or array.ndim == 2
    return array.__array_interface__["data"][0]


def zeros(length, dtype):
    return np.zeros(length, dtype)


class Table:
    """A table with its state, and its record."""

    def __init__(
        self, param, count_rule, *, codec=PLAIN, state=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
        eps_hat=False, sign=1.0,
    ):  # fmt: skip
        self.param, self.codec = param, codec
        rows, dim = param.shape
        self.state = allocate(rows, dim, param.dtype, codec, count_rule, zeros) if state is None else state
        self.totals = np.zeros(2, np.int64)
        self.corrections = corrections(*betas, eps_hat, param.dtype)
        self.options = {"lr": lr, "eps": eps, "sign": sign}
        self.betas = betas

    def record(self):
        real, state = self.param.dtype.type, self.state
        record = np.zeros(1, records.TABLE)
        stride = self.param.strides[0] // self.param.itemsize
        fields = {
            "param": address(self.param),
            "param_length": (len(self.param) - 1) * stride + self.param.shape[1],
            "param_stride": stride,
            "rows": len(self.param),
            "dim": self.param.shape[1],
            "state": address(state.words),
            "state_length": len(state.words),
            "state_stride": state.state_stride,
            "exp_avg_sq_offset": state.exp_avg_sq_offset,
            "counts": address(state.counts),
            "counts_length": len(state.counts),
            "count_stride": state.count_stride,
            "count_rule": state.count_rule,
            "corrections": address(self.corrections.pairs),
            "corrections_length": len(self.corrections.pairs),
            "complete": self.corrections.complete,
            "eps_hat": self.corrections.eps_hat,
            "totals": address(self.totals),
            "beta1": real(self.betas[0]),
            "one_minus_beta1": real(1 - self.betas[0]),
            "beta2": real(self.betas[1]),
            "one_minus_beta2": real(1 - self.betas[1]),
            "log_beta1": self.corrections.log_betas[0],
            "log_beta2": self.corrections.log_betas[1],
            **{name: real(value) for name, value in self.options.items()},
        }
        for name, value in fields.items():
            record[name] = value
        return record


class Gradient:
    """A prepared gradient: its two records, and how many units tasks are cut from.

    Parameters
    ----------
    values : (rows of values, dim) array of the table's dtype
        Of entries (n, 1). Rows may lie apart.
    **fields
        Of the two records; arrays are put down by their addresses.
    """

    def __init__(self, values, *, kind, units, on_nonfinite=records.PROPAGATE, suspicious=0, **fields):
        self.units, self.kept = units, [values, fields]
        if kind == records.ENTRIES:
            self.units = fields["present"]
        self.gradient, self.found = np.zeros(1, records.GRADIENT), np.zeros(1, records.FOUND)
        stride = values.strides[0] // values.itemsize if len(values) > 1 else values.shape[1]
        given = {
            "values": values, "values_rows": len(values), "values_stride": stride,
            "values_dim": values.shape[1], "values_bytes": values.itemsize, "kind": kind, "units": units,
            "on_nonfinite": on_nonfinite, "suspicious": suspicious, **fields,
        }  # fmt: skip
        for name, value in given.items():
            record = self.gradient if name in records.GRADIENT.names else self.found
            record[name] = address(value) if isinstance(value, np.ndarray) else value


def distinct(ids, values, **fields):
    """Ids that increase."""
    return Gradient(
        values, kind=records.DISTINCT, units=len(ids), ids=ids, ids_length=len(ids), ids_bytes=ids.itemsize,
        **fields,
    )  # fmt: skip


def segments(ids, values, *, bag_of=None, weights=None, reciprocals=None, wide=False, **fields):
    """Ids in any order: id i belongs to row bag_of[i] of values, or i."""
    n = len(ids)
    list_type = np.int64 if wide else np.int32
    payload = np.arange(n) if bag_of is None or weights is not None else np.asarray(bag_of)
    shift = max(int(payload.max(initial=0)).bit_length(), 1)
    packed = np.sort((np.asarray(ids, np.int64) << shift) | payload, kind="stable")
    starts = np.append(np.flatnonzero(np.diff(packed >> shift, prepend=-1)), n)
    lengths = np.diff(starts)
    long = np.flatnonzero(lengths > BLOCK)
    long_first = np.append(0, np.cumsum(-(-lengths[long] // BLOCK)))
    dim = values.shape[1]
    given = {
        "ids_length": n, "ids_bytes": 8, "packed": packed, "row_shift": shift, "wide": int(wide),
        "starts": starts.astype(list_type), "longest": lengths.max(initial=0), "long": long,
        "long_length": len(long), "long_first": long_first, "blocks": long_first[-1],
        "block_sums": np.empty((long_first[-1], dim), values.dtype),
    }  # fmt: skip
    if weights is not None:
        given |= {"weights": weights, "bag_of": np.asarray(bag_of).astype(list_type)}
    if reciprocals is not None:
        given |= {"reciprocals": reciprocals, "mean": 1}
    kind = fields.pop("kind", records.SEGMENTS)
    return Gradient(values, kind=kind, units=len(starts) - 1, **given, **fields)


def entries(rows, columns, values, dim, **fields):
    """Entries in any order, of which some may be of one place."""
    keys = np.asarray(rows) * dim + np.asarray(columns)
    unique_rows, counts = np.unique(np.unique(keys) // dim, return_counts=True)
    row_starts = np.append(0, np.cumsum(counts)).astype(np.int64 if fields.get("wide") else np.int32)
    return segments(
        keys, values.reshape(-1, 1), kind=records.ENTRIES, present=len(unique_rows), row_starts=row_starts,
        **fields,
    )  # fmt: skip


def compressed(indptr, columns, values, **fields):
    """Compressed rows with increasing columns."""
    indptr = np.ascontiguousarray(indptr, np.int64)
    rows = np.flatnonzero(np.diff(indptr)).astype(np.int32)
    starts = np.append(indptr[rows], indptr[-1]).astype(np.int32)
    return Gradient(
        values.reshape(-1, 1), kind=records.COMPRESSED, units=len(rows), ids=columns, ids_length=len(columns),
        ids_bytes=columns.itemsize, present_rows=np.append(rows, 0).astype(np.int32), starts=starts,
        present_length=len(starts), offsets=indptr, offsets_length=len(indptr), offsets_bytes=8, **fields,
    )  # fmt: skip


def tasks_of(gradients, tasks):
    """Cut each gradient into so many tasks."""
    made = np.zeros(len(gradients) * tasks, records.TASK)
    for i, gradient in enumerate(gradients):
        for part in range(tasks):
            bounds = [gradient.units * end // tasks for end in (part, part + 1)]
            made[i * tasks + part] = (i, part, tasks, *bounds, 0)
    return made


class Step:
    """The record of a step, and the arrays that it has addresses of."""

    def __init__(self, **arrays):
        self.arrays, self.record = arrays, np.zeros(1, records.STEP)
        for name, array in arrays.items():
            self.record[name] = address(array)
            if f"{name}_length" in records.STEP.names:
                self.record[f"{name}_length"] = len(array)
        self.record["length"] = self.record["last"] = len(arrays["tables"])


def step_of(tables, gradients, *, threads=1, tasks=1):
    """What `apply_for` and others give a driver."""
    stride = SCRATCH_ROWS * max(table.param.shape[1] for table in tables)
    step = Step(
        tables=np.concatenate([table.record() for table in tables]),
        gradients=np.concatenate([gradient.gradient for gradient in gradients]),
        found=np.concatenate([gradient.found for gradient in gradients]),
        tasks=tasks_of(gradients, tasks),
        scratch=np.zeros(threads * stride, tables[0].param.dtype),
        status=np.zeros(1, np.int64),
    )
    step.record["scratch_stride"] = stride
    return step


def run(appliers, tables, gradients, *, threads=None, tasks=1):
    """Apply gradients, all of rows or all of entries: on this thread, or on so many; return the tasks."""
    step = step_of(tables, gradients, threads=threads or 1, tasks=tasks)
    drivers = appliers[gradients[0].found["kind"][0] in (records.COMPRESSED, records.ENTRIES)]
    if threads is None:
        drivers.serial(1, step.record)
    else:
        drivers.parallel(threads, step.record)
    assert step.arrays["status"][0] == 1
    return step.arrays["tasks"]
