"""Figures as lines of text for a terminal, and as a bar chart."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from typing import Any

from nb_sparse_adam.extras import require

__all__ = ["draw", "headline", "markdown", "text_lines"]

_MET = {True: "met", False: "NOT met", None: ""}
_INDENT = " " * 4
_OF_MEMORY = ("scratch", "torch-memory")  # lines whose numbers are no times


def headline(result: dict[str, Any]) -> str:
    """What was measured on and with, in one sentence."""
    machine, versions = result["machine"], result["versions"]
    memory = f"{machine['memory_gb']:g} GB, " if machine["memory_gb"] else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {memory}"
        f"{result['threads']} threads ({machine['threading_layer']}); "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def text_lines(line: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of a line: what it is, its figures with their targets, and what they were made of."""
    if line["skipped"]:
        yield f"{line['title']}: skipped, {line['skipped']}"
        return
    yield line["title"]
    for figure in line["figures"]:
        value = _seconds(figure["value"]) if figure["unit"] == "s" else f"{figure['value']:.2f}"
        row = f"{figure['label']:<34}{value:>9}  {_target(figure):<10}{_MET[figure['met']]}"
        yield f"{_INDENT}{row.rstrip()}"
    if line["key"] not in _OF_MEMORY:
        times = "; ".join(f"{name} {_seconds(number)}" for name, number in line["numbers"].items())
        yield from textwrap.wrap(times, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _target(figure: dict[str, Any]) -> str:
    for name, sign in (("at_least", ">="), ("at_most", "<=")):
        bound = figure[name]
        if bound is not None:
            return f"{sign} {_seconds(bound, 0) if figure['unit'] == 's' else format(bound, 'g')}"
    return ""


def _seconds(seconds: float, digits: int = 1) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.{digits}f} µs"


def draw(result: dict[str, Any]) -> bytes:
    """Draw the shares of the limit, and how many times faster than others; return a PNG."""
    figures = require("matplotlib.figure", "bench", "drawing the chart")
    limits = _bars(result, lambda label: label.startswith("of the limit"))
    others = _bars(result, lambda label: label.startswith(("torch /", "FBGEMM", "Paddle", "numpy")))
    panels = [panel for panel in (limits, others) if panel]
    heights = [len(panel) + 1.5 for panel in panels] or [1]
    figure = figures.Figure(figsize=(9.0, 1.3 + 0.27 * sum(heights)), dpi=110, layout="constrained")
    axes = figure.subplots(max(len(panels), 1), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, logarithmic=panel is others)
    for ax, panel in zip(axes, panels, strict=False):
        if panel is limits:
            ax.set_title("time of the limit that memory sets / our time", fontsize=10, loc="left")
            ax.set_xlim(0, max(1.05, max(value for _, value, _ in panel) * 1.1))
        else:
            ax.set_title("times faster than the other", fontsize=10, loc="left")
    quick = "QUICK RUN, small tables: not for comparisons\n" if result["quick"] else ""
    machine, versions = result["machine"], result["versions"]
    figure.suptitle(
        f"{quick}nb_sparse_adam {versions['nb_sparse_adam']}, {result['date']}: {machine['processor']}, "
        f"{machine['cores']} cores, {result['threads']} threads, float32",
        fontsize=9,
    )
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _bars(result: dict[str, Any], wanted: Any) -> list[tuple[str, float, float | None]]:
    """Text, value and least value of the figures whose labels are wanted, in order."""
    return [
        (
            f"{line['title']}: {figure['label']}",
            figure["value"],
            figure["at_least"],
        )
        for line in result["lines"]
        for figure in line["figures"]
        if wanted(figure["label"])
    ]


def _draw_panel(ax: Any, bars: list[tuple[str, float, float | None]], logarithmic: bool) -> None:
    places = range(len(bars))
    ax.barh(places, [value for _, value, _ in bars], height=0.62, color="#3b6ea5")
    for place, (_, value, target) in zip(places, bars, strict=True):
        ax.annotate(
            f"{value:.2f}" if value < 3 else f"{value:.1f}",
            (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
        if target is not None:
            ax.plot([target, target], [place - 0.42, place + 0.42], color="#c0392b", linewidth=1.8)
    ax.plot([], [], color="#c0392b", linewidth=1.8, label="target")
    ax.set_yticks(places, [text for text, _, _ in bars], fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", fontsize=8)
    if logarithmic:
        ax.set_xscale("log")
        ax.set_xlim(0.5, max(value for _, value, _ in bars) * 1.6)
        ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if x <= ax.get_xlim()[1]]
        ax.set_xticks(ticks, [f"{x:g}x" for x in ticks])
        ax.minorticks_off()
        ax.axvline(1, color="0.3", linewidth=0.8)


def markdown(result: dict[str, Any]) -> str:
    """Write three tables in Markdown: steps beside other libraries, in torch, and the shares of the limit."""
    in_torch = ["| | torch | here | |", "|---|---|---|---|"]
    others = ['| a step on | beside | ms | `"element"` | | `"row"` | |', "|---|---|---|---|---|---|---|"]
    limits = ["| a step on | share of the limit |", "|---|---|"]
    for line in result["lines"]:
        numbers = line["numbers"]
        pairs = [figure["label"].partition(" / ")[::2] for figure in line["figures"]]
        for other in dict.fromkeys(other for other, ours in pairs if ours in ("element", "row")):
            cells = [line["title"], other, _milliseconds(numbers[other])]
            for ours in ("element", "row"):
                if ours in numbers:
                    cells += [_milliseconds(numbers[ours]), f"{numbers[other] / numbers[ours]:.1f}×"]
                else:
                    cells += ["", ""]
            others.append(f"| {' | '.join(cells)} |")
        for other, ours in pairs:
            if ours in ("SparseAdam", "EmbeddingBag"):
                times = [f"{_milliseconds(numbers[name])} ms" for name in (other, ours)]
                ratio = f"{numbers[other] / numbers[ours]:.1f}×"
                in_torch.append(f"| `{ours}`: {line['title']} | {' | '.join([*times, ratio])} |")
        for figure in line["figures"]:
            if figure["label"].startswith("of the limit"):
                what = figure["label"].removeprefix("of the limit").lstrip(", ")
                limits.append(f"| {line['title']}{', ' if what else ''}{what} | {figure['value']:.2f} |")
    return "\n".join([*others, "", *in_torch, "", *limits]) + "\n"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{3 if seconds < 1e-3 else 1}f}"
