# SPDX-License-Identifier: Apache-2.0
"""Lines of the comparison, measured in another process: ``python -m nb_sparse_adam._src.bench.worker``.

Each line has a process of its own, so that memory is given back, that a library that crashes takes one line
with it, and that no two libraries of the comparison have to live with each other's threads but where they are
compared. Lines of times share one with ``--quick``: most of what they would take is imports and compiling.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.bench import recommender_runs, table_runs
from nb_sparse_adam._src.bench.cases import Arrays, Bag, Case, Rows
from nb_sparse_adam._src.bench.contenders import Contender, Ours, WithOptimizer, gradient
from nb_sparse_adam._src.bench.line import Entry, Line, Trained
from nb_sparse_adam._src.bench.lines import LINES
from nb_sparse_adam._src.bench.peers import import_peer
from nb_sparse_adam._src.bench.settings import Settings
from nb_sparse_adam._src.bench.timing import alternate

REPEATS = 21
QUICK_REPEATS, QUICK_REST = 3, 0.02
_M_MMAP_THRESHOLD = -3  # of <malloc.h>
SECONDS_OF_STEPS = 3.0  # of two processes, side by side


class CannotMeasureError(Exception):
    """A line cannot be measured here, for the reason that the message gives."""


def command(*arguments: str) -> list[str]:
    """Return the command of a worker."""
    return [sys.executable, "-m", "nb_sparse_adam._src.bench.worker", *arguments]


def measure(
    line: Line,
    settings: Settings,
    unusable: dict[str, str] | None = None,
    curves: dict[str, recommender_runs.Curve] | None = None,
) -> dict[str, float]:
    """Measure a line here; return its numbers by name, times in seconds.

    Parameters
    ----------
    line : Line
    settings : Settings
    unusable : dict, optional
        Is given the names of entries that cannot be measured here, each with the reason; the others are
        measured. Without it, such an entry is an error.
    curves : dict, optional
        Is given the curves of a line that trains recommenders, by name.

    Raises
    ------
    CannotMeasureError
        If it cannot be measured here, with the reason.
    """
    chosen = [entry for entry in line.entries if entry.peer is None or entry.peer in settings.peers]
    if unusable is not None:
        unusable.update(_unusable(chosen))
        chosen = [entry for entry in chosen if entry.name not in unusable]
        if not chosen:
            raise CannotMeasureError(" and ".join(dict.fromkeys(unusable.values())))
    line = line._replace(entries=tuple(chosen))
    if line.measure == "recommenders":
        return recommender_runs.measure(
            line,
            settings,
            {} if unusable is None else unusable,
            {} if curves is None else curves,
            recommender_runs.trained_by(functools.partial(command, "trained", line.key), line),
        )
    return _MEASURES[line.measure](line, settings)


def _unusable(entries: list[Entry | Trained]) -> dict[str, str]:
    """Import the libraries that entries need; return the entries whose library cannot be imported."""
    reasons = {}
    for entry in entries:
        if entry.peer is not None:
            try:
                import_peer(entry.peer)
            except NotImplementedError as error:
                reasons[entry.name] = str(error)
    return reasons


def _times(line: Line, settings: Settings) -> dict[str, float]:
    contenders: dict[str, Contender] = {}
    first: dict[tuple[str, str], WithOptimizer] = {}
    for entry in line.steppers:
        try:
            contender = entry.contender(settings.threads, settings.quick)
        except NotImplementedError as error:
            raise CannotMeasureError(str(error)) from error
        contenders[entry.name] = contender
        if isinstance(contender, WithOptimizer):
            alike = entry.case, contender.optimizer.step_counts
            if alike in first:
                contender.use_memory_of(first[alike])
            else:
                first[alike] = contender
    repeats, rest = (QUICK_REPEATS, QUICK_REST) if settings.quick else (REPEATS, math.inf)
    seconds = alternate(contenders, repeats, line.loop, rest)
    return {name: statistics.median(times) for name, times in seconds.items()}


# --- memory -----------------------------------------------------------------------------------------------


def _scratch(line: Line, settings: Settings) -> dict[str, float]:
    """Memory that NumPy is asked for in a first step, for each further id, when all kernels are compiled.

    The peak of a whole gradient less that of its first half, over the ids of the other half: what does not
    depend on the number of ids (counters of the radix sort, 32 kB a thread) is a number of its own.
    """
    numbers = {}
    for entry in line.steppers:
        case = entry.sized(settings.quick)
        whole = case.arrays()[0]
        half = _first_half(whole)
        _peak(entry, case, whole, settings)  # compiles
        peaks = [_peak(entry, case, arrays, settings) for arrays in (half, whole)]
        ids = [len(arrays[0]) for arrays in (half, whole)]
        numbers[entry.name] = (peaks[1] - peaks[0]) / (ids[1] - ids[0])
        numbers[f"{entry.name}, bytes besides"] = peaks[1] - numbers[entry.name] * ids[1]
    return numbers


def _first_half(arrays: Arrays) -> Arrays:
    if isinstance(arrays, Rows):
        return Rows(*(array[: len(array) // 2] for array in arrays))
    assert isinstance(arrays, Bag)
    bags = len(arrays.grad_output) // 2
    ids = arrays.offsets[bags]
    weights = None if arrays.weights is None else arrays.weights[:ids]
    return Bag(arrays.indices[:ids], arrays.offsets[: bags + 1], arrays.grad_output[:bags], weights)


def _peak(entry: Entry, case: Case, arrays: Arrays, settings: Settings) -> int:
    contender = entry.make(case, settings.threads)
    assert isinstance(contender, Ours)
    given = gradient(arrays)
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(1) as thread:  # a Python thread keeps what its steps have worked in
            thread.submit(contender.optimizer.step, given).result()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _resident(line: Line, settings: Settings) -> dict[str, float]:
    """What the process grows by within a step, all of it warm, over the size of a row for each id."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        # Blocks of this size go back to the system at once: what was freed before must not be used again.
        set_threshold = ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    except (AttributeError, OSError):
        set_threshold = 0
    if not set_threshold or not clear.exists():
        raise CannotMeasureError("needs Linux and its C library")

    def kilobytes(what: str) -> int:
        return int(re.findall(rf"^{what}:\s*(\d+) kB", status.read_text(), re.MULTILINE)[0])

    numbers = {}
    for entry in line.steppers:
        case = entry.sized(settings.quick)
        contender = entry.make(case, settings.threads)
        contender.warm()
        contender.ready()
        clear.write_text("5")  # the peak is what there is now
        before = kilobytes("VmRSS")
        contender.step()
        row_an_id = len(case.arrays()[0][0]) * case.dim * 4
        numbers[entry.name] = 1024 * (kilobytes("VmHWM") - before) / row_an_id
    return numbers


# --- two processes ----------------------------------------------------------------------------------------


def _processes(line: Line, _: Settings) -> dict[str, float]:
    """Mean time of a step alone, and beside a second process that does the same on the same two cores."""
    numbers = {}
    environment = _environment(line.layer)
    for entry in line.entries:
        steppers = [
            subprocess.Popen(
                command("stepper", line.key, entry.name),
                env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]  # fmt: skip
        try:
            for stepper in steppers:
                _listen(stepper)
            numbers[f"{entry.name}, alone"] = _ask(steppers[:1])
            numbers[f"{entry.name}, beside another"] = _ask(steppers)
        finally:
            for stepper in steppers:
                stepper.kill()
                stepper.communicate()
    return numbers


def _environment(layer: str) -> dict[str, str]:
    """Give the variables with which numba runs 2 threads on a layer."""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    if layer == "tbb" and sys.platform == "linux":
        # pip puts TBB's library where the system's loader does not look for it.
        folders = [str(Path(sys.prefix, "lib")), os.environ.get("LD_LIBRARY_PATH")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return environment


def _ask(steppers: list[subprocess.Popen[str]]) -> float:
    for stepper in steppers:
        assert stepper.stdin is not None
        stepper.stdin.write("go\n")
        stepper.stdin.flush()
    return statistics.fmean(float(_listen(stepper)) for stepper in steppers)


def _listen(stepper: subprocess.Popen[str]) -> str:
    assert stepper.stdout is not None
    said = stepper.stdout.readline()
    if not said:
        _, errors = stepper.communicate()
        raise CannotMeasureError(_reason(errors))
    return said


def _reason(errors: str) -> str:
    """Say in a line why a stepper ended, of what it wrote to stderr."""
    if "No threading layer could be loaded" in errors:
        return f"numba cannot load this threading layer{': pip install tbb' if 'TBB' in errors else ''}"
    return (errors.strip().splitlines() or ["the process ended"])[-1]


def _stepper(entry: Entry) -> None:
    """Step for some seconds whenever a line comes in; print the mean time of a step."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    contender = entry.contender(2, quick=False)
    assert isinstance(contender, Ours)
    contender.optimizer.num_threads = None  # as it is by default: 2 threads, or fewer
    contender.warm()
    print("ready", flush=True)
    for _ in sys.stdin:
        steps = 0
        start = time.perf_counter()
        while time.perf_counter() - start < SECONDS_OF_STEPS:
            contender.ready()
            contender.step()
            steps += 1
        print((time.perf_counter() - start) / steps, flush=True)


# --- the first step ---------------------------------------------------------------------------------------


def _first_step(line: Line, settings: Settings) -> dict[str, float]:
    """Time the first step of a process that finds no kernels on disk, and of one that finds them there."""
    numbers = {}
    for entry in line.entries:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            for number in line.numbers_of(entry):
                done = subprocess.run(
                    command("first step", line.key, entry.name, str(settings.threads)),
                    env=environment, text=True, capture_output=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise CannotMeasureError(_reason(done.stderr))
                numbers[number] = float(done.stdout)
    return numbers


def _step_once(entry: Entry, threads: int) -> None:
    """Print the seconds of one step, on a small table: what is not compiling is some milliseconds."""
    contender = entry.contender(threads, quick=True)
    contender.ready()
    start = time.perf_counter()
    contender.step()
    print(time.perf_counter() - start)


def _one_case(line: Line, settings: Settings) -> tuple[Case, int]:
    """Give the case that all entries of a line share, and the threads."""
    return line.steppers[0].sized(settings.quick), settings.threads


_MEASURES: dict[str, Callable[[Line, Settings], dict[str, float]]] = {
    "times": _times,
    "scratch": _scratch,
    "resident": _resident,
    "processes": _processes,
    "first_step": _first_step,
    "stream": lambda line, settings: table_runs.stream(*_one_case(line, settings)),
    "index": lambda line, settings: table_runs.index(*_one_case(line, settings)),
}


def _lines(settings: Settings, keys: list[str]) -> None:
    """Measure lines, and print a line of JSON for each: ``numbers``, ``unusable``, ``skipped``."""
    # What libraries print is no answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for key in keys:
            answer: dict[str, Any] = {"numbers": {}, "unusable": {}, "skipped": None}
            curves: dict[str, recommender_runs.Curve] = {}
            try:
                answer["numbers"] = measure(LINES[key], settings, answer["unusable"], curves)
            except CannotMeasureError as error:
                answer["skipped"] = str(error)
            if curves:
                answer["curves"] = curves
            gc.collect()  # tables in cycles: before anybody looks whether there is memory for the next line
            print(json.dumps(answer), file=answers, flush=True)


def _main(what: str, *given: str) -> None:
    if what == "lines":
        peers, *others = json.loads(given[0])
        _lines(Settings(tuple(peers), *others), list(given[1:]))
        return
    key, name, *more = given
    entry = next(entry for entry in LINES[key].entries if entry.name == name)
    if isinstance(entry, Trained):
        print(json.dumps(recommender_runs.answer(entry, json.loads(more[0]))))
    elif what == "stepper":
        _stepper(entry)
    else:
        _step_once(entry, int(more[0]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
