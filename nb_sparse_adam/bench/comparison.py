"""Run the lines one after the other, each in a process of its own, and put together what they give."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numba

from nb_sparse_adam.bench.lines import LINES, Line
from nb_sparse_adam.bench.peers import PEERS
from nb_sparse_adam.bench.worker import Settings, command
from nb_sparse_adam.engine.threads import max_threads
from nb_sparse_adam.errors import MissingExtraError, OptionError
from nb_sparse_adam.info import threading_layer, usable_cores, versions

__all__ = ["choose_lines", "choose_peers", "choose_threads", "describe", "figures", "reason_to_skip", "run"]

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
    """Return the lines whose keys begin with one of the patterns; all of them if there is no pattern.

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
    return [line for line in lines if not patterns or line.key.startswith(tuple(patterns))]


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
        whether it is ``met``; ``skipped``, the reason if there are no numbers.
    """
    for line in lines:
        yield {"key": line.key, "title": line.title, "section": line.section, **_one(line, settings)}


def _one(line: Line, settings: Settings) -> dict[str, Any]:
    skipped = reason_to_skip(line, settings)
    numbers: dict[str, float] = {}
    if skipped is None:
        process = subprocess.run(
            command("line", line.key, json.dumps(settings)),
            env=_environment(line),
            text=True,
            capture_output=True,
            check=False,
        )
        if process.returncode:
            last = (process.stderr.strip().splitlines() or [""])[-1]
            skipped = f"its process ended with status {process.returncode}: {last}"
        else:
            answer = json.loads(process.stdout.splitlines()[-1])
            numbers, skipped = answer.get("numbers", {}), answer.get("skipped")
    return {"numbers": numbers, "figures": figures(line, numbers, not settings.quick), "skipped": skipped}


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
    # A line all of whose figures need a peer that is not there.
    gone = {
        entry.name: entry.peer for entry in line.entries if entry.peer and entry.peer not in settings.peers
    }
    if all(gone.keys() & {figure.over, figure.under} for figure in line.figures):
        return " and ".join(
            f"{name} was left out" if PEERS[name].installed else f"needs {name}: {PEERS[name].install}"
            for name in dict.fromkeys(filter(None, gone.values()))
        )
    return None


def _environment(line: Line) -> dict[str, str]:
    """Keep every OpenMP thread, of whichever library, on a core of its own.

    Threads that have rested are sometimes woken up on one core together, step after step, and then wait for
    the scheduler's next tick: 12 ms for a step of 2. What two processes do to each other is another matter.
    """
    if line.measure == "processes":
        return dict(os.environ)
    return {"OMP_PROC_BIND": "true", **os.environ}


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


def _memory(what: str) -> float | None:
    """Return a line of /proc/meminfo in GB; None where there is none."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{what}:"):
                return round(int(line.split()[1]) / 1e6, 1)
    except OSError:
        pass
    return None
