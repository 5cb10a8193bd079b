# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown of what `nb-sparse-adam bench` measured, processors side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Result = dict[str, Any]

BEFORE_THE_REBUILD = {"815d91d", "5b82f2e"}
"""Commits at which the engine was another one, of committed results that have not been measured again."""

NBSP = "\N{NO-BREAK SPACE}"
_OLD = "before the engine was rebuilt"

OTHERS = ("element", "row")
IN_TORCH = ("SparseAdam", "EmbeddingBag")


class Machine(NamedTuple):
    """A processor on which `nb-sparse-adam bench` was run.

    Attributes
    ----------
    name : str
        Its processor, as people call it.
    short : str
        The same, to stand above a column.
    result : dict
        What ``bench.json`` holds.
    """

    name: str
    short: str
    result: Result

    @property
    def head(self) -> str:
        """The heading of its columns: the processor, and the commit."""
        return f"{self.short}, {at(self.result)}"

    def numbers(self, key: str) -> dict[str, float]:
        """Return the numbers of a line, by name; none if it was not measured."""
        return dict(self.lines.get(key, {"numbers": {}})["numbers"])

    @property
    def lines(self) -> dict[str, Result]:
        """The lines that were measured, by key."""
        return {line["key"]: line for line in self.result["lines"] if not line["skipped"]}

    def figures(self, key: str) -> dict[str, Result]:
        """Return the figures of a line, by label; none if it was not measured."""
        return {figure["label"]: figure for figure in self.lines.get(key, {"figures": []})["figures"]}


def is_old(result: Result) -> bool:
    """Say whether a result was measured before the rebuild."""
    return result.get("commit") in BEFORE_THE_REBUILD


def at(result: Result) -> str:
    """Say at which commit a result was measured, in few characters; † says that it is an old one."""
    return f"`{result.get('commit') or 'unknown'}`{'†' if is_old(result) else ''}"


def when(result: Result) -> str:
    """Say at which commit a result was measured, in words."""
    commit = result.get("commit")
    return f"{f'commit {commit}' if commit else 'unknown commit'}{f', {_OLD}' if is_old(result) else ''}"


def note(*results: Result) -> str:
    """Explain the † below a table, if there is one."""
    return f"\n† Measured {_OLD}.\n" if any(map(is_old, results)) else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table in Markdown."""
    head = list(head)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def milliseconds(seconds: float) -> str:
    """Write a time in milliseconds, without the unit."""
    return f"{seconds * 1e3:.{3 if seconds < 1e-3 else 1}f}"


def seconds_or_less(seconds: float) -> str:
    """Write a time with the unit that fits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{milliseconds(seconds)} ms"


def faster(numbers: Mapping[str, float], theirs: str, ours: str) -> str:
    """Write how many times faster `ours` is, and both times; nothing if one was not measured."""
    if theirs not in numbers or ours not in numbers:
        return ""
    there, here = numbers[theirs], numbers[ours]
    return f"**{there / here:.1f}×** {milliseconds(there)}{NBSP}→{NBSP}{milliseconds(here)}"


def lines_of(machines: list[Machine]) -> dict[str, Result]:
    """Return the lines that any machine has, by key, as the first that has them."""
    found: dict[str, Result] = {}
    for machine in machines:
        for key, line in machine.lines.items():
            found.setdefault(key, line)
    return found


def pairs(line: Result, wanted: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the names of what figures compare, theirs and ours, where ours is wanted."""
    for figure in line["figures"]:
        theirs, _, ours = figure["label"].partition(" / ")
        if ours in wanted:
            yield theirs, ours


def side_by_side(machines: list[Machine], head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table that ends in a column for each processor, and the note below it."""
    heads = [*head, *(machine.head for machine in machines)]
    return table(heads, rows) + note(*(machine.result for machine in machines))


def machines_table(machines: list[Machine]) -> str:
    """What was measured on, and with."""
    rows = []
    for machine in machines:
        result = machine.result
        versions = ", ".join(
            f"{name} {result['versions'][key].partition('+')[0]}"
            for name, key in (
                ("numba", "numba"), ("torch", "torch"), ("FBGEMM", "fbgemm"), ("Paddle", "paddle"),
            )
            if key in result["versions"]
        )  # fmt: skip
        cores = f"{machine.name}, {result['machine']['cores']} cores, {result['threads']} threads"
        rows.append([cores, at(result), result["date"], versions])
    return table(["processor", "at commit", "on", "with"], rows) + note(
        *(machine.result for machine in machines)
    )


def others_table(machines: list[Machine]) -> str:
    """Steps beside other libraries' of the same arrays."""
    head = ["a step on", "beside"]
    head += [f'{machine.head}: `"{ours}"`' for machine in machines for ours in OTHERS]
    rows = []
    for key, line in lines_of(machines).items():
        for theirs in dict.fromkeys(theirs for theirs, _ in pairs(line, OTHERS)):
            cells = [faster(machine.numbers(key), theirs, ours) for machine in machines for ours in OTHERS]
            rows.append([line["title"], theirs, *cells])
    return table(head, rows) + note(*(machine.result for machine in machines))


def in_torch_table(machines: list[Machine]) -> str:
    """Steps of `nb_sparse_adam.torch` beside torch's."""
    rows = []
    for key, line in lines_of(machines).items():
        for theirs, ours in pairs(line, IN_TORCH):
            cells = [faster(machine.numbers(key), theirs, ours) for machine in machines]
            rows.append([f"`{ours}`: {line['title']}", *cells])
    return side_by_side(machines, ["in torch"], rows)


def limits_table(machines: list[Machine]) -> str:
    """Shares of the limit that memory sets."""
    rows = []
    for key, line in lines_of(machines).items():
        for figure in line["figures"]:
            label = figure["label"]
            if label.startswith("of the limit"):
                what = label.removeprefix("of the limit").lstrip(", ")
                cells = [share(machine.figures(key).get(label)) for machine in machines]
                rows.append([f"{line['title']}{', ' if what else ''}{what}", *cells])
    return side_by_side(machines, ["a step on"], rows)


def share(figure: Result | None) -> str:
    """Write a figure; nothing if there is none."""
    if figure is None:
        return ""
    return seconds_or_less(figure["value"]) if figure["unit"] == "s" else f"{figure['value']:.3g}"


def section_table(section: str, wanted: Callable[[str], bool] = bool) -> Callable[[list[Machine]], str]:
    """Make a table of all figures of a section whose labels are wanted."""

    def write(machines: list[Machine]) -> str:
        rows = [
            [line["title"], label, *(share(machine.figures(key).get(label)) for machine in machines)]
            for key, line in lines_of(machines).items()
            if line["section"] == section
            for label in (figure["label"] for figure in line["figures"])
            if wanted(label)
        ]
        if not rows:
            return "Not measured yet on these machines: `bench` has had these lines only since.\n"
        return side_by_side(machines, ["", ""], rows)

    return write


def missed_table(machines: list[Machine]) -> str:
    """Figures that miss their target on one of the machines."""
    rows = []
    for key, line in lines_of(machines).items():
        for figure in line["figures"]:
            found = [machine.figures(key).get(figure["label"]) for machine in machines]
            if any(one is not None and one["met"] is False for one in found):
                cells = [f"**{share(one)}**" if one and one["met"] is False else share(one) for one in found]
                rows.append([line["title"], figure["label"], bound(figure), *cells])
    return side_by_side(machines, ["a step on", "figure", "target"], rows)


def bound(figure: Result) -> str:
    """Write the target of a figure."""
    sign, value = ("≥", figure["at_least"]) if figure["at_least"] is not None else ("≤", figure["at_most"])
    return f"{sign} {seconds_or_less(value) if figure['unit'] == 's' else format(value, 'g')}"
