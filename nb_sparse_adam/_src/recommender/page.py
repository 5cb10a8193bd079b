# SPDX-License-Identifier: Apache-2.0
"""``recommendations.html``: what a few users had, and what they would see next, for people to look at."""

from __future__ import annotations

import csv
import html
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.recommender.columns import role
from nb_sparse_adam._src.recommender.factorization import MatrixFactorization
from nb_sparse_adam.errors import InteractionsError

_USERS, _ITEMS = 6, 10

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Recommendations</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; color: #222; }
  body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
  section { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; margin: 1.5rem 0; }
  h2 { grid-column: 1 / -1; font-size: 1.05rem; border-bottom: 1px solid #ccc; margin: 0 0 .5rem; }
  h3 { font-size: .85rem; color: #666; margin: 0; font-weight: normal; }
  ol, ul { margin: .2rem 0; padding-left: 1.5rem; }
  @media (max-width: 40rem) { section { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<h1>Recommendations</h1>
<p>%s</p>
%s
</body>
</html>
"""


def read_titles(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what items are called: a CSV with a column of their ids, and one whose name has "title" or "name".

    Parameters
    ----------
    path : path
        UTF-8, with a header. Without such names it is the first column and the second.

    Returns
    -------
    dict
        Id, as it stands in the file -> title.

    Raises
    ------
    InteractionsError
        If there are not two columns.
    OSError
        If it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InteractionsError(f"{os.fspath(path)}: is no CSV in UTF-8: {error}") from error
    if not rows or len(rows[0]) < 2:
        raise InteractionsError(f"{os.fspath(path)}: expected a header, and columns of ids and of titles")
    names = rows[0]
    called = [i for i, name in enumerate(names) if any(word in name.casefold() for word in ("title", "name"))]
    title = called[0] if called else 1
    ids = [i for i, name in enumerate(names) if role(name) == "item" and i != title]
    key = ids[0] if ids else (0 if title else 1)
    return {row[key]: row[title] for row in rows[1:] if len(row) > max(key, title)}


def titles_of(path: str | os.PathLike[str], item_ids: npt.NDArray[Any]) -> dict[str, str]:
    """Read titles as `read_titles` does, of these items; refuse a file that has none of them.

    Parameters
    ----------
    path : path
    item_ids : array, shape (n_items,)

    Raises
    ------
    InteractionsError, OSError
        As `read_titles` does; also if it has no title of any of the items.
    """
    titles = read_titles(path)
    if not any(str(item) in titles for item in item_ids):
        theirs = f"such as {next(iter(titles))!r}" if titles else "of which it has none"
        raise InteractionsError(
            f"{os.fspath(path)}: has titles of none of the {len(item_ids):,} items of the run, such as "
            f"{str(item_ids[0])!r}; its ids are in the column with a name like item_id or movieId, else the "
            f"first, {theirs}"
        )
    return titles


def recommendations_page(
    model: MatrixFactorization, description: str, titles: dict[str, str] | None = None
) -> bytes:
    """Write the page: for some users, from who has most to who has least, what they had and would see next.

    Parameters
    ----------
    model : MatrixFactorization
        With the interactions that it was trained on.
    description : str
        What it was trained on.
    titles : dict, optional
        Id of an item, as text -> what it is called.

    Returns
    -------
    bytes
        HTML in UTF-8, with nothing to load from elsewhere.
    """
    trained = model._trained
    assert trained is not None
    counts = trained.counts()
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    users = order[np.unique(np.linspace(0, len(order) - 1, _USERS).astype(np.int64))]
    titles = titles or {}

    def named(item: Any) -> str:
        return html.escape(titles.get(str(item), str(item)))

    sections = []
    for user in users:
        had = model.item_ids_[trained.indices[trained.indptr[user] : trained.indptr[user + 1]]]
        ids, scores = model.recommend(model.user_ids_[[user]], k=_ITEMS)
        shown = "".join(f"<li>{named(item)}</li>" for item in had[:_ITEMS])
        more = f"<li>… and {len(had) - _ITEMS:,} more</li>" if len(had) > _ITEMS else ""
        found = [item for item, score in zip(ids[0], scores[0], strict=True) if score > -np.inf]
        next_ = "".join(f"<li>{named(item)}</li>" for item in found) or "<li>nothing is left</li>"
        sections.append(
            f"<section><h2>User {html.escape(str(model.user_ids_[user]))}</h2>\n"
            f"<div><h3>had {len(had):,}, of which</h3><ul>{shown}{more}</ul></div>\n"
            f"<div><h3>would see next</h3><ol>{next_}</ol></div></section>"
        )
    return (_PAGE % (html.escape(description), "\n".join(sections))).encode("utf-8", "replace")
