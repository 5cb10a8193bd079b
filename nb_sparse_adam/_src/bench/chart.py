# SPDX-License-Identifier: Apache-2.0
"""Figures as bar charts. Only drawing needs matplotlib, so that everything else goes without."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any, NamedTuple

from nb_sparse_adam._src.extras import require

_BAR, _TARGET = "#3b6ea5", "#c0392b"


def new_figure(**options: Any) -> Any:
    """Make an empty `matplotlib.figure.Figure`.

    Raises
    ------
    MissingExtraError
        If matplotlib cannot be imported.
    """
    return require("matplotlib.figure", "bench", "drawing the chart").Figure(**options, layout="constrained")


def checksum(result: dict[str, Any]) -> str:
    """Return the SHA-256 of a result, whatever the file's layout."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def png(figure: Any, result: dict[str, Any]) -> bytes:
    """Save a figure as PNG, with the `checksum` of what it shows as its "Source"."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Source": checksum(result)})
    return content.getvalue()


def draw(result: dict[str, Any]) -> Any:
    """Draw the shares of the limit, and how many times faster than others.

    Parameters
    ----------
    result : dict
        What ``bench.json`` holds.

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = panels(result)
    heights = [len(bars) + 1.5 for _, bars in shown] or [1]
    figure = new_figure(figsize=(10.0, 1.3 + 0.27 * sum(heights)), dpi=110)
    axes = figure.subplots(max(len(shown), 1), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, bars) in zip(axes, shown, strict=False):
        ax.set_title(title, fontsize=10, loc="left")
        _draw_panel(ax, bars, logarithmic=title == _FASTER)
    quick = "QUICK RUN, small tables: not for comparisons\n" if result["quick"] else ""
    machine, version = result["machine"], result["versions"]["nb_sparse_adam"]
    commit = f" ({result['commit']})" if result["commit"] else ""
    figure.suptitle(
        f"{quick}nb_sparse_adam {version}{commit}, {result['date']}: {machine['processor']}, "
        f"{machine['cores']} cores, {result['threads']} threads, float32",
        fontsize=9,
    )
    return figure


class Bar(NamedTuple):
    """A figure as a bar, with its target if it is judged by one."""

    text: str
    value: float
    target: float | None
    missed: bool


_SHARE = "time of the limit that memory sets / our time"
_FASTER = "times faster than the other"
_PANELS = {_SHARE: ("of the limit",), _FASTER: ("torch /", "FBGEMM", "Paddle", "numpy")}


def panels(result: dict[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Return the panels that have bars, each with its title."""
    found = []
    for title, beginnings in _PANELS.items():
        bars = [
            Bar(
                f"{line['title']}: {figure['label']}",
                figure["value"],
                None if figure["met"] is None else figure["at_least"],
                figure["met"] is False,
            )
            for line in result["lines"]
            for figure in line["figures"]
            if figure["label"].startswith(beginnings)
        ]
        if bars:
            found.append((title, bars))
    return found


def _draw_panel(ax: Any, bars: list[Bar], logarithmic: bool) -> None:
    places = range(len(bars))
    ax.barh(places, [bar.value for bar in bars], height=0.62, color=_BAR)
    for place, bar in zip(places, bars, strict=True):
        # In a column beside the bars: at their ends, numbers would lie on the lines of the targets.
        ax.text(
            1.012, place, f"{bar.value:.2f}" if bar.value < 3 else f"{bar.value:.1f}",
            transform=ax.get_yaxis_transform(), va="center", fontsize=8,
            color=_TARGET if bar.missed else "black",
        )  # fmt: skip
        if bar.target is not None:
            ax.plot([bar.target, bar.target], [place - 0.42, place + 0.42], color=_TARGET, linewidth=1.8)
    ax.set_yticks(places, [bar.text for bar in bars], fontsize=8)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    targets = [bar.target for bar in bars if bar.target is not None]
    if targets:
        ax.plot([], [], color=_TARGET, linewidth=1.8, label="target; red: missed")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False, fontsize=8)
    rightmost = max(1.0, *(bar.value for bar in bars), *targets)
    if not logarithmic:
        ax.set_xlim(0, rightmost * 1.03)
        ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        return
    ax.set_xscale("log")
    ax.set_xlim(0.5, rightmost * 1.1)
    ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if x <= ax.get_xlim()[1]]
    ax.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    ax.minorticks_off()
    ax.axvline(1, color="0.3", linewidth=0.8)
