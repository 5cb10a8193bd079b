# SPDX-License-Identifier: Apache-2.0
"""Interactions in text: delimited, LightGCN adjacency lines, or JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress, pairwise
from typing import Any

import numpy as np

from nb_sparse_adam._src.recommender.codes import Found, Ids, Pairs, distinct_pairs
from nb_sparse_adam._src.recommender.columns import SEPARATORS, ReadOptions, what_was_taken
from nb_sparse_adam._src.recommender.further import Further
from nb_sparse_adam._src.recommender.json_lines import JsonLines
from nb_sparse_adam._src.recommender.layout import Layout, ask_for_the_header, find_layout, header_from_ids
from nb_sparse_adam._src.recommender.lines import CARRIAGE_RETURN, Lines, blocks_of, decoded, records_of
from nb_sparse_adam.errors import InteractionsError


def read_text(name: str, label: str, stream: Any, options: ReadOptions, users: Ids, items: Ids) -> Pairs:
    """Read a stream; users and items are given codes, those that have none yet.

    Parameters
    ----------
    name, label : str
        What errors, and the description, call the file.
    stream : binary stream
        That can be peeked into.
    options : ReadOptions
    users, items : Ids
    """
    with decoded(name, stream) as decoder:
        blocks = blocks_of(name, decoder)
        number, text = next((block for block in blocks if block[1].strip()), (0, ""))
        if not number:
            raise InteractionsError(f"{name}: is empty; expected a user and an item on each line")
        layout = find_layout(name, number, text, options)
        options.refuse_what_has_no_meaning(layout.format, name)
        below = text.split("\n")[layout.begin - number :]
        blocks = chain([(layout.begin, "\n".join(below))] if below else [], blocks)
        further, notes = Further(name, options), list[str]()
        if layout.format == "adjacency":
            what = "adjacency lines (user item item ...)"
            pairs, read = distinct_pairs(_adjacency(name, blocks, users, items))
        elif layout.format == "json":
            lines = JsonLines(name, blocks, options, further)
            pairs, read = distinct_pairs(lines.pairs(users, items))
            what = f"JSON lines ({lines.taken})"
        else:
            table = _Delimited(name, layout, further)
            pairs, read = distinct_pairs(table.pairs(blocks, users, items))
            pairs, read = table.with_first_line(pairs, read, users, items)
            what, notes = table.description(), table.notes
    if layout.comments:
        notes.append(f"comments above: {layout.comments:,} lines")
    return Pairs(pairs, read, ", ".join([f"{label}, {what}", *notes, *further.note()]))


def _adjacency(name: str, blocks: Iterable[Lines], users: Ids, items: Ids) -> Iterator[Found]:
    for number, text in blocks:
        if CARRIAGE_RETURN in text:
            raise _stray_line_end(name, number + text.count("\n", 0, text.index(CARRIAGE_RETURN)))
        rows = [fields for fields in map(str.split, text.split("\n")) if len(fields) > 1]
        who = users.codes([fields[0] for fields in rows])
        what = items.codes([item for fields in rows for item in fields[1:]])
        yield Found(np.repeat(who, [len(fields) - 1 for fields in rows]), what)


class _Delimited:
    """Delimited text, and what was found out about it on the way."""

    def __init__(self, name: str, layout: Layout, further: Further) -> None:
        self._name, self._layout, self._further = name, layout, further
        self._header = layout.header
        self._first: tuple[int, list[str]] | None = None  # a line that may be a header, kept for the end
        self.notes: list[str] = []

    def description(self) -> str:
        """Say how the text was read; after that."""
        layout = self._layout
        header = "with header" if self._header else "no header"
        separator = SEPARATORS.get(layout.separator, repr(layout.separator))
        names = layout.names if self._header else None
        return f"delimited text ({separator}, {header}; {what_was_taken(layout.columns, names)})"

    def pairs(self, blocks: Iterator[Lines], users: Ids, items: Ids) -> Iterator[Found]:
        """Yield interactions, of records at a time."""
        name, layout = self._name, self._layout
        wanted = layout.columns.all()
        title = tuple(layout.names[column] for column in wanted[:2]) if self._header else ()
        inside, where, again = 0, 0, 0
        for numbers, rows in records_of(name, blocks, layout.separator, max(wanted) + 1):
            between = numbers[-1] - numbers[0] - len(rows)
            if between and not inside:
                where = next(number for number, below in pairwise(numbers) if below > number + 1)
            inside += between
            columns = [[fields[c].strip() if len(fields) > c else "" for fields in rows] for c in wanted]
            who, what = columns[:2]
            self._refuse(numbers, rows, who, what)
            taken: list[bool] | None = None
            if "" in who or (self._header is None and self._first is None):
                taken = list(map(bool, who))  # the others are blank
            if taken and self._header is None and self._first is None and any(taken):
                at = taken.index(True)
                taken[at] = False
                self._first = numbers[at], [column[at] for column in columns]
            if title and title[0] in who:  # files one below the other, each with its header
                titles = [pair == title for pair in zip(who, what, strict=True)]
                again += sum(titles)
                taken = [
                    one and not other for one, other in zip(taken or map(bool, who), titles, strict=True)
                ]
            if taken is not None:
                columns = [list(compress(column, taken)) for column in columns]
                numbers = list(compress(numbers, taken))
            yield self._found(numbers, columns, users, items)
        if inside:
            self.notes.append(f"line ends within quotes: {inside:,} (the first in line {where})")
        if again:
            self.notes.append(f"the header came again {again:,} times")

    def _found(self, numbers: Sequence[int], columns: list[list[str]], users: Ids, items: Ids) -> Found:
        """Return the interactions of records of which the columns that are wanted are given."""
        who, what, *others = columns
        further = dict(zip(self._layout.columns.further, others, strict=True))
        return self._further.of_text(numbers, further).of(who, what, users, items)

    def _refuse(self, numbers: Any, rows: list[list[str]], who: list[str], what: list[str]) -> None:
        """Refuse ids with line ends in them, and lines with a user or an item only."""
        both = "\0".join(chain(who, what))
        if "\n" in both or CARRIAGE_RETURN in both:
            raise next(
                _stray_line_end(self._name, number)
                for number, user, item in zip(numbers, who, what, strict=False)
                if "\n" in user + item or CARRIAGE_RETURN in user + item
            )
        if "" in who or "" in what:
            for number, fields, user, item in zip(numbers, rows, who, what, strict=False):
                if bool(user) != bool(item):
                    raise self._missing_field(number, fields)

    def with_first_line(self, pairs: Found, read: int, users: Ids, items: Ids) -> tuple[Found, int]:
        """Add what the first line has if it turns out to be an interaction."""
        if self._first is None:
            return pairs, read
        number, fields = self._first
        self._header = header_from_ids((fields[0], fields[1]), (users, items), pairs[:2])
        if self._header is None:
            raise ask_for_the_header(self._name, number, self._layout.names)
        if self._header:
            return pairs, read
        first = self._found([number], [[field] for field in fields], users, items)
        return distinct_pairs([pairs, first])[0], read + len(first.users)

    def _missing_field(self, number: int, fields: list[str]) -> InteractionsError:
        separator = self._layout.separator
        return InteractionsError(
            f"{self._name}, line {number}: expected a user and an item separated by "
            f"{SEPARATORS.get(separator, repr(separator))}, got {separator.join(fields)[:60]!r}; mend or "
            f"remove the line (or choose another --format)"
        )


def _stray_line_end(name: str, number: int) -> InteractionsError:
    return InteractionsError(
        f"{name}, line {number}: has a line end within an id; expected line ends of one kind, and quotes in "
        f"pairs"
    )
