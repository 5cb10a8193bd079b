# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves behind: vectors, id maps, metrics, history, and a chart of them.

Every file is written beside its place and then moved there, so that none is ever seen half written.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.files import prepare_folder, write_whole
from nb_sparse_adam._src.info import versions
from nb_sparse_adam._src.recommender.ranking import Quality
from nb_sparse_adam.recommender import BPRModel

FILES = {
    "embeddings.safetensors": 'the vectors: "user" and "item", float32',
    "users.csv": "which id each row of user has",
    "items.csv": "the same for item",
    "manifest.json": "all of it, with state and interactions, for recommend, evaluate, --resume",
    "metrics.json": "quality, times, options, versions",
    "history.csv": "loss, speed and quality by epoch",
    "training.png": "the history as a chart",
    "search.csv": "the settings that were tried, best first",
    "recommendations.html": "what a few users had, and would see next",
}
"""Name -> content of the files of a run."""

LOSSES = {"bpr": "BPR", "softmax": "softmax"}

_BEGINNINGS = {
    "embeddings.safetensors": rb'.{8}\{"(item|user)":\{"dtype":"F32"',
    "users.csv": b"row,id\n",
    "items.csv": b"row,id\n",
    "manifest.json": rb'\{\n "format": "nb_sparse_adam checkpoint"',
    "metrics.json": rb'\{\n  "recall@\d+": ',
    "history.csv": b"epoch,loss,seconds,interactions_per_second,",
    "training.png": None,
    "search.csv": rb"trial,recall@\d+,ndcg@\d+,",
    "recommendations.html": rb'<!doctype html>\n<html lang="en">\n<head>\n',
}


def prepare_output(folder: str | os.PathLike[str]) -> Path:
    """Create the folder of a run and check that all that is needed to write its files is there.

    Parameters
    ----------
    folder : path
        Created if need be. Files of an earlier run in it are replaced one by one, files of others are kept:
        if one has a name of `FILES`, the folder is refused.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    MissingExtraError
        If safetensors or matplotlib is not installed.
    OSError
        If the folder cannot be created or written to, or a file in it is in the way.
    """
    require("safetensors.numpy", "train", "saving the vectors")
    require("matplotlib.figure", "train", "drawing the chart")
    path = prepare_folder(folder)
    refuse_others(path, _BEGINNINGS)
    return path


def refuse_others(folder: Path, beginnings: Mapping[str, bytes | None]) -> None:
    """Refuse a folder where results would be written over what is not a result.

    Parameters
    ----------
    folder : pathlib.Path
        Where the results are to be written.
    beginnings : mapping
        Name of each file -> regular expression for its first bytes. A file with None, of which the first
        bytes tell nothing, counts as a result if the JSON file that is written before it is there.

    Raises
    ------
    FileExistsError
        If there is something else by one of the names. An empty file is not in the way.
    """
    for name, beginning in beginnings.items():
        path = folder / name
        if not path.exists():
            continue
        if beginning is None:
            ours = any((folder / other).exists() for other in beginnings if other.endswith(".json"))
        elif path.is_file():
            with path.open("rb") as file:
                start = file.read(200)
            ours = not start or re.match(beginning, start, re.DOTALL) is not None
        else:
            ours = False
        if not ours:
            raise FileExistsError(
                f"{path}: is in the way: it is not the result of an earlier run, and would be written over; "
                f"move it, or choose another folder with --out"
            )


def save_model(folder: Path, model: BPRModel) -> None:
    """Write ``embeddings.safetensors``, ``users.csv`` and ``items.csv``.

    Ids are written as they came, for programs look them up. To a spreadsheet, an id that begins with ``=``,
    ``+``, ``-`` or ``@`` is a formula: import the column as text if you do not trust where ids come from.

    Parameters
    ----------
    folder : pathlib.Path
        As `prepare` returns it.
    model : BPRModel
        Its tables and the ids of their rows are saved.
    """
    safetensors = require("safetensors.numpy", "train", "saving the vectors")
    tables = {"user": model.user_table, "item": model.item_table}
    write_whole(folder / "embeddings.safetensors", safetensors.save(tables))
    for name, ids in (("user", model.split.user_ids), ("item", model.split.item_ids)):
        _write_csv(folder / f"{name}s.csv", ["row", "id"], list(enumerate(ids.tolist())))


def save_metrics(
    folder: Path,
    model: BPRModel,
    quality: Quality,
    popularity: Quality,
    data: dict[str, Any],
    interrupted: bool = False,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``history.csv`` and ``training.png``.

    Parameters
    ----------
    folder : pathlib.Path
        As `prepare` returns it.
    model : BPRModel
        Its history is saved.
    quality : Quality
        That of the tables as they are.
    popularity : Quality
        That of the popularity ranking.
    data : dict
        What the model was trained on, for people.
    interrupted : bool
        Whether the training was cut short.

    Returns
    -------
    dict
        What ``metrics.json`` holds: plain JSON, ``None`` for what is not known.
    """
    history, top = model.history, model.options.top
    metrics: dict[str, Any] = {
        f"recall@{top}": _number(quality.recall),
        f"ndcg@{top}": _number(quality.ndcg),
        "popularity": {
            f"recall@{top}": _number(popularity.recall),
            f"ndcg@{top}": _number(popularity.ndcg),
        },
        "users_evaluated": popularity.users,
        "loss": _number(history[model.n_epochs - 1].loss if history else None),
        "epochs": model.n_epochs,
        "seconds_per_epoch": _number(median(record.seconds for record in history) if history else None),
        "interrupted": interrupted,
        "data": data,
        "options": asdict(model.options),
        "versions": versions(),
    }
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False)
    write_whole(folder / "metrics.json", (text + "\n").encode())
    _write_csv(
        folder / "history.csv",
        ["epoch", "loss", "seconds", "interactions_per_second", f"recall@{top}", f"ndcg@{top}"],
        [
            [
                record.epoch,
                record.loss,
                record.seconds,
                round(record.interactions / record.seconds),
                _number(record.quality.recall if record.quality else None),
                _number(record.quality.ndcg if record.quality else None),
            ]
            for record in history
        ],
    )
    stopped = quality if interrupted and not data.get("validation") else None
    write_whole(folder / "training.png", _chart(model, popularity, data, stopped))
    return metrics


def save_search(folder: Path, table: tuple[list[str], list[list[Any]]] | None) -> None:
    """Write ``search.csv``, header and rows, or remove an earlier run's."""
    if table is None:
        (folder / "search.csv").unlink(missing_ok=True)
    else:
        _write_csv(folder / "search.csv", *table)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _chart(model: BPRModel, popularity: Quality, data: dict[str, Any], stopped: Quality | None) -> bytes:
    """Draw loss and recall over the epochs, one above the other; return a PNG.

    ``stopped`` is the quality where training was interrupted.
    """
    title = str(data.get("description", ""))
    # The object interface: pyplot would keep the figure, and choose a backend for the whole process.
    figures = require("matplotlib.figure", "train", "drawing the chart")
    ticker = require("matplotlib.ticker", "train", "drawing the chart")
    history, top = model.history, model.options.top
    figure = figures.Figure(figsize=(7.0, 6.0), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    title = title if len(title) <= 80 else title[:79] + "…"
    figure.suptitle(title, fontsize=10, parse_math=False)  # names of files may have dollars in them
    marker = "o" if len(history) <= 50 else None
    above.plot([r.epoch for r in history], [r.loss for r in history], marker=marker, markersize=3.5)
    above.set_ylabel(f"training loss ({LOSSES[model.options.loss]})")
    evaluated = [(float(r.epoch), r.quality.recall) for r in history if r.quality and r.quality.users]
    if stopped is not None and stopped.users:
        batches = -(-model.interactions // model.options.batch_size)
        evaluated.append((len(history) + model.unfinished.batches / batches, stopped.recall))
    validated = bool(data.get("validation"))
    if evaluated:
        below.plot(*zip(*evaluated, strict=True), marker="o", markersize=4, label="this model")
    if popularity.users and not validated:  # it is of the test
        below.axhline(popularity.recall, linestyle="--", color="0.35", label="popularity ranking")
    below.set_ylabel(f"recall@{top} on {'the validation' if validated else 'held-out items'}")
    below.set_xlabel("epoch")
    below.set_ylim(bottom=0)
    epochs = {math.ceil(x) for x, _ in evaluated} | {r.epoch for r in history}
    one = ticker.FixedLocator(list(epochs)) if len(epochs) == 1 else ticker.MaxNLocator(integer=True)
    below.xaxis.set_major_locator(one)
    if below.get_legend_handles_labels()[0]:
        below.legend(loc="lower right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _write_csv(path: Path, header: list[str], rows: list[Any]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())
