# SPDX-License-Identifier: Apache-2.0
"""What a line of the comparison is made of: who takes part, and which figures come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from nb_sparse_adam._src.bench.cases import CASES, Case
from nb_sparse_adam._src.bench.contenders import Contender
from nb_sparse_adam._src.bench.interaction_data import DATA, Data
from nb_sparse_adam._src.bench.recommenders import Recommender
from nb_sparse_adam._src.recommender.interactions import Split

TOP = 20
"""Of recall@k: how many recommendations are looked at."""
UNTIL = "until ALS's recall"


class Entry(NamedTuple):
    """A contender of a line."""

    name: str
    case: str
    make: Callable[[Case, int], Contender]  # of the case and the number of threads
    peer: str | None = None  # the library that it needs

    def sized(self, quick: bool) -> Case:
        """Return its case, or the smaller one of ``--quick``."""
        return CASES[self.case].smaller() if quick else CASES[self.case]

    def contender(self, threads: int, quick: bool) -> Contender:
        """Set it up."""
        return self.make(self.sized(quick), threads)


class Trained(NamedTuple):
    """A recommender of a line.

    Attributes
    ----------
    name : str
    case : str
        Key of what it is trained on, in `DATA`.
    make : callable
        Sets it up, given a split, the number of threads and a seed.
    peer : str or None
        The library that it needs.
    threads : int or None
        Instead of as many as were asked for. It is trained for some epochs only, to time them.
    """

    name: str
    case: str
    make: Callable[[Split, int, int], Recommender]
    peer: str | None = None
    threads: int | None = None

    def sized(self, quick: bool) -> Data:
        """Return what it is trained on, or less of ``--quick``."""
        return DATA[self.case].smaller() if quick else DATA[self.case]

    @property
    def numbers(self) -> list[str]:
        """Names of the numbers that come of training it."""
        if self.threads is not None:
            return [f"{self.name}, an epoch"]
        whats = ["an epoch", f"recall@{TOP}", "in all", UNTIL, "recommend"]
        return [f"{self.name}, {what}" for what in whats + ["compiling"] * (self.peer is None)]


class Figure(NamedTuple):
    """One number over another, or less another, or a number by itself, and what it ought to be.

    Attributes
    ----------
    label : str
        What it is, for people; unique in its line.
    over, under : str
        Names of numbers of the line; without `under`, the number is the figure.
    at_least, at_most : float or None
        The target: one of them, or none.
    unit : {"", "s"}
        Unit of its value: a ratio or a count ("") or seconds.
    difference : bool
        Whether `under` is subtracted.
    """

    label: str
    over: str
    under: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    difference: bool = False

    def value(self, numbers: Mapping[str, float]) -> float | None:
        """Compute it from the numbers of a line, by name; None if one of them is missing."""
        if self.over not in numbers or (self.under is not None and self.under not in numbers):
            return None
        if self.difference and self.under is not None:
            return numbers[self.over] - numbers[self.under]
        return numbers[self.over] / (1.0 if self.under is None else numbers[self.under])

    def met(self, value: float) -> bool | None:
        """Whether a value meets the target; None if there is none."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


class Line(NamedTuple):
    """What is timed in one process, side by side.

    Attributes
    ----------
    key : str
        Its name in results.
    title : str
        What it is, for people; ``{table}``, ``{n}`` and the like stand for sizes of the first entry's case.
        See `titled`.
    section : str
        The heading that it stands under.
    entries : tuple of Entry or Trained
        They take turns.
    figures : tuple of Figure
        Made of medians in seconds, or of what `measure` gives.
    measure : {"times", "processes", "scratch", "resident", "first_step", "stream", "index", "recommenders"}
        How it is measured; see `worker`. Only of "recommenders" entries are `Trained`; of "stream"
        and "index" they are numbers of one measurement.
    layer : str
        Of "processes": numba's threading layer.
    loop : int
        Steps that are timed together.
    gigabytes : float
        Memory that must be free, if more than a few.
    quick : bool
        Whether ``--quick`` has it.
    by_name : bool
        Whether only a run whose ``--only`` names it has it.
    """

    key: str
    title: str
    section: str
    entries: tuple[Entry | Trained, ...]
    figures: tuple[Figure, ...]
    measure: str = "times"
    layer: str = ""
    loop: int = 1
    gigabytes: float = 8
    quick: bool = True
    by_name: bool = False

    @property
    def steppers(self) -> list[Entry]:
        """Its entries, but for recommenders."""
        return [entry for entry in self.entries if isinstance(entry, Entry)]

    def titled(self, quick: bool, **more: str) -> str:
        """Return the title, with the sizes that such a run has, or with `more`."""
        return self.title.format_map({**self.entries[0].sized(quick).sizes, **more})

    def only(self, label: str) -> Line:
        """Return a line with one of the figures, and no more entries than that figure needs."""
        figure = next(figure for figure in self.figures if figure.label == label)
        names = {figure.over, figure.under}
        entries = tuple(entry for entry in self.entries if not names.isdisjoint(self.numbers_of(entry)))
        return self._replace(entries=entries, figures=(figure,))

    def numbers_of(self, entry: Entry | Trained) -> list[str]:
        """Return the names of the numbers that come of measuring an entry."""
        if isinstance(entry, Trained):
            return entry.numbers
        if self.measure == "processes":
            return [f"{entry.name}, alone", f"{entry.name}, beside another"]
        if self.measure == "first_step":
            return [f"{entry.name}, compiled", f"{entry.name}, from disk"]
        return [entry.name]
