# SPDX-License-Identifier: Apache-2.0
"""Train the recommenders of a line, each in a process of its own, and look at what they have learned.

A process of its own, because OpenMP and BLAS threads of one library go on spinning for a while on the cores
that the next one needs, and because libraries want different environments: implicit asks for a BLAS of one
thread, for it has threads of its own. What is timed is training alone. Every contender has trained another
model for an epoch before; vectors are copied between epochs while the clock stands, and ranked at the end.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.bench.interaction_data import load_split, save_split
from nb_sparse_adam._src.bench.line import TOP, UNTIL, Line, Trained
from nb_sparse_adam._src.bench.recommenders import Recommender, Vectors
from nb_sparse_adam._src.bench.settings import Settings
from nb_sparse_adam._src.recommender.interactions import Split, hold_out, random_stream
from nb_sparse_adam._src.recommender.ranking import measure as rank

SEEDS = 3
QUICK_EPOCHS = 3
EPOCHS_OF_ONE_THREAD = 4
POINTS = 20  # of a curve, about
USERS = 5_000  # who are looked at, drawn once, if there are more
_REFERENCE = "implicit ALS"
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

Curve = dict[str, list[list[float]]]
"""``"seconds"`` of training and ``"recall"`` after them: a list for each seed."""
Run = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Have another process train the entry of a name; return what `answer` returns there, or raise."""


class FailedError(Exception):
    """A process could not train, for the reason that the message gives."""


class Timeline(NamedTuple):
    """What training left: seconds up to the end of each epoch, and vectors after some of them."""

    seconds: list[float]
    kept: dict[int, Vectors]  # epoch, from 1 -> copies


# --- in a process of its own ------------------------------------------------------------------------------


def answer(entry: Trained, asked: dict[str, Any]) -> dict[str, Any]:
    """Train one recommender.

    Parameters
    ----------
    entry : Trained
    asked : dict
        ``split``, the file; ``seed``, ``threads``, ``quick``; and ``compiling``, whether nothing else is
        wanted than the time of that.

    Returns
    -------
    dict
        ``seconds`` up to each point of the curve, ``recall`` there, ``epoch`` and ``recommend``, seconds; or
        ``compiling``.
    """
    split, quick = load_split(Path(asked["split"])), asked["quick"]
    epochs = {"epochs": QUICK_EPOCHS} if quick else {}
    if entry.threads is not None and not quick:
        epochs = {"epochs": EPOCHS_OF_ONE_THREAD}
    recommender = entry.make(split, asked["threads"], asked["seed"], **epochs)
    first = _seconds(recommender.warm)
    if asked["compiling"]:
        return {"compiling": first - _seconds(recommender.warm)}
    points = () if entry.threads is not None else points_of(recommender.epochs)
    timeline = follow(recommender, points)
    each = np.diff(timeline.seconds)  # the first has what is set up for all of them
    found: dict[str, Any] = {"epoch": statistics.median(each)}
    if points:
        found["seconds"] = [timeline.seconds[epoch - 1] for epoch in timeline.kept]
        found["recall"] = recalls(timeline, split)
        if recommender.serves_all:
            recommender.recommend(TOP)
            found["recommend"] = statistics.median(_seconds(recommender.recommend, TOP) for _ in range(3))
    return found


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def points_of(epochs: int) -> tuple[int, ...]:
    """Return the epochs that are looked at, closer to each other at the beginning."""
    return tuple(int(epoch) for epoch in np.unique(np.geomspace(1, epochs, POINTS).round()))


def follow(recommender: Recommender, points: tuple[int, ...]) -> Timeline:
    """Train, and keep copies of the vectors at some epochs, which takes no time on the clock."""
    seconds: list[float] = []
    kept: dict[int, Vectors] = {}
    stood = 0.0
    start = time.perf_counter()

    def after(epoch: int) -> None:
        nonlocal stood
        now = time.perf_counter()
        seconds.append(now - start - stood)
        if epoch in points:
            users, items = recommender.vectors()
            kept[epoch] = users.copy(), items.copy()
        stood += time.perf_counter() - now

    recommender.fit(after)
    return Timeline(seconds, kept)


def recalls(timeline: Timeline, split: Split) -> list[float]:
    """Return recall@k of the vectors that were kept, over the same users each time."""
    some = split
    who = np.flatnonzero((split.test.counts() > 0) & (split.train.counts() > 0))
    if len(who) > USERS:
        chosen = np.zeros(split.test.n_users, dtype=np.bool_)
        chosen[random_stream(0, "data").choice(who, USERS, replace=False)] = True
        test = split.test.select(chosen[split.test.users()])
        some = Split(split.train, test, split.user_ids, split.item_ids, "some users")
    return [rank(*vectors, some, TOP).quality.recall for vectors in timeline.kept.values()]


# --- in the process of the line ---------------------------------------------------------------------------


def environment(entry: Trained, threads: int) -> dict[str, str]:
    """Give the variables of the process that trains: how many threads BLAS has, beside others."""
    blas = threads if entry.peer is None else 1
    return {**os.environ, **dict.fromkeys(_BLAS, str(blas))}


def measure(
    line: Line,
    settings: Settings,
    unusable: dict[str, str],
    curves: dict[str, Curve],
    run: Run,
) -> dict[str, float]:
    """Train everybody of a line, on several seeds one after the other.

    Parameters
    ----------
    line : Line
    settings : Settings
        A quick run has one seed and few epochs.
    unusable : dict
        Is given the names of entries, or of single numbers, that there are not, with the reason.
    curves : dict
        Is given the curve of each entry.
    run : callable
        Trains in another process.

    Returns
    -------
    dict of str to float
        Numbers by name: medians over seeds of seconds, means of recall.
    """
    entries = [entry for entry in line.entries if isinstance(entry, Trained)]
    found: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in entries}
    asked: dict[str, Any] = {}
    threads, quick = settings.threads, settings.quick
    interactions = entries[0].sized(quick).read(settings.interactions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "split.npz")
        for seed in range(1 if quick else SEEDS):
            save_split(hold_out(interactions, seed=seed), path)
            asked = {"split": str(path), "seed": seed, "quick": quick, "compiling": False}
            for entry in entries:
                if entry.name not in unusable:
                    try:
                        given = {**asked, "threads": entry.threads or threads}
                        found[entry.name].append(run(entry.name, given))
                    except FailedError as failure:
                        unusable[entry.name] = str(failure)
        numbers = numbers_of({name: runs for name, runs in found.items() if name not in unusable}, unusable)
        for entry in entries:
            if entry.peer is None and entry.threads is None and entry.name not in unusable:
                name = f"{entry.name}, compiling"
                if quick:
                    unusable[name] = "a quick run does not wait for the compiler"
                else:
                    given = {**asked, "threads": threads, "compiling": True}
                    numbers[name] = run(entry.name, given)["compiling"]
    for name, runs in found.items():
        if name not in unusable and "recall" in runs[0]:
            curves[name] = {what: [one[what] for one in runs] for what in ("seconds", "recall")}
    return numbers


def numbers_of(found: dict[str, list[dict[str, Any]]], unusable: dict[str, str]) -> dict[str, float]:
    """Make the numbers of a line from what the processes of each entry answered, in the order of seeds."""
    numbers: dict[str, float] = {}
    for name, runs in found.items():
        numbers[f"{name}, an epoch"] = statistics.median(run["epoch"] for run in runs)
        if "recall" not in runs[0]:
            continue
        numbers[f"{name}, recall@{TOP}"] = statistics.fmean(run["recall"][-1] for run in runs)
        numbers[f"{name}, in all"] = statistics.median(run["seconds"][-1] for run in runs)
        if "recommend" in runs[0]:
            numbers[f"{name}, recommend"] = statistics.median(run["recommend"] for run in runs)
        if _REFERENCE in found and name != _REFERENCE:
            goals = [run["recall"][-1] for run in found[_REFERENCE]]
            reached = [until(*run_and_goal) for run_and_goal in zip(runs, goals, strict=True)]
            times = [seconds for seconds in reached if seconds is not None]
            if len(times) == len(runs):
                numbers[f"{name}, {UNTIL}"] = statistics.median(times)
            else:
                unusable[f"{name}, {UNTIL}"] = (
                    f"{name} reached {_REFERENCE}'s recall with {len(times)} of {len(runs)} seeds"
                )
    return numbers


def until(run: dict[str, Any], goal: float) -> float | None:
    """Return the seconds at the first point of a curve that reaches a recall; None if none does."""
    points = zip(run["seconds"], run["recall"], strict=True)
    return next((seconds for seconds, recall in points if recall >= goal), None)


def trained_by(command: Callable[[str, str], list[str]], line: Line) -> Run:
    """Return a function that has a new process train an entry.

    Parameters
    ----------
    command : callable
        Gives the command of a process that prints what `answer` returns, given the entry's name and what is
        asked, as JSON.
    line : Line
    """
    entries = {entry.name: entry for entry in line.entries if isinstance(entry, Trained)}

    def run(name: str, asked: dict[str, Any]) -> dict[str, Any]:
        variables = environment(entries[name], asked["threads"])
        with tempfile.TemporaryDirectory() as folder:
            if asked["compiling"]:
                variables["NUMBA_CACHE_DIR"] = folder
            done = subprocess.run(
                command(name, json.dumps(asked)), env=variables, text=True, capture_output=True, check=False
            )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise FailedError(last)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run
