# SPDX-License-Identifier: Apache-2.0
"""Figures as lines of text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

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
    """Yield the rows of a line: what it is, its figures with their targets, and what they were made of.

    Parameters
    ----------
    line : dict
        As `comparison.run` yields it.
    """
    if line["skipped"]:
        yield f"{line['title']}: n/a, {line['skipped']}"
        return
    yield line["title"]
    for figure in line["figures"]:
        value = _seconds(figure["value"]) if figure["unit"] == "s" else f"{figure['value']:.2f}"
        row = f"{figure['label']:<34}{value:>9}  {_target(figure):<10}{_MET[figure['met']]}"
        yield f"{_INDENT}{row.rstrip()}"
    yield from _missing(line["missing"])
    if line["key"] not in _OF_MEMORY:
        times = "; ".join(f"{name} {_number(name, number)}" for name, number in line["numbers"].items())
        yield from _wrapped(times)


def _missing(reasons: dict[str, str]) -> Iterator[str]:
    """Yield a row for each reason, which several figures may share."""
    labels: dict[str, list[str]] = {}
    for label, reason in reasons.items():
        labels.setdefault(reason, []).append(label)
    for reason, alike in labels.items():
        yield from _wrapped(f"n/a, {reason}: {', '.join(alike)}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)


def _target(figure: dict[str, Any]) -> str:
    """Write the target of a figure; nothing in a quick run, which is not judged."""
    if figure["met"] is None:
        return ""
    for name, sign in (("at_least", ">="), ("at_most", "<=")):
        bound = figure[name]
        if bound is not None:
            return f"{sign} {_seconds(bound, 0) if figure['unit'] == 's' else format(bound, 'g')}"
    return ""


def _number(name: str, number: float) -> str:
    """Write a number of a line: a time, unless its name says that it is a part of something, or bytes."""
    if name.startswith("bytes "):
        return f"{number:.2f}"
    return f"{number:.4f}" if ", recall@" in name else _seconds(number)


def _seconds(seconds: float, digits: int = 1) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.{digits}f} µs" if seconds >= 1e-6 else f"{seconds * 1e9:.{digits}f} ns"
