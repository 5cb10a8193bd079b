# SPDX-License-Identifier: Apache-2.0
"""Interactions in text: delimited, or LightGCN adjacency lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np

from nb_sparse_adam._src.recommender.codes import Codes, Ids, Pairs, distinct_pairs
from nb_sparse_adam._src.recommender.layout import SEPARATORS, Layout, find_layout
from nb_sparse_adam._src.recommender.lines import CARRIAGE_RETURN, Lines, blocks_of, decoded, records_of
from nb_sparse_adam.errors import InteractionsError


def read_text(name: str, shown: str, stream: Any, file_format: str, users: Ids, items: Ids) -> Pairs:
    """Read a stream; users and items are given codes, those that have none yet.

    Parameters
    ----------
    name, shown : str
        What errors, and the description, call the file.
    stream : binary stream
        That can be peeked into.
    file_format : {"auto", "delimited", "adjacency"}
    users, items : Ids
    """
    with decoded(name, stream) as decoder:
        blocks = blocks_of(name, decoder)
        number, text = next((block for block in blocks if block[1].strip()), (0, ""))
        if not number:
            raise InteractionsError(f"{name}: is empty; expected a user and an item on each line")
        layout = find_layout(name, number, text, file_format)
        below = text.split("\n")[layout.begin - number :]
        blocks, notes = chain([(layout.begin, "\n".join(below))] if below else [], blocks), []
        if layout.format == "adjacency":
            what = f"{shown}, adjacency lines (user item item ...)"
            pairs = distinct_pairs(_adjacency(name, blocks, users, items))
        else:
            header = "with header" if layout.header else "no header"
            what = f"{shown}, delimited text ({SEPARATORS[layout.separator]}, {header})"
            if (layout.user_column, layout.item_column) != (0, 1):
                user, item = layout.user_column + 1, layout.item_column + 1
                notes.append(f"users in column {user} and items in column {item} by their names")
            pairs = distinct_pairs(_delimited(name, blocks, layout, users, items, notes))
    if layout.comments:
        notes.append(f"comments above: {layout.comments:,} lines")
    return Pairs(*pairs, ", ".join([what, *notes]))


def _adjacency(name: str, blocks: Iterable[Lines], users: Ids, items: Ids) -> Iterator[tuple[Codes, Codes]]:
    for number, text in blocks:
        if CARRIAGE_RETURN in text:
            raise _stray_line_end(name, number + text.count("\n", 0, text.index(CARRIAGE_RETURN)))
        rows = [fields for fields in map(str.split, text.split("\n")) if len(fields) > 1]
        who = users.codes([fields[0] for fields in rows])
        what = items.codes([item for fields in rows for item in fields[1:]])
        yield np.repeat(who, [len(fields) - 1 for fields in rows]), what


def _delimited(
    name: str, blocks: Iterator[Lines], layout: Layout, users: Ids, items: Ids, notes: list[str]
) -> Iterator[tuple[Codes, Codes]]:
    wanted = layout.user_column, layout.item_column
    inside, where = 0, 0
    for numbers, rows in records_of(name, blocks, layout.separator, max(wanted) + 1):
        who, what = ([fields[c].strip() if len(fields) > c else "" for fields in rows] for c in wanted)
        pairs = "\0".join(chain(who, what))
        if "\n" in pairs or CARRIAGE_RETURN in pairs:
            raise next(
                _stray_line_end(name, number)
                for number, user, item in zip(numbers, who, what, strict=False)
                if "\n" in user + item or CARRIAGE_RETURN in user + item
            )
        if "" in who or "" in what:
            for number, fields, user, item in zip(numbers, rows, who, what, strict=False):
                if bool(user) != bool(item):
                    raise _missing_field(name, number, layout.separator, fields)
            who, what = list(filter(None, who)), list(filter(None, what))  # lines with neither are blank
        between = numbers[-1] - numbers[0] - len(rows)
        if between and not inside:
            where = next(number for number, below in pairwise(numbers) if below > number + 1)
        inside += between
        yield users.codes(who), items.codes(what)
    if inside:
        notes.append(f"line ends within quotes: {inside:,} (the first in line {where})")


def _missing_field(name: str, number: int, separator: str, fields: list[str]) -> InteractionsError:
    return InteractionsError(
        f"{name}, line {number}: expected a user and an item separated by {SEPARATORS[separator]}, got "
        f"{separator.join(fields)[:60]!r}; mend or remove the line (or choose another --format)"
    )


def _stray_line_end(name: str, number: int) -> InteractionsError:
    return InteractionsError(
        f"{name}, line {number}: has a line end within an id; expected line ends of one kind, and quotes in "
        f"pairs"
    )
