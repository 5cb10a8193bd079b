# SPDX-License-Identifier: Apache-2.0
"""The figure of docs/step-counts.md: what the three count rules do to a row that is met every 400 steps.

    python docs/figures/step_counts.py

steps a table with each of them and writes step-counts.svg beside this file. The numbers that are drawn are
in the file, too, so that a test can tell whether they still are what the library computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nb_sparse_adam import RowGradient, SparseAdam

STEP_COUNTS = ("element", "row", "global")
LR = 0.01
EVERY = 400  # steps from one meeting with the rare row to the next
MEETINGS = 16
FREQUENT, RARE = 0, 1  # rows: one is in every batch
FIGURE = Path(__file__).with_name("step-counts.svg")


def curves() -> dict[str, Any]:
    """Train, and note the rare row after each step in which it is met.

    Its gradient is 1 for its first element. For its second it is 1 at every other meeting and else 0.

    Returns
    -------
    dict
        ``"met_at"``: the steps, from 1, in which the row is met; and for each rule ``"lengths"``, how far its
        first element goes in each of them, in learning rates, and ``"values"``, where its second one is after
        each, in learning rates below where it was.
    """
    met_at = [1, *range(EVERY, EVERY * MEETINGS, EVERY)]
    drawn: dict[str, Any] = {"met_at": met_at}
    for step_counts in STEP_COUNTS:
        table = np.zeros((2, 2))
        optimizer = SparseAdam(table, lr=LR, step_counts=step_counts)
        lengths, values = [], []
        for step in range(1, met_at[-1] + 1):
            if step not in met_at:
                optimizer.step(RowGradient([FREQUENT], np.ones((1, 2))))
                continue
            gradient = np.ones((2, 2))
            gradient[1, 1] = len(lengths) % 2 == 0
            before = table[RARE, 0]
            optimizer.step(RowGradient([FREQUENT, RARE], gradient))
            lengths.append(float((before - table[RARE, 0]) / LR))
            values.append(float(-table[RARE, 1] / LR))
        drawn[step_counts] = {"lengths": lengths, "values": values}
    return drawn


def draw(drawn: dict[str, Any], path: Path) -> None:
    """Draw the curves into an SVG file, with their numbers as its description."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    styles = {  # not by colour alone; rings, for what lies on them to be seen
        "element": {
            "color": "#0072b2",
            "marker": "o",
            "linestyle": "-",
            "markersize": 10,
            "fillstyle": "none",
        },
        "row": {"color": "#e69f00", "marker": "s", "linestyle": "--", "markersize": 5},
        "global": {"color": "#d55e00", "marker": "^", "linestyle": ":", "markersize": 5},
    }
    with mpl.rc_context({"svg.hashsalt": "step-counts", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        lengths, values = figure.subplots(1, 2)
        meetings = np.arange(1, MEETINGS + 1)
        for step_counts, style in styles.items():
            curve, label = drawn[step_counts], f'"{step_counts}"'
            lengths.plot(drawn["met_at"], curve["lengths"], label=label, **style)
            values.plot(meetings, curve["values"], label=label, **style)
        lengths.axhline(1, color="#999999", linewidth=0.8, zorder=0)
        lengths.set(
            title="A gradient of 1 each time: length of its steps",
            xlabel="step of the training in which the row is met",
            ylabel="learning rates",
            ylim=(0, None),
        )
        for meeting in meetings[1::2]:
            values.axvspan(meeting - 0.5, meeting + 0.5, color="#eeeeee", zorder=0)
        top = 1.1 * max(drawn["row"]["values"])
        last = drawn["global"]["values"][-1]
        values.text(5.6, 0.93 * top, f'"global" goes on to {last:.0f}', color=styles["global"]["color"])
        values.set(
            title="A gradient of 1, 0, 1, 0, …: how far it has come",
            xlabel="meeting with the row (grey: gradient 0)",
            ylabel="learning rates",
            xlim=(0.5, MEETINGS + 0.5),
            ylim=(0, top),
        )
        for axes in (lengths, values):
            axes.spines[["top", "right"]].set_visible(False)
        lengths.legend(frameon=False, title="step_counts", loc="center right")
        # No date: the same numbers make the same file.
        figure.savefig(path, metadata={"Description": json.dumps(drawn), "Date": None})


if __name__ == "__main__":
    draw(curves(), FIGURE)
    print(FIGURE)
