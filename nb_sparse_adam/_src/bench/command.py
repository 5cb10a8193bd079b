# SPDX-License-Identifier: Apache-2.0
"""What ``nb-sparse-adam bench`` does: measure, say what was found, and keep it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.bench import chart, comparison, curves, text
from nb_sparse_adam._src.bench.settings import Settings
from nb_sparse_adam._src.files import prepare_folder, write_whole
from nb_sparse_adam._src.recommender.report import refuse_others
from nb_sparse_adam.errors import MissingExtraError

_PICTURES: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "bench.png": (lambda result: bool(chart.panels(result)) or not curves.there_are(result), chart.draw),
    "recommender.png": (curves.there_are, curves.draw),
}
"""File -> whether it shows something of a result, and who draws it."""
_OURS = rb'\{\n  "schema": '  # how a bench.json begins


def bench(
    *,
    peers: str | None,
    threads: int | None,
    quick: bool,
    only: Sequence[str],
    out: Path | None,
    json_file: str | None,
    interactions: str | None = None,
) -> bool:
    """Measure, print the figures, and write them.

    Parameters
    ----------
    peers, threads, quick, only, interactions
        As the command takes them.
    out : pathlib.Path or None
        The folder of ``bench.json`` and ``bench.png``; None for no folder.
    json_file : str or None
        A further file for the result. ``"-"`` is stdout; what people read then goes to stderr.

    Returns
    -------
    bool
        Whether all that was asked for was measured: False after Ctrl-C.

    Raises
    ------
    OptionError, MissingExtraError, InteractionsError, OSError
        Before anything is measured: if an option cannot be, if a peer that was asked for is not installed, if
        the interactions cannot be read, if a file cannot be written or would replace one that is no result.
    """
    lines = comparison.choose_lines(only, quick)
    settings = Settings(
        comparison.choose_peers(peers),
        comparison.choose_threads(threads),
        quick,
        comparison.choose_interactions(interactions, lines),
    )
    if out is not None:
        prepare_folder(out)
        refuse_others(out, {"bench.json": _OURS, **dict.fromkeys(_PICTURES)})
    target = None if json_file in (None, "-") else Path(str(json_file))
    if target is not None:
        prepare_folder(target.parent)
        refuse_others(target.parent, {target.name: _OURS})

    readable = sys.stderr if json_file == "-" else sys.stdout

    def say(words: str) -> None:
        print(words, file=readable, flush=True)

    result = comparison.describe(settings)
    say(text.headline(result))
    for name, command in result["missing_peers"].items():
        say(f"{name} is not installed: {command}")
    if quick:
        say("a quick run, with small tables: its figures are not to be compared with anything")
    section = None
    result["interrupted"], result["lines"] = False, []
    try:
        for line in comparison.run(lines, settings):
            if line["section"] != section:
                section = line["section"]
                say(f"\n{section}\n{'-' * len(section)}")
            result["lines"].append(line)
            for row in text.text_lines(line):
                say(row)
    except KeyboardInterrupt:
        result["interrupted"] = True
        say(f"interrupted after {len(result['lines'])} of {len(lines)} lines: saving what there is")

    if json_file == "-":  # ASCII: stdout may be of any encoding
        print(_as_json(result, ensure_ascii=True), flush=True)
    if target is not None:
        write_whole(target, _as_json(result).encode())
        say(f"\nsaved: {target.resolve()}")
    if out is not None:
        say(f"\nsaved in {out.resolve()}: {_save(out, result)}")
    return not result["interrupted"]


def _as_json(result: dict[str, Any], ensure_ascii: bool = False) -> str:
    return json.dumps(result, indent=2, allow_nan=False, ensure_ascii=ensure_ascii) + "\n"


def _save(folder: Path, result: dict[str, Any]) -> str:
    """Write the result, and its pictures if they can be drawn; say what was written."""
    written = ["bench.json"]
    write_whole(folder / "bench.json", _as_json(result).encode())
    for name in _PICTURES:
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    for name, (has_some, draw) in _PICTURES.items():
        if has_some(result):
            try:
                content = chart.png(draw(result), result)
            except MissingExtraError as error:
                return f"{', '.join(written)}\nno {name}: {error}"
            write_whole(folder / name, content)
            written.append(name)
    return ", ".join(written)
