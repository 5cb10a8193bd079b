# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown of the recommenders that `nb-sparse-adam bench --only recommender` trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages import tables

Result = dict[str, Any]

PICTURE = "recommender.png"
NAMES = {
    "softmax": 'this library, `loss="softmax"`',
    "in a hurry": "this library, in a hurry",
    "as by default": "this library, as by default",
    "BPR": 'this library, `loss="bpr", negatives=1`',
    "implicit ALS": "implicit, ALS",
    "implicit BPR": "implicit, BPR",
    "LightFM WARP": "LightFM, WARP",
}
"""Contender -> how it is called on pages."""
_TIMES = ("an epoch", "in all", "until ALS's recall", "recommend")


def trained(result: Result) -> list[Result]:
    """Return the lines in which recommenders were trained."""
    return [line for line in result["lines"] if line.get("curves")]


def page(result: Result) -> str:
    """Write what was measured, the picture, a table of contenders for each set, and the figures."""
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("implicit", "lightfm") if name in result["versions"]
    )
    machine = result["machine"]
    seeds = {len(curve["recall"]) for line in trained(result) for curve in line["curves"].values()}
    return (
        f"{machine['processor']}, {result['threads']} threads, {result['date']}, commit {tables.at(result)}; "
        f"{versions}; {max(seeds)} seeds.\n\n"
        f"![Recall against seconds of training](../benchmarks/measured/{PICTURE})\n\n"
        + "\n".join(f"**{line['title']}**\n\n{contenders(line)}" for line in trained(result))
        + f"\n{figures(trained(result))}"
    )


def contenders(line: Result) -> str:
    """Who takes how long, and how good it is."""
    numbers: Mapping[str, float] = line["numbers"]
    rows = []
    for name, words in NAMES.items():
        if name in line["curves"]:
            times = [numbers.get(f"{name}, {what}") for what in _TIMES]
            cells = ["" if time is None else tables.seconds_or_less(time) for time in times]
            rows.append([words, f"{numbers[f'{name}, recall@20']:.4f}", *cells])
    return tables.table(["", "recall@20", *_TIMES[:-1], "`recommend`, all users"], rows)


def figures(lines: list[Result]) -> str:
    """The figures of all lines, side by side, with their targets; in bold what misses one."""
    found = [{figure["label"]: figure for figure in line["figures"]} for line in lines]
    labels = dict.fromkeys(label for figures_ in found for label in figures_)
    rows = []
    for label in labels:
        shown = [figures_.get(label) for figures_ in found]
        first = next(figure for figure in shown if figure is not None)
        target = "" if first["at_least"] is first["at_most"] is None else tables.bound(first)
        cells = [
            f"**{tables.share(one)}**" if one and one["met"] is False else tables.share(one) for one in shown
        ]
        rows.append([label, target, *cells])
    return tables.table(["", "target", *(line["title"] for line in lines)], rows)
