# SPDX-License-Identifier: Apache-2.0
"""The picture of the README: six steps, how many times faster each is here.

`python -m benchmarks.pages` draws it. The lines are chosen to be what people would compare with, not what
comes out best: the last one is the one where we are least ahead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.pages.tables import when
from nb_sparse_adam._src.bench.chart import new_figure

BAR, FAINT, INK = "#2f6db3", "#5f6b76", "#1b2733"


class Step(NamedTuple):
    """A bar: whom it compares with, on what, and where a result has the two times."""

    other: str
    what: str
    key: str  # of the line
    theirs: str  # names of numbers of the line
    ours: str


STEPS = (
    Step("torch SparseAdam", "82k uniform ids", "torch-optimizer-uniform", "torch", "SparseAdam"),
    Step("torch SparseAdam", "82k long-tailed ids", "torch-optimizer-zipf", "torch", "SparseAdam"),
    Step("torch EmbeddingBag", "backward and update", "torch-bag-uniform", "torch", "EmbeddingBag"),
    Step("Paddle lazy Adam", "100k sorted rows", "paddle", "Paddle", "element"),
    Step("FBGEMM AdaGrad", "bags, long-tailed ids", "bag-zipf", "FBGEMM AdaGrad", "element"),
    Step("FBGEMM SGD", "bags, long-tailed ids", "bag-zipf", "FBGEMM SGD", "element"),
)


class Bar(NamedTuple):
    """A step with its times, in milliseconds."""

    step: Step
    theirs: float
    ours: float

    @property
    def ratio(self) -> float:
        """How many times faster it is here."""
        return self.theirs / self.ours


def bars(result: dict[str, Any]) -> list[Bar]:
    """Take the times of `STEPS` from what ``bench.json`` holds.

    Raises
    ------
    ValueError
        If the run was a quick one, or one of the lines was not measured.
    """
    if result["quick"]:
        raise ValueError("a quick run has no figures to show, expected one without --quick")
    numbers = {line["key"]: line["numbers"] for line in result["lines"]}
    lacking = [
        f"{step.key}: {name}"
        for step in STEPS
        for name in (step.theirs, step.ours)
        if name not in numbers.get(step.key, {})
    ]
    if lacking:
        raise ValueError(
            f"the result has no {', no '.join(dict.fromkeys(lacking))}: measure with all peers, all lines"
        )
    return [
        Bar(step, numbers[step.key][step.theirs] * 1e3, numbers[step.key][step.ours] * 1e3) for step in STEPS
    ]


def times(ratio: float) -> str:
    """Write a ratio as people say it: "13×", "1.7×"."""
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def milliseconds(ms: float) -> str:
    """Write a time in two or three digits: "79", "5.9"."""
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.1f}"


def span(shown: list[Bar]) -> str:
    """Say what the bars of torch are, from the least to the most."""
    ratios = [bar.ratio for bar in shown if bar.step.theirs == "torch"]
    return f"{min(ratios):.0f} to {max(ratios):.0f}"


def claim(shown: list[Bar]) -> str:
    """Say it in one line."""
    return f"{span(shown)} times faster than torch"


def draw(result: dict[str, Any], machine: str) -> Any:
    """Draw the six bars.

    Parameters
    ----------
    result : dict
        What ``bench.json`` holds.
    machine : str
        Its processor, as people call it.

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = bars(result)
    figure = new_figure(figsize=(11.0, 6.2), dpi=148, facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    ax = figure.subplots()
    places = range(len(shown))
    ax.barh(places, [bar.ratio for bar in shown], height=0.6, color=BAR)
    ax.axvline(1, color=INK, linewidth=1.4)
    for place, bar in zip(places, shown, strict=True):
        there, here = milliseconds(bar.theirs), milliseconds(bar.ours)
        ax.annotate(
            times(bar.ratio), (bar.ratio, place), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=22, fontweight="bold", color=INK,
        )  # fmt: skip
        ax.annotate(
            f"{there} ms → {here} ms", (bar.ratio, place), xytext=(76, 0), textcoords="offset points",
            va="center", fontsize=14, color=FAINT,
        )  # fmt: skip
        for text, up, options in (
            (bar.step.other, 8, {"fontsize": 16, "color": INK, "fontweight": "bold"}),
            (bar.step.what, -11, {"fontsize": 12, "color": FAINT}),
        ):
            ax.annotate(
                text, (0, place), xytext=(-10, up), textcoords="offset points", ha="right", va="center",
                **options,
            )  # fmt: skip
    ax.set_xlim(0, max(bar.ratio for bar in shown) * 1.48)
    ax.set_ylim(len(shown) - 0.45, -0.6)
    ax.set_yticks([])
    ax.set_xticks([1], ["1×"], fontsize=12, color=FAINT)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    figure.suptitle(f"Sparse Adam on a CPU: {claim(shown)}", fontsize=21, fontweight="bold", color=INK)
    figure.supxlabel(caption(result, machine), fontsize=11, color=FAINT)
    return figure


def caption(result: dict[str, Any], machine: str) -> str:
    """Say what was measured, on what and with, in three lines."""
    versions = result["versions"]
    others = ", ".join(
        f"{name} {versions[key].partition('+')[0]}"
        for name, key in (("torch", "torch"), ("FBGEMM", "fbgemm"), ("Paddle", "paddle"))
    )
    return (
        f"A step's time there → here. Tables of 2M x 64, float32, {result['threads']} threads on {machine}\n"
        f"{others}; {result['date']}, {when(result)}\n"
        "Beside torch: nb_sparse_adam.torch. FBGEMM has no Adam on CPUs: SGD and AdaGrad are less work"
    )
