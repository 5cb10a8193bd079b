# SPDX-License-Identifier: Apache-2.0
"""Check and time tables on a GPU, everything in one command, within ten minutes.

    python -m benchmarks.gpu [--out FILE] [--quick] [--only SECTION ...]

Writes one JSON file, anew after each section, so that a run that is killed leaves what it had. ``--quick``
takes tiny tables: that is what numba's simulator (``NUMBA_ENABLE_CUDASIM=1``) can run, and its times mean
nothing. Exit status: 0; 1 if a section failed or a check is wrong; 2 where there is no GPU. Targets that are
missed do not count: the table that is printed at the end shows them.

Times "on the GPU" are between events of the stream, taken while a queue is waiting in front of them, so that
the host is no part of them. "Wall" times are of many steps in flight, the host and the wait for the last one
included. All are medians, in milliseconds of one step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

try:
    from numba import cuda, int64
except ImportError:  # asv imports all files of this folder, numba-cuda or not
    cuda = None

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.bench.cases import SEED, zipf_ids
from nb_sparse_adam._src.bench.contenders import HYPER
from nb_sparse_adam._src.info import gpus
from nb_sparse_adam.errors import GradientError

Figures = dict[str, Any]
Work = Callable[[], object]

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
STEP_COUNTS = ("row", "global", "element")
FORMS = "sorted_rows", "unsorted_rows", "hot_row", "bags", "means", "weighted_bags", "open_bags", "entries"

SHARE_OF_COPY, ROWS_RATIO, BAGS_RATIO = 0.85, 5.0, 8.0  # what is promised
NO_CUDA = "torch has no CUDA"


class Sizes(NamedTuple):
    """How much is done."""

    rows: int  # of the table that is timed
    dim: int
    ids: int
    bags: int
    lookups: int
    check_rows: int  # of tables that are checked
    check_ids: int
    check_dims: tuple[tuple[Any, int], ...]
    large_rows: int
    large_ids: int
    check_steps: int
    repeats: int
    in_flight: int


SINGLE, DOUBLE = np.float32, np.float64
FULL = Sizes(
    10_000_000, 64, 1_000_000, 1 << 16, 20,
    2000, 5000, ((SINGLE, 5), (SINGLE, 64), (DOUBLE, 5), (DOUBLE, 64)), 200_000, 1_000_000, 3, 20, 10,
)  # fmt: skip
QUICK = Sizes(60, 8, 12, 5, 4, 40, 30, ((SINGLE, 5), (DOUBLE, 8)), 50, 60, 1, 1, 1)


# --- a GPU's memory and time --------------------------------------------------------------------------------


def to_gpu(gradient: Any) -> Any:
    """Copy a gradient's arrays to the GPU."""
    fields = {field.name: getattr(gradient, field.name) for field in dataclasses.fields(gradient)}
    return type(gradient)(
        **{
            name: cuda.to_device(value) if isinstance(value, np.ndarray) else value
            for name, value in fields.items()
        }
    )


def table_on_gpu(rows: int, dim: int) -> Any:
    """Make a float32 table that need not be copied there."""
    from nb_sparse_adam._src.cuda import copies
    from nb_sparse_adam._src.cuda.device import DEFAULT, Stream, blocks_for, empty, launch
    from nb_sparse_adam._src.cuda.records import THREADS

    flat = empty(rows * dim, SINGLE)
    launch(copies.fill, blocks_for(rows * dim, THREADS), THREADS, Stream(DEFAULT), flat, SINGLE(0.1))
    return flat.reshape(rows, dim)


def free_memory() -> None:
    """Give back what nobody uses any more: numba and torch keep it otherwise, each from the other."""
    gc.collect()
    if SIMULATED:
        return
    cuda.synchronize()
    cuda.current_context().deallocations.clear()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Clock:
    """Takes times.

    Parameters
    ----------
    sizes : Sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        from nb_sparse_adam._src.cuda.device import DEFAULT, Stream, empty

        self._repeats, self._in_flight = sizes.repeats, sizes.in_flight
        self._stream = Stream(DEFAULT).numba  # the one that steps run on, and torch
        self._from, self._to = (empty(1 << (4 if SIMULATED else 26), SINGLE) for _ in range(2))

    def on_gpu(self, work: Work) -> float:
        """Milliseconds that the GPU takes for what some work launches, without waiting for the host.

        Copies in front of it keep the GPU busy until all has been launched. Where they were too short, there
        are more of them the next time.
        """
        if SIMULATED:
            return self.wall({"": work})[""]
        work()
        cuda.synchronize()
        times: list[float] = []
        copies = 16
        while len(times) < self._repeats:
            busy, start, end = (cuda.event(timing=True) for _ in range(3))
            began = time.perf_counter()
            busy.record(self._stream)
            for _ in range(copies):
                self._to.copy_to_device(self._from, stream=self._stream)
            start.record(self._stream)
            work()
            end.record(self._stream)
            launching = (time.perf_counter() - began) * 1e3
            end.synchronize()
            if launching > 0.9 * busy.elapsed_time(start) and copies < 512:
                copies *= 2
                continue
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def wall(self, contenders: Mapping[str, Work]) -> dict[str, float]:
        """Milliseconds of a step of each, the host included; they take turns, with many steps in flight."""
        for work in contenders.values():
            for _ in range(0 if SIMULATED else 2):
                work()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(-(-self._repeats // 2)):
            for name, work in contenders.items():
                cuda.synchronize()
                start = time.perf_counter()
                for _ in range(self._in_flight):
                    work()
                cuda.synchronize()
                times[name].append((time.perf_counter() - start) * 1e3 / self._in_flight)
        return {name: statistics.median(found) for name, found in times.items()}

    def on_host(self, work: Work) -> float:
        """Milliseconds until some work returns, with nothing of it left on the GPU from before."""
        if SIMULATED:
            return self.wall({"": work})[""]
        work()
        times = []
        for _ in range(self._repeats):
            cuda.synchronize()
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
        cuda.synchronize()
        return statistics.median(times)


# --- gradients ----------------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, *shape: int, dtype: Any = SINGLE) -> NDArray[Any]:
    """Draw numbers of a dtype."""
    return rng.standard_normal(shape, dtype=dtype)


def sorted_rows(rng: np.random.Generator, rows: int, dim: int, n: int, dtype: Any = SINGLE) -> RowGradient:
    """Unique rows in order."""
    ids = np.sort(rng.choice(rows, size=n, replace=False))
    return RowGradient(ids, normal(rng, n, dim, dtype=dtype))


def compressed_rows(
    rng: np.random.Generator, rows: int, dim: int, n: int, dtype: Any = SINGLE
) -> CSRGradient:
    """Entries at random places: columns in no order, some more than once."""
    indptr = np.append(0, np.cumsum(np.bincount(rng.integers(rows, size=n), minlength=rows)))
    return CSRGradient(indptr, rng.integers(dim, size=n), normal(rng, n, dtype=dtype))


def gradient_of(form: str, rng: np.random.Generator, rows: int, dim: int, n: int, dtype: Any) -> Any:
    """Draw a gradient of one of `FORMS`."""
    if form == "sorted_rows":
        return sorted_rows(rng, rows, dim, min(n, rows) // 2, dtype)
    if form == "entries":
        return compressed_rows(rng, rows, dim, n, dtype)
    ids = rng.integers(rows, size=n)
    if form == "unsorted_rows":
        return RowGradient(ids.astype(np.int32), normal(rng, n, dim, dtype=dtype))
    if form == "hot_row":  # more ids than are summed in one block
        hot = np.full(max(n // 2, 600), rows // 3)
        ids = rng.permutation(np.append(ids, hot))
        return RowGradient(ids, normal(rng, len(ids), dim, dtype=dtype))
    bags = max(n // 8, 2)
    offsets = np.sort(rng.integers(n + 1, size=bags + 1))  # some bags are empty
    offsets[0], offsets[-1] = 0, n
    weights = normal(rng, n, dtype=dtype) if form == "weighted_bags" else None
    if form == "open_bags":
        offsets = offsets[:-1].copy()
    mode = "mean" if form == "means" else "sum"
    return BagGradient(ids, offsets, normal(rng, bags, dim, dtype=dtype), weights=weights, mode=mode)


# --- machine ------------------------------------------------------------------------------------------------


def machine(sizes: Sizes, found: Figures) -> None:
    """What everything runs on."""
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found["platform"], found["python"] = platform.platform(), platform.python_version()
    for package in ("nb-sparse-adam", "numba", "numba-cuda", "numpy", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["sizes"] = {name: value for name, value in sizes._asdict().items() if name != "check_dims"}
    if SIMULATED:
        found["gpu"] = "simulator"
        return
    from numba.cuda.cudadrv import driver

    device = cuda.get_current_device()
    found["gpu"] = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    found["compute_capability"] = "{}.{}".format(*device.compute_capability)
    found["multiprocessors"] = int(device.MULTIPROCESSOR_COUNT)
    free, total = cuda.current_context().get_memory_info()
    found["memory_gb"], found["free_memory_gb"] = int(total) / 1e9, int(free) / 1e9
    found["driver"] = "{}.{}".format(*driver.driver.get_version())
    found["runtime"] = "{}.{}".format(*cuda.runtime.get_version())


# --- checks -------------------------------------------------------------------------------------------------


def bits_of(optimizer: SparseAdam) -> dict[str, NDArray[Any]]:
    """Parameters and state of an optimizer's only table, on the host."""
    table = optimizer.tables["table"]
    arrays = dict(optimizer.state_dict()["tables"]["table"])  # waits for the GPU
    arrays["param"] = table.copy() if isinstance(table, np.ndarray) else table.copy_to_host()
    return {name: np.asarray(array) for name, array in arrays.items()}


def differences(got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> list[Figures]:
    """Say where bits differ; counts may be of different integer types."""
    found = []
    for name, wanted in expected.items():
        have = got[name]
        if wanted.dtype.kind != "f":
            same = np.equal(have, wanted)
        else:
            bits = f"i{wanted.dtype.itemsize}"
            same = np.ascontiguousarray(have).view(bits) == np.ascontiguousarray(wanted).view(bits)
        if np.all(same):
            continue
        apart = np.abs(have.astype(float) - wanted.astype(float))
        relative = apart / np.maximum(np.abs(wanted.astype(float)), np.finfo(float).tiny)
        found.append(
            {
                "array": name,
                "unequal": int(np.sum(~same)),
                "of": int(np.size(same)),
                "first": [int(at) for at in np.argwhere(np.atleast_1d(~same))[0]],
                "largest_difference": float(np.max(apart)),
                "largest_relative_difference": float(np.max(relative)),
            }
        )
    return found


class Count:
    """Cases that were compared; those that differ are listed."""

    def __init__(self, found: Figures) -> None:
        self._found = found
        found.update(cases=0, equal=0, unequal=[])

    def note(self, case: str, wrong: object) -> None:
        """Note a case, and what is wrong with it."""
        self._found["cases"] += 1
        if wrong:
            self._found["unequal"].append({"case": case, "what": wrong})
        else:
            self._found["equal"] += 1


ON_CPU: Figures = {"num_threads": 1}  # it has the same bits with any number: kernels for one compile sooner


def stepped(table: Any, gradient: Any, steps: int, stream: Any = None, **options: Any) -> SparseAdam:
    """Make an optimizer that has taken steps."""
    optimizer = SparseAdam(table, lr=0.01, **options)
    for _ in range(steps):
        optimizer.step(gradient, stream=stream)
    return optimizer


def checks(sizes: Sizes, found: Figures) -> None:
    """Hold a GPU's bits against a CPU's, for every form, option and dtype; and what is refused."""
    count, rng = Count(found), np.random.default_rng(SEED)
    for (dtype, dim), mode, form in itertools.product(sizes.check_dims, STEP_COUNTS, FORMS):
        if SIMULATED and form == "hot_row" and (dtype, mode) != (SINGLE, "row"):
            continue  # takes the simulator a second
        table = normal(rng, sizes.check_rows, dim, dtype=dtype)
        gradient = gradient_of(form, rng, sizes.check_rows, dim, sizes.check_ids, dtype)
        on_gpu = stepped(cuda.to_device(table), to_gpu(gradient), sizes.check_steps, step_counts=mode)
        on_cpu = stepped(table, gradient, sizes.check_steps, step_counts=mode, **ON_CPU)
        case = f"{form}, {mode}, {np.dtype(dtype)}, dim {dim}"
        count.note(case, differences(bits_of(on_gpu), bits_of(on_cpu)))
    for case, wrong in refusals(sizes):
        count.note(case, wrong)


def refusals(sizes: Sizes) -> Iterator[tuple[str, object]]:
    """Check that what is wrong is refused, now or later, and changes nothing; and rows that are skipped."""
    rng, rows, dim = np.random.default_rng(SEED + 1), sizes.check_rows, 8
    table = normal(rng, rows, dim)
    good = sorted_rows(rng, rows, dim, 9)
    bad = {"nan": RowGradient(good.rows.copy(), good.values.copy())}
    bad["nan"].values[4, 3] = np.nan
    for name, wrong_id in (("id_too_large", rows), ("id_negative", -1), ("id_far_away", 2**40)):
        bad[name] = RowGradient(good.rows.copy(), good.values)
        bad[name].rows[5] = wrong_id
    offsets = np.array([0, 5, 3, 9])
    bad["offsets"] = BagGradient(good.rows, offsets, good.values[:3].copy())
    once = bits_of(stepped(table.copy(), good, 1, step_counts="row", **ON_CPU))
    twice = bits_of(stepped(table.copy(), good, 2, step_counts="row", **ON_CPU))
    for (name, gradient), mode in itertools.product(bad.items(), ("immediate", "deferred")):
        given = to_gpu(good)
        optimizer = stepped(cuda.to_device(table), given, 1, step_counts="row", device_checks=mode)
        optimizer.synchronize()
        wrong: list[object] = []
        late = mode == "deferred"
        try:
            optimizer.step(to_gpu(gradient))
        except GradientError as error:
            if late:
                wrong.append(f"was not deferred: {error}")
        else:
            if not late:
                wrong.append("was not refused")
        try:
            optimizer.synchronize()
        except GradientError as error:
            if not late:
                wrong.append(f"was reported twice: {error}")
        else:
            if late:
                wrong.append("was not reported later")
        wrong += differences(bits_of(optimizer), once)
        optimizer.step(given)
        wrong += differences(bits_of(optimizer), twice)
        yield f"{name} is refused, {mode}", wrong
    on_gpu = stepped(cuda.to_device(table), to_gpu(bad["nan"]), 1, on_nonfinite="skip")
    on_cpu = stepped(table, bad["nan"], 1, on_nonfinite="skip", **ON_CPU)
    yield "nan is skipped", differences(bits_of(on_gpu), bits_of(on_cpu))


def large_checks(sizes: Sizes, found: Figures) -> None:
    """Do the same with many ids; and every step again, also on another stream."""
    count, rng = Count(found), np.random.default_rng(SEED + 2)
    stream = cuda.stream()
    found["seconds_on_cpu"] = 0.0
    few = FORMS[1::3] if SIMULATED else FORMS
    cases = [(form, SINGLE, sizes.dim, "row") for form in few]
    if not SIMULATED:
        cases += [("unsorted_rows", SINGLE, sizes.dim, mode) for mode in ("global", "element")]
        cases += [(form, DOUBLE, 5, "element") for form in ("unsorted_rows", "bags", "entries")]
    for form, dtype, dim, mode in cases:
        table = normal(rng, sizes.large_rows, dim, dtype=dtype)
        gradient = gradient_of(form, rng, sizes.large_rows, dim, sizes.large_ids, dtype)
        given, got = to_gpu(gradient), []
        for where in (None, None, stream):
            start = cuda.to_device(table)
            got.append(bits_of(stepped(start, given, 2, where, step_counts=mode)))
        case = f"{form}, {mode}, {np.dtype(dtype)}, dim {dim}"
        began = time.perf_counter()
        expected = bits_of(stepped(table, gradient, 2, step_counts=mode, **ON_CPU))
        found["seconds_on_cpu"] += time.perf_counter() - began
        count.note(case, differences(got[0], expected))
        count.note(f"{case}: run to run", differences(got[1], got[0]))
        count.note(f"{case}: on another stream", differences(got[2], got[0]))


# --- bandwidth ----------------------------------------------------------------------------------------------


def copy_kernel() -> Any:
    """Compile a kernel that copies and does nothing else."""

    @cuda.jit
    def copy_elements(given, out):
        for i in range(cuda.grid(1), out.shape[0], cuda.gridsize(1)):
            out[i] = given[i]

    return copy_elements


def same_bytes_kernel() -> Any:
    """Compile a kernel that moves the bytes of a step of sorted rows, in pieces as large as a step's."""
    from nb_sparse_adam._src.cuda.device import load_piece, store_piece

    load, store = load_piece(4), store_piece(4)

    @cuda.jit
    def touch_rows(rows, values, param, moments, dim):
        g = cuda.local.array(4, np.float32)
        p = cuda.local.array(4, np.float32)
        m = cuda.local.array(4, np.float32)
        v = cuda.local.array(4, np.float32)
        group = int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y
        for s in range(group, rows.shape[0], int64(cuda.gridDim.x) * cuda.blockDim.y):
            row = int64(rows[s])
            for j in range(cuda.threadIdx.x * 4, dim, cuda.blockDim.x * 4):
                load(values, s * dim + j, g)
                load(param, row * dim + j, p)
                load(moments, 2 * row * dim + j, m)
                load(moments, 2 * row * dim + dim + j, v)
                for w in range(4):
                    p[w] = p[w] + g[w]
                    m[w] = m[w] + g[w]
                    v[w] = v[w] + g[w]
                store(param, row * dim + j, p)
                store(moments, 2 * row * dim + j, m)
                store(moments, 2 * row * dim + dim + j, v)

    return touch_rows


def gb_per_s(moved: int, ms: float) -> float:
    """Bytes over milliseconds."""
    return moved / ms / 1e6


def copy(sizes: Sizes, found: Figures) -> None:
    """How fast the GPU's memory is copied, reads and writes counted; the driver's copy, and a kernel's."""
    from nb_sparse_adam._src.cuda.device import DEFAULT, Stream, blocks_for, empty, launch
    from nb_sparse_adam._src.cuda.records import THREADS

    clock, stream, n = Clock(sizes), Stream(DEFAULT), sizes.rows * sizes.dim
    given, out = empty(n, SINGLE), empty(n, SINGLE)
    moved = found["bytes"] = 2 * n * 4
    ms = found["copy_ms"] = clock.on_gpu(lambda: out.copy_to_device(given, stream=stream.numba))
    found["copy_gb_per_s"] = gb_per_s(moved, ms)
    kernel, blocks = copy_kernel(), blocks_for(n, THREADS)
    ms = found["kernel_ms"] = clock.on_gpu(lambda: launch(kernel, blocks, THREADS, stream, given, out))
    found["kernel_gb_per_s"] = gb_per_s(moved, ms)


# --- sorted rows --------------------------------------------------------------------------------------------


class Turns:
    """Gradients in turn: no step finds the rows of the step before it in the cache."""

    def __init__(self, optimizer: SparseAdam, gradients: list[Any]) -> None:
        self._optimizer, self._turns = optimizer, itertools.cycle(gradients)

    def __call__(self) -> None:
        """Take a step."""
        self._optimizer.step(next(self._turns))


class Stages:
    """The stages of steps that have been prepared, launched one by one and as often as one likes.

    What is prepared for several gradients works in the same memory, so that only gradients that need none,
    sorted rows, can take turns in `update`.
    """

    def __init__(self, optimizer: SparseAdam, gradients: list[Any]) -> None:
        from nb_sparse_adam._src.cuda.ring import Ring
        from nb_sparse_adam._src.optimizer import tables_of
        from nb_sparse_adam._src.stepping import prepare

        self._batches = []
        for gradient in gradients:
            tables_of(optimizer)[
                "table"
            ].backend.guard.ring = Ring()  # or records would be given to the next gradient
            self._batches.append(prepare(optimizer._requests(gradient))[0].batches[0])
        self._turns = itertools.cycle(self._batches)

    def check(self) -> None:
        """Look at what the first gradient holds."""
        self._batches[0].check()

    def settle(self) -> None:
        """Refuse it if something is wrong."""
        self._batches[0].settle()

    def group(self) -> None:
        """Sort its ids and cut them into segments; where they are in order, kernels return at once."""
        self._batches[0].group()

    def update(self) -> None:
        """Write to the table, after the few words that say that it has been done are copied back to 0."""
        batch = next(self._turns)
        batch.begin_again()
        batch.update()


class SameBytes:
    """The limit: what moves the bytes of such a step, but for counts, and computes next to nothing."""

    def __init__(self, optimizer: SparseAdam, gradients: list[Any]) -> None:
        from nb_sparse_adam._src.cuda.device import DEFAULT, Stream, blocks_for
        from nb_sparse_adam._src.cuda.records import THREADS
        from nb_sparse_adam._src.optimizer import tables_of

        table = tables_of(optimizer)["table"]
        n, dim = gradients[0].values.shape
        lanes = min(THREADS, 16)
        self._shape, self._stream = (lanes, THREADS // lanes), Stream(DEFAULT)
        self._blocks = blocks_for(n, self._shape[1])
        self._kernel, self._memory = same_bytes_kernel(), (table.matrix, table.arrays.words)
        self._dim = np.int64(dim)
        self._turns = itertools.cycle([(one.rows, one.values.reshape(n * dim)) for one in gradients])

    def __call__(self) -> None:
        """Move them."""
        from nb_sparse_adam._src.cuda.device import launch

        arguments = *next(self._turns), *self._memory, self._dim
        launch(self._kernel, self._blocks, self._shape, self._stream, *arguments)


def bytes_of_update(sizes: Sizes, step_counts: str) -> int:
    """Gradient and ids are read; parameters, moments and counts are read and written."""
    elements = sizes.ids * sizes.dim
    counts = {"row": sizes.ids, "global": 0, "element": elements}[step_counts]
    return 7 * 4 * elements + 8 * sizes.ids + 2 * 4 * counts


def target(found: Figures, key: str, value: float, least: float | None) -> None:
    """Note a figure, with what it should be at least."""
    found[key] = value
    if least is not None:
        found[f"{key}_target"], found[f"{key}_reached"] = least, value >= least


def rows(sizes: Sizes, found: Figures, copied_gb_per_s: float | None) -> None:
    """A step of sorted unique rows, and its parts."""
    rng, clock = np.random.default_rng(SEED), Clock(sizes)
    gradients = [to_gpu(sorted_rows(rng, sizes.rows, sizes.dim, sizes.ids)) for _ in range(4)]
    for mode in STEP_COUNTS:
        free_memory()
        here = found[mode] = {}
        optimizer = SparseAdam(
            table_on_gpu(sizes.rows, sizes.dim),
            step_counts=mode, on_nonfinite="propagate", device_checks="off", **HYPER,
        )  # fmt: skip
        step, stages = Turns(optimizer, gradients), Stages(optimizer, gradients)
        ms = here["update_ms"] = clock.on_gpu(stages.update)
        moved = here["update_bytes"] = bytes_of_update(sizes, mode)
        here["update_gb_per_s"] = gb_per_s(moved, ms)
        if copied_gb_per_s is not None:
            target(here, "share_of_copy", here["update_gb_per_s"] / copied_gb_per_s, SHARE_OF_COPY)
        here["check_ms"] = clock.on_gpu(stages.check)
        here["group_ms"] = clock.on_gpu(stages.group)
        here["step_on_gpu_ms"] = clock.on_gpu(step)
        here["step_wall_ms"] = clock.wall({"": step})[""]
        here["step_on_host_ms"] = clock.on_host(step)
        optimizer.synchronize()
        if mode == "row":
            touch = SameBytes(optimizer, gradients)
            ms = here["same_bytes_ms"] = clock.on_gpu(touch)
            here["same_bytes_gb_per_s"] = gb_per_s(bytes_of_update(sizes, "global"), ms)
            del touch
        del optimizer, step, stages  # before the next one needs the memory


# --- torch --------------------------------------------------------------------------------------------------


def torch_on_gpu() -> Any:
    """Return torch, or say why it cannot be compared with."""
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return NO_CUDA if SIMULATED or not torch.cuda.is_available() else torch


LIKE_TORCH: Figures = {"step_counts": "global", "eps_hat": True, "on_nonfinite": "propagate", **HYPER}


def tried(found: Figures, key: str, make: Callable[[], Work]) -> Work | None:
    """Make a contender and have it step; if that fails, note why, and do without it."""
    try:
        work = make()
        work()
    except Exception as error:  # noqa: BLE001 (it is not what is measured here)
        found[f"{key}_failed"] = describe(error)
        return None
    return work


def compare(clock: Clock, found: Figures, contenders: Mapping[str, Work | None], least: float | None) -> None:
    """Time contenders in turns, and note by how much each is faster than "torch"."""
    there = {name: work for name, work in contenders.items() if work is not None}
    medians = clock.wall(there)
    for name, ms in medians.items():
        found[f"{name}_wall_ms"] = ms
        if "torch" in there and not name.startswith("torch"):
            target(found, f"torch_over_{name}", medians["torch"] / ms, least)


def torch_rows(sizes: Sizes, found: Figures) -> None:
    """Sorted unique rows through ``torch.optim.SparseAdam``, side by side."""
    torch = torch_on_gpu()
    if isinstance(torch, str):
        found["left_out"] = torch
        return
    from nb_sparse_adam.torch import SparseAdam as DropIn

    rng, clock, shape = np.random.default_rng(SEED), Clock(sizes), (sizes.rows, sizes.dim)
    drawn = [sorted_rows(rng, *shape, sizes.ids) for _ in range(2)]
    tensors = [tuple(torch.from_numpy(array).cuda() for array in (one.rows, one.values)) for one in drawn]

    def torch_steps(make: Callable[[Any], Any]) -> dict[bool, Work]:
        parameter = torch.nn.Parameter(torch.full(shape, 0.1, device="cuda"))
        optimizer, turns = make([parameter]), itertools.cycle(tensors)

        def step(coalesced: bool) -> None:
            ids, values = next(turns)
            parameter.grad = torch.sparse_coo_tensor(
                ids[None], values, shape, is_coalesced=coalesced, check_invariants=False
            )
            optimizer.step()

        return {coalesced: functools.partial(step, coalesced) for coalesced in (True, False)}

    def ours(device_checks: str) -> Work:
        table = torch.full(shape, 0.1, device="cuda")
        optimizer = SparseAdam(table, device_checks=device_checks, **LIKE_TORCH)
        return Turns(optimizer, [RowGradient(*pair) for pair in tensors])

    def drop_in(params: Any) -> Any:
        return DropIn(params, device_checks="deferred", **HYPER)

    steps = torch_steps(lambda params: torch.optim.SparseAdam(params, **HYPER))
    contenders = {
        "torch": steps[True],
        "torch_uncoalesced": steps[False],  # as a backward pass leaves it: torch sorts it first
        "ours": ours("off"),
        "ours_deferred": ours("deferred"),
        "drop_in": tried(found, "drop_in", lambda: torch_steps(drop_in)[True]),
    }
    compare(clock, found, contenders, ROWS_RATIO)


def bag_gradient(rng: np.random.Generator, sizes: Sizes, zipf: bool) -> BagGradient:
    """Bags of as many ids each; the ids of `nb_sparse_adam._src.bench.cases`."""
    n = sizes.bags * sizes.lookups
    ids = zipf_ids(rng, n, sizes.rows) if zipf else rng.integers(sizes.rows, size=n)
    offsets = np.arange(sizes.bags + 1, dtype=np.int64) * sizes.lookups
    return BagGradient(ids, offsets, normal(rng, sizes.bags, sizes.dim))


def bags(sizes: Sizes, found: Figures) -> None:
    """Pooled lookups: our step, beside the backward pass of torch's bag and torch's step."""
    rng, clock = np.random.default_rng(SEED), Clock(sizes)
    torch = torch_on_gpu()
    if isinstance(torch, str):
        found["left_out"] = torch
    for name in ("zipf", "uniform"):
        here = found[name] = {}
        drawn = [bag_gradient(rng, sizes, name == "zipf") for _ in range(2)]
        here["ids"], here["distinct_rows"] = len(drawn[0].indices), len(np.unique(drawn[0].indices))
        compare_bags(torch, drawn, sizes, clock, here, BAGS_RATIO if name == "zipf" else None)
        free_memory()


def compare_bags(
    torch: Any, drawn: list[BagGradient], sizes: Sizes, clock: Clock, here: Figures, least: float | None
) -> None:
    """Time steps of some gradients. The forward pass of torch is no part of it."""
    gradients = [to_gpu(gradient) for gradient in drawn]

    def ours(device_checks: str) -> Turns:
        table = table_on_gpu(sizes.rows, sizes.dim)
        return Turns(SparseAdam(table, device_checks=device_checks, **LIKE_TORCH), gradients)

    def torch_step(make: Callable[[Any], Any]) -> Work:
        weight = torch.full((sizes.rows, sizes.dim), 0.1, device="cuda")
        layer = torch.nn.EmbeddingBag(
            sizes.rows, sizes.dim, mode="sum", sparse=True, include_last_offset=True, _weight=weight
        )
        optimizer, passes = make(layer.parameters()), []
        for one in drawn:
            ids, offsets, grad = (
                torch.from_numpy(array).cuda() for array in (one.indices, one.offsets, one.grad_output)
            )
            passes.append((layer(ids, offsets), grad))
        turns = itertools.cycle(passes)

        def step() -> None:
            layer.weight.grad = None
            output, grad = next(turns)
            output.backward(grad, retain_graph=True)
            optimizer.step()

        return step

    step = ours("off")
    here["step_on_gpu_ms"] = clock.on_gpu(step)
    stages = Stages(ours("off")._optimizer, gradients[:1])
    for stage in ("check", "group", "update"):
        here[f"{stage}_ms"] = clock.on_gpu(getattr(stages, stage))
    del stages
    free_memory()
    contenders: dict[str, Work | None] = {"ours": step, "ours_deferred": ours("deferred")}
    if isinstance(torch, str):
        compare(clock, here, contenders, least)
        return
    from nb_sparse_adam.torch import SparseAdam as DropIn

    contenders["torch"] = torch_step(lambda params: torch.optim.SparseAdam(params, **HYPER))
    contenders["drop_in"] = tried(
        here, "drop_in", lambda: torch_step(lambda params: DropIn(params, device_checks="deferred", **HYPER))
    )
    compare(clock, here, contenders, least)


# --- forms and checks ---------------------------------------------------------------------------------------

CHECKING = (
    ("raise", "immediate"),
    ("raise", "deferred"),
    ("propagate", "immediate"),
    ("propagate", "deferred"),
    ("propagate", "off"),
)


def forms(sizes: Sizes, found: Figures) -> None:
    """Every form of gradient with every way to check it; and a small step, which is the host's time alone."""
    rng, clock = np.random.default_rng(SEED), Clock(sizes)
    shape, n = (sizes.rows, sizes.dim), sizes.ids
    drawn = {
        "sorted_rows": sorted_rows(rng, *shape, n),
        "unsorted_rows": RowGradient(rng.integers(sizes.rows, size=n), normal(rng, n, sizes.dim)),
        "zipf_rows": RowGradient(zipf_ids(rng, n, sizes.rows), normal(rng, n, sizes.dim)),
        "bags": bag_gradient(rng, sizes, zipf=False),
        "entries": compressed_rows(rng, *shape, n),
        "small_32_rows": sorted_rows(rng, *shape, min(32, n)),
    }
    optimizer = SparseAdam(table_on_gpu(*shape), step_counts="row", **HYPER)
    for name, gradient in drawn.items():
        here, step = found.setdefault(name, {}), Turns(optimizer, [to_gpu(gradient)])
        for on_nonfinite, device_checks in CHECKING:
            optimizer.device_checks = "immediate"  # not both at once may be what is refused
            optimizer.on_nonfinite = on_nonfinite
            optimizer.device_checks = device_checks
            key = f"{on_nonfinite}_{device_checks}"
            here[f"{key}_wall_ms"] = clock.wall({"": step})[""]
            if device_checks != "immediate":
                here[f"{key}_on_gpu_ms"] = clock.on_gpu(step)
                here[f"{key}_on_host_ms"] = clock.on_host(step)
        if name != "sorted_rows":
            # Still "propagate" and "off".
            stages = Stages(optimizer, [to_gpu(gradient)])
            for stage in ("check", "group", "update"):
                here[f"{stage}_ms"] = clock.on_gpu(getattr(stages, stage))
        optimizer.synchronize()


# --- all of it ----------------------------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """Say what was raised, and where."""
    trace = "".join(traceback.format_tb(error.__traceback__)[-6:])
    return f"{type(error).__name__}: {error}\n{trace}"


def sections(sizes: Sizes, report: Mapping[str, Figures]) -> dict[str, Callable[[Figures], None]]:
    """All sections, in their order; each fills in its figures."""
    return {
        "machine": lambda found: machine(sizes, found),
        "checks": lambda found: checks(sizes, found),
        "large_checks": lambda found: large_checks(sizes, found),
        "copy": lambda found: copy(sizes, found),
        "rows": lambda found: rows(sizes, found, report.get("copy", {}).get("copy_gb_per_s")),
        "torch_rows": lambda found: torch_rows(sizes, found),
        "bags": lambda found: bags(sizes, found),
        "forms": lambda found: forms(sizes, found),
    }


def run(section: Callable[[Figures], None], found: Figures) -> None:
    """Run a section; what it raises is noted, and the next one goes on."""
    start = time.perf_counter()
    try:
        section(found)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other sections can do without)
        found["error"] = describe(error)
    try:
        free_memory()
    except Exception as error:  # noqa: BLE001 (what a kernel has broken is raised by the next call)
        found.setdefault("error", describe(error))
    found["seconds"] = time.perf_counter() - start


def lines(figures: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield figures as lines of a table."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list) and value:
            yield f"{indent}{key}"
            yield from (f"{indent}  {item}" for item in value)
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
            yield f"{indent}{key:<{44 - len(indent)}} {shown}"


def targets(figures: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield a line for each figure that has a target."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from targets(value, f"{path}{key}.")
        elif f"{key}_target" in figures:
            reached = "reached" if figures[f"{key}_reached"] else "MISSED"
            yield f"{path + key:<44} {value:8.2f}, at least {figures[f'{key}_target']:.2f}: {reached}"


def fitting(sizes: Sizes) -> Sizes:
    """Take a smaller table where the memory is too small: the comparison with torch holds four."""
    if SIMULATED or sizes is QUICK or cuda.current_context().get_memory_info()[0] > 40e9:
        return sizes
    return sizes._replace(rows=sizes.rows // 5)


def main(argv: list[str] | None = None) -> int:
    """Run all sections, write and print what they found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), metavar="FILE", help="(default: gpu.json)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny tables: times mean nothing")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="leave out the other sections")
    args = parser.parse_args(argv)
    there = gpus()
    if there.startswith("none"):
        print(f"There is no GPU to measure, nothing was written ({there})", file=sys.stderr)
        return 2
    if SIMULATED and not args.quick:
        print("There is no GPU to measure: the simulator can only run --quick", file=sys.stderr)
        return 2
    if SIMULATED:
        sys.setswitchinterval(1e-4)  # a barrier takes some switches of each of a block's threads

    report: dict[str, Figures] = {}
    known = sections(QUICK if args.quick else fitting(FULL), report)
    unknown = set(args.only or ()) - known.keys()
    if unknown:
        parser.error(f"no section {sorted(unknown)[0]!r}, expected some of {', '.join(known)}")
    for name, section in known.items():
        if args.only and name not in args.only:
            continue
        run(section, report.setdefault(name, {}))
        args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
        state = "FAILED" if "error" in report[name] else "done"
        print(f"{name}: {state} in {report[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print("\n".join([*lines(report), "", *targets(report)]))
    wrong = [name for name, found in report.items() if "error" in found or found.get("unequal")]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}; see {args.out}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
