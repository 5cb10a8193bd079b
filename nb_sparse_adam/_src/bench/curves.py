# SPDX-License-Identifier: Apache-2.0
"""Recall against seconds of training, a panel for each set of interactions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nb_sparse_adam._src.bench.chart import new_figure

_STYLES = {
    "softmax": ("#1f5a96", "o", "this library, softmax"),
    "in a hurry": ("#16324f", "X", "this library, in a hurry"),
    "as by default": ("#3fa7a0", "P", "this library, as by default"),
    "BPR": ("#6fa8dc", "s", "this library, BPR"),
    "implicit ALS": ("#c0392b", "D", "implicit, ALS"),
    "implicit BPR": ("#e59866", "v", "implicit, BPR"),
    "LightFM WARP": ("#6c7a89", "^", "LightFM, WARP"),
}


def there_are(result: dict[str, Any]) -> bool:
    """Say whether a result has curves."""
    return bool(_lines(result))


def _lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in result["lines"] if line.get("curves")]


def draw(result: dict[str, Any]) -> Any:
    """Draw the curves of a result, means over its seeds, and the range of their recall.

    Parameters
    ----------
    result : dict
        What ``bench.json`` holds.

    Returns
    -------
    matplotlib.figure.Figure
    """
    lines = _lines(result)
    figure = new_figure(figsize=(max(1.3, len(lines)) * 5.6, 5.4), dpi=120, facecolor="white")
    axes = figure.subplots(1, max(1, len(lines)), squeeze=False)[0]
    for ax, line in zip(axes, lines, strict=False):
        for name, curve in line["curves"].items():
            _draw_curve(ax, name, curve)
        ax.set_title(line["title"], fontsize=10, loc="left")
        ax.set_xscale("log")
        ax.set_xlabel("seconds of training", fontsize=9)
        ax.set_ylim(bottom=0)
        _set_ticks(ax)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    axes[0].set_ylabel("recall@20 of what was held out", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(_caption(result), fontsize=9)
    return figure


def _set_ticks(ax: Any) -> None:
    """Have ticks within the limits only: matplotlib's reach beyond them, where their texts lie on others."""
    (left, right), (_, top) = ax.get_xlim(), ax.get_ylim()
    decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    seconds = [step * 10.0**decade for decade in decades for step in (1, 3)]
    seconds = [second for second in seconds if left <= second <= right]
    ax.set_xticks(seconds, [f"{second:g}" for second in seconds])
    ax.minorticks_off()
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])


def _draw_curve(ax: Any, name: str, curve: dict[str, list[list[float]]]) -> None:
    color, marker, label = _STYLES.get(name, ("black", "x", name))
    seconds, recall = np.array(curve["seconds"]), np.array(curve["recall"])
    where = seconds.mean(axis=0)
    if len(recall) > 1:
        ax.fill_between(where, recall.min(axis=0), recall.max(axis=0), color=color, alpha=0.18, linewidth=0)
    ax.plot(where, recall.mean(axis=0), color=color, marker=marker, markersize=4, linewidth=1.6, label=label)


def _caption(result: dict[str, Any]) -> str:
    """Say what was measured, on what and with."""
    machine, versions = result["machine"], result["versions"]
    curves = [curve for line in _lines(result) for curve in line["curves"].values()]
    seeds = max(len(curve["recall"]) for curve in curves)
    commit = f" ({result['commit']})" if result["commit"] else ""
    peers = "".join(f", {name} {versions[name]}" for name in ("implicit", "lightfm") if name in versions)
    quick = "QUICK RUN, few interactions and epochs: not for comparisons\n" if result["quick"] else ""
    return (
        f"{quick}nb_sparse_adam {versions['nb_sparse_adam']}{commit}{peers}, {result['date']}\n"
        f"{machine['processor']}, {result['threads']} threads; vectors of 64, mean and range of {seeds} "
        f"seed{'s' * (seeds != 1)};\ntraining alone, without evaluation and compilation"
    )
