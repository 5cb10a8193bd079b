# SPDX-License-Identifier: Apache-2.0
"""Run the lines one after the other, in processes of their own, and put together what they give."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numba

import nb_sparse_adam
from nb_sparse_adam._src.bench.interaction_data import DATA, FILE
from nb_sparse_adam._src.bench.line import Line
from nb_sparse_adam._src.bench.lines import LINES
from nb_sparse_adam._src.bench.machine import memory as _memory
from nb_sparse_adam._src.bench.peers import PEERS
from nb_sparse_adam._src.bench.settings import Settings
from nb_sparse_adam._src.bench.worker import command
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam._src.info import threading_layer, usable_cores, versions
from nb_sparse_adam.errors import MissingExtraError, OptionError

SCHEMA = 1


def choose_peers(names: str | None) -> tuple[str, ...]:
    """Read ``--peers``.

    Parameters
    ----------
    names : str or None
        Separated by commas; ``"none"`` for no peer; None for those that are installed.

    Raises
    ------
    OptionError
        If there is no such peer.
    MissingExtraError
        If one that was asked for is not installed.
    """
    if names is None:
        return tuple(name for name, peer in PEERS.items() if peer.installed)
    if names == "none":
        return ()
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in PEERS:
            raise OptionError(
                f"--peers got {name!r}, expected some of {', '.join(PEERS)} separated by commas, or none"
            )
    missing = [f"{name}: {PEERS[name].install}" for name in chosen if not PEERS[name].installed]
    if missing:
        raise MissingExtraError("--peers names what is not installed. " + "; ".join(missing))
    return tuple(name for name in PEERS if name in chosen)


def choose_lines(patterns: Sequence[str], quick: bool) -> list[Line]:
    """Return the lines whose keys begin with one of the patterns; without, all but those that must be named.

    Raises
    ------
    OptionError
        If a pattern fits no line.
    """
    lines = [line for line in LINES.values() if line.quick or not quick]
    for pattern in patterns:
        if not any(line.key.startswith(pattern) for line in lines):
            names = ", ".join(line.key for line in lines)
            raise OptionError(f"--only got {pattern!r}, expected the beginning of one of {names}")
    if not patterns:
        return [line for line in lines if not line.by_name]
    return [line for line in lines if line.key.startswith(tuple(patterns))]


def choose_interactions(file: str | None, lines: Sequence[Line]) -> str | None:
    """Read ``--interactions``: the file, once it has been read whole.

    Raises
    ------
    OptionError
        If none of the lines is of a file.
    InteractionsError, OSError
        If it cannot be used.
    """
    if file is None:
        return None
    of_files = [line.key for line in LINES.values() if line.entries[0].case == FILE]
    if not any(line.key in of_files for line in lines):
        raise OptionError(
            f"--interactions got {file!r}, which is for the line {of_files[0]}: add --only {of_files[0]}"
        )
    DATA[FILE].read(file)
    return file


def choose_threads(number: int | None) -> int:
    """Return the number of threads to measure with: numba's setting, but no more than there are cores."""
    most = min(max_threads(), usable_cores())
    if number is None:
        return min(int(numba.get_num_threads()), most)
    if not 1 <= number <= most:
        raise OptionError(f"--threads got {number}, expected 1 to {most}")
    return number


def describe(settings: Settings) -> dict[str, Any]:
    """What the figures are measured on, and with."""
    return {
        "schema": SCHEMA,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "quick": settings.quick,
        "threads": settings.threads,
        "machine": {
            "processor": _processor(),
            "cores": usable_cores(),
            "memory_gb": _memory("MemTotal"),
            "platform": platform.platform(),
            "threading_layer": threading_layer(),
        },
        "versions": {**versions(), **{name: PEERS[name].version for name in settings.peers}},
        "missing_peers": {name: peer.install for name, peer in PEERS.items() if not peer.installed},
    }


def run(lines: Sequence[Line], settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure the lines; yield each as soon as it is known.

    Yields
    ------
    dict
        ``key``, ``title``, ``section``; ``numbers`` by name, seconds where they are times; ``figures``, each
        with ``label``, ``value``, its ``unit`` ("s" or none), its target ``at_least`` or ``at_most``, and
        whether it is ``met``; ``missing``, the labels of figures that there are not, each with the reason;
        ``skipped``, the reason if there are no numbers; ``curves`` of recommenders that were trained, by
        name, each with its ``seconds`` and ``recall``.
    """
    for group in _groups(lines, settings):
        reasons = {line.key: reason_to_skip(line, settings) for line in group}
        answers = _answers([line for line in group if reasons[line.key] is None], settings)
        for line in group:
            reason = reasons[line.key]
            answer = next(answers) if reason is None else _nothing(reason)
            numbers, skipped = answer["numbers"], answer["skipped"]
            unusable = {**_left_out(line, settings), **_by_number(line, answer["unusable"])}
            yield {
                "key": line.key,
                "title": _title(line, settings),
                "section": line.section,
                "numbers": numbers,
                "figures": figures(line, numbers, not settings.quick),
                "missing": {} if skipped is not None else _missing(line, numbers, unusable),
                "skipped": skipped,
                **{name: answer[name] for name in ("curves",) if name in answer},
            }


def _title(line: Line, settings: Settings) -> str:
    file = settings.interactions
    return line.titled(settings.quick, **({} if file is None else {"file": Path(file).name}))


def _groups(lines: Sequence[Line], settings: Settings) -> Iterator[list[Line]]:
    """Yield lines that share a process: each its own, but for lines of times that are to be quick."""
    for shared, group in itertools.groupby(lines, lambda line: settings.quick and line.measure == "times"):
        together = list(group)
        yield from [together] if shared else ([line] for line in together)


def _nothing(reason: str) -> dict[str, Any]:
    """Give the answer of a worker that has no numbers."""
    return {"numbers": {}, "unusable": {}, "skipped": reason}


def _answers(lines: Sequence[Line], settings: Settings) -> Iterator[dict[str, Any]]:
    """Have a worker measure the lines; where it dies, another one goes on with the line after.

    Yields
    ------
    dict
        ``numbers``; ``unusable``, names of entries with reasons; ``skipped``.
    """
    left = [line.key for line in lines]
    while left:
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(
                command("lines", json.dumps(settings), *left),
                env=_environment(lines[-len(left)]), text=True, stdout=subprocess.PIPE, stderr=errors,
            ) as process,
        ):  # fmt: skip
            assert process.stdout is not None
            try:
                for answer in process.stdout:
                    del left[0]
                    yield json.loads(answer)
            except BaseException:  # the caller was interrupted, or wants no more
                process.kill()
                raise
            if left:
                status = process.wait()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
                del left[0]
                yield _nothing(f"its process ended with status {status}: {last}")


def _missing(line: Line, numbers: Mapping[str, float], unusable: Mapping[str, str]) -> dict[str, str]:
    """Say why figures are missing, by label."""
    return {
        figure.label: " and ".join(
            dict.fromkeys(
                unusable.get(name, f"there is no number for {name}")
                for name in (figure.over, figure.under)
                if name is not None and name not in numbers
            )
        )
        for figure in line.figures
        if figure.value(numbers) is None
    }


def figures(line: Line, numbers: Mapping[str, float], judged: bool = True) -> list[dict[str, Any]]:
    """Compute the figures of a line that its numbers allow; if `judged`, say which meet their targets.

    Returns
    -------
    list of dict
        As `run` describes them.
    """
    return [
        {
            "label": figure.label,
            "value": value,
            "unit": figure.unit,
            "at_least": figure.at_least,
            "at_most": figure.at_most,
            "met": figure.met(value) if judged else None,
        }
        for figure in line.figures
        if (value := figure.value(numbers)) is not None
    ]


def reason_to_skip(line: Line, settings: Settings) -> str | None:
    """Say what a line needs that is not there; None if it can be measured."""
    free, cores = _memory("MemAvailable"), usable_cores()
    if not settings.quick and free is not None and free < line.gigabytes:
        return f"needs {line.gigabytes:g} GB of free memory, there are {free:.1f}"
    if cores < 2 and (line.measure == "processes" or line.key.startswith("threads")):
        return f"needs 2 cores, there is {cores}"
    if line.entries[0].case == FILE and settings.interactions is None:
        return "needs a file: --interactions FILE"
    # A line all of whose figures need a peer that is not there.
    left_out = _left_out(line, settings)
    if all(left_out.keys() & {figure.over, figure.under} for figure in line.figures):
        return " and ".join(dict.fromkeys(left_out.values()))
    return None


def _left_out(line: Line, settings: Settings) -> dict[str, str]:
    """Return the numbers of a line whose library is not measured, each with the reason."""
    reasons = {
        entry.name: f"{entry.peer} was left out"
        if PEERS[entry.peer].installed
        else f"needs {entry.peer}: {PEERS[entry.peer].install}"
        for entry in line.entries
        if entry.peer is not None and entry.peer not in settings.peers
    }
    return _by_number(line, reasons)


def _by_number(line: Line, reasons: Mapping[str, str]) -> dict[str, str]:
    """Return reasons that are given by entries, or by numbers, by number."""
    of_entries = {
        number: reasons[entry.name]
        for entry in line.entries
        if entry.name in reasons
        for number in line.numbers_of(entry)
    }
    return {**reasons, **of_entries}


def _environment(line: Line) -> dict[str, str]:
    """Keep every OpenMP thread, of whichever library, on a core of its own.

    Threads that have rested are sometimes woken up on one core together, step after step, and then wait for
    the scheduler's next tick: 12 ms for a step of 2. What two processes do to each other is another matter;
    and where the main thread is bound, all threads of BLAS, which recommenders need, are bound to its core.
    """
    if line.measure in ("processes", "recommenders"):
        return dict(os.environ)
    return {"OMP_PROC_BIND": "true", **os.environ}


def _commit() -> str | None:
    """Return the commit of the checkout that the package is in, "-dirty" if files differ; None elsewhere."""
    package = Path(nb_sparse_adam.__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], text=True, capture_output=True, check=True
        ).stdout.strip()

    try:
        # Not of somebody else's repository that has our installed package somewhere below.
        if git("rev-parse", "--show-prefix") != f"{package.name}/":
            return None
        return git("describe", "--always", "--dirty", "--abbrev=7", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({_llvm_name()})"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({_llvm_name()})"


def _llvm_name() -> str:
    import llvmlite.binding

    return str(llvmlite.binding.get_host_cpu_name())
