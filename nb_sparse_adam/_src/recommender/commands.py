# SPDX-License-Identifier: Apache-2.0
"""What is asked of a run on the command line: ``recommend``, ``similar``, ``evaluate`` and ``export``."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.files import write_whole
from nb_sparse_adam._src.recommender.arguments import add_reading, count, reading_of
from nb_sparse_adam._src.recommender.columns import FORMATS
from nb_sparse_adam._src.recommender.factorization import MatrixFactorization
from nb_sparse_adam._src.recommender.ids import Ids
from nb_sparse_adam._src.recommender.index import KINDS
from nb_sparse_adam._src.recommender.page import titles_of
from nb_sparse_adam._src.recommender.reading import read_interactions
from nb_sparse_adam.errors import InteractionsError


def add_commands(commands: Any) -> None:
    """Add the commands to argparse's subparsers."""
    recommend = _command(
        commands, "recommend", _recommend, "what users should see next",
        "Print the items with the highest scores for each user, without those that the user had.",
    )  # fmt: skip
    recommend.add_argument("--user", nargs="+", required=True, metavar="ID", help="users, as in training")
    recommend.add_argument("--item", nargs="+", metavar="ID", help="candidates (default: all items)")
    recommend.add_argument("--include-seen", action="store_true", help="items that a user had, too")
    similar = _command(
        commands, "similar", _similar, "items that are alike",
        "Print the items nearest to each item, by the cosine of their vectors.",
    )  # fmt: skip
    similar.add_argument("--item", nargs="+", required=True, metavar="ID", help="items, as in training")
    for command in (recommend, similar):
        command.add_argument("--top", type=count, default=10, metavar="N", help="how many (default: 10)")
        command.add_argument("--json", action="store_true", help="a JSON object on a line for each")
        command.add_argument(
            "--titles", metavar="FILE", help="CSV with the ids of items and their titles, to show them, too"
        )
    evaluate = _command(
        commands, "evaluate", _evaluate, "how well a run predicts interactions",
        "Rank all items that each user has not had, and compare with TEST: recall, NDCG, MAP and coverage.",
    )  # fmt: skip
    evaluate.add_argument("test", metavar="TEST", help="interactions, as `train` reads them")
    add_reading(evaluate.add_argument_group("how TEST is read"))
    evaluate.add_argument("--format", choices=FORMATS, default="auto", help="of TEST (default: auto)")
    evaluate.add_argument("--top", type=count, default=20, metavar="N", help="k (default: 20)")
    evaluate.add_argument("--json", action="store_true", help="a JSON object")
    export = _command(
        commands, "export", _export, "vectors for other programs",
        "Write the items into an index of another library, whose recall is printed, or all vectors into "
        "Parquet files.",
    )  # fmt: skip
    export.add_argument("--to", required=True, choices=[*KINDS, "parquet"], help="what to write")
    export.add_argument("--out", type=Path, metavar="DIR", help="where (default: RUN)")


def _command(commands: Any, name: str, run: Any, text: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description)
    parser.add_argument("folder", metavar="RUN", help="the folder of a run, as `train` has left it")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _as_given(ids: Any, names: Sequence[str], option: str) -> list[Any]:
    """Return ids from the command line as the training had them: integers if those were."""
    if ids.dtype.kind != "i":
        return list(names)
    try:
        return [int(name) for name in names]
    except ValueError:
        raise InteractionsError(f"{option}: got {list(names)}, but ids of this run are integers") from None


def _print_lists(
    arguments: argparse.Namespace,
    model: MatrixFactorization,
    asked: list[Any],
    found: tuple[Any, Any],
    kinds: tuple[str, str],
) -> None:
    """Print what was found for each id, best first; `kinds` says what was asked for and what ranks them."""
    kind, value = kinds
    titles = None if arguments.titles is None else titles_of(arguments.titles, model.item_ids_)

    def named(item: Any) -> dict[str, Any]:
        return {"item": item} if titles is None else {"item": item, "title": titles.get(str(item))}

    def shown(item: Any) -> str:
        title = (titles or {}).get(str(item))
        return str(item) if title is None else f"{item}  {' '.join(title.split())}"

    for one, ids, numbers in zip(asked, *(array.tolist() for array in found), strict=True):
        kept = [(i, x) for i, x in zip(ids, numbers, strict=True) if x > -np.inf]
        head = {kind: one} if kind == "user" else named(one)
        if arguments.json:
            print(
                json.dumps({**head, "items": [{**named(i), value: x} for i, x in kept]}, ensure_ascii=False)
            )
            continue
        title = f"{kind} {one if kind == 'user' else shown(one)}:"
        print(title if kept else f"{title} nothing is left")
        for place, (i, x) in enumerate(kept, 1):
            print(f"{place:4}  {x:10.4f}  {shown(i)}")


def _recommend(arguments: argparse.Namespace) -> int:
    model = MatrixFactorization.load(arguments.folder)
    users = _as_given(model.user_ids_, arguments.user, "--user")
    items = arguments.item and _as_given(model.item_ids_, arguments.item, "--item")
    found = model.recommend(users, arguments.top, exclude_seen=not arguments.include_seen, items=items)
    _print_lists(arguments, model, users, found, ("user", "score"))
    return 0


def _similar(arguments: argparse.Namespace) -> int:
    model = MatrixFactorization.load(arguments.folder)
    items = _as_given(model.item_ids_, arguments.item, "--item")
    _print_lists(arguments, model, items, model.similar_items(items, arguments.top), ("item", "cosine"))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    model = MatrixFactorization.load(arguments.folder)
    test = read_interactions(arguments.test, arguments.format, **reading_of(arguments))
    for name, ids, ours in (
        ("users", test.user_ids, model.user_ids_),
        ("items", test.item_ids, model.item_ids_),
    ):
        if ids.dtype != ours.dtype:
            raise InteractionsError(
                f"{arguments.test}: ids of {name} are {_kind(ids)}, those of the run are {_kind(ours)}"
            )
    quality = model.evaluate(test, arguments.top)
    if arguments.json:
        print(json.dumps({name: None if x != x else x for name, x in quality.items()}))
        return 0
    print(f"{test.description}: {len(test.pairs):,} interactions")
    for name, ids, ours in (
        ("users", test.user_ids, model.user_ids_),
        ("items", test.item_ids, model.item_ids_),
    ):
        known = int((Ids(ours).find(ids, name) >= 0).sum())
        print(f"{known:,} of {len(ids):,} {name} were there in training")
    for name, x in quality.items():
        print(f"{name:12} {x:,}" if name == "users" else f"{name:12} {x:.4f}")
    return 0


def _kind(ids: Any) -> str:
    return "integers" if ids.dtype.kind == "i" else "strings"


def _export(arguments: argparse.Namespace) -> int:
    model = MatrixFactorization.load(arguments.folder)
    out = Path(arguments.folder) if arguments.out is None else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.to == "parquet":
        pl = require("polars", "train", "writing Parquet")
        for name, ids, factors in (
            ("users", model.user_ids_, model.user_factors_),
            ("items", model.item_ids_, model.item_factors_),
        ):
            content = io.BytesIO()
            pl.DataFrame({"id": ids.tolist(), "vector": np.array(factors)}).write_parquet(content)
            write_whole(out / f"{name}.parquet", content.getvalue())
            print(f"{out / f'{name}.parquet'}: {len(ids):,} vectors of {factors.shape[1]}")
        return 0
    index = model.to_index(arguments.to)
    path = out / f"items.{arguments.to}"
    index.save(path)
    print(
        f"{path}: {len(index.item_ids):,} items; recall@10 against exact search {index.recall:.4f}\n"
        f"vectors have one dimension more, 0 in queries: by distance, the nearest is the highest inner "
        f"product; keys are the rows of items.csv"
    )
    return 0
