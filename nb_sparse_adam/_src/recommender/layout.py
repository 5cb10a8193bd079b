# SPDX-License-Identifier: Apache-2.0
"""How a text file of interactions is laid out: the format, the separator, the header, the columns."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

from nb_sparse_adam._src.recommender.lines import Lines, records_of
from nb_sparse_adam.errors import InteractionsError

# In order of precedence: a tab or "::" never stands in an id by accident, a comma or a space may.
SEPARATORS = {"::": "'::'", "\t": "tab", ";": "semicolon", ",": "comma", " ": "space"}

_COMMENTS = ("# ", "% ")  # so begin the files of SNAP and of KONECT
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]*)?"
_USER_NAMES = frozenset(
    "user users userid uid customer customerid member memberid reviewer reviewerid".split()
)
_ITEM_NAMES = frozenset(
    "item items itemid iid movie movieid product productid book bookid isbn asin parentasin artist artistid "
    "track trackid song songid business businessid article articleid anime animeid game gameid".split()
)


@dataclass(frozen=True)
class Layout:
    """How a text file is laid out, as far as its beginning shows."""

    format: str
    begin: int  # line of the first interaction: above it are blank lines, comments and the header
    comments: int
    separator: str = " "
    header: bool = False
    user_column: int = 0
    item_column: int = 1


def find_layout(name: str, number: int, text: str, file_format: str) -> Layout:
    """Find out from its first lines how a file is laid out."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), number) if line.strip()]
    if lines[0][1].startswith(('{"', '[{"')):
        raise InteractionsError(
            f"{name}: is JSON; expected delimited text: convert it, for example with: "
            f"jq -r '[.user_id, .item_id] | @csv'"
        )
    separator = _separator(name, lines, file_format)
    comments = 0
    for _, line in lines:
        if not line.startswith(_COMMENTS) or (separator != " " and named_columns(line.split(separator))):
            break
        comments += 1
    if comments == len(lines):
        raise InteractionsError(f"{name}: has no interactions, only comments; expected a user and an item")
    begin = lines[comments][0]
    text = "\n".join(text.split("\n")[begin - number :])
    rows: list[tuple[int, list[str]]] = []  # of each: the number of the line below it, and its fields
    with contextlib.suppress(InteractionsError):  # of the last, which may be cut; reading will tell
        for numbers, records in records_of(name, iter([(begin, text)]), separator):
            rows.extend(zip(numbers[1:], map(_cleaned, records), strict=True))
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return Layout("delimited", begin, comments, separator)
    firsts = [fields[0] for _, fields in rows]
    ragged = len({len(fields) for _, fields in rows}) > 1 and len(set(firsts)) == len(rows)
    if file_format == "adjacency" or (file_format == "auto" and separator == " " and ragged):
        return Layout("adjacency", begin, comments)
    below, first = rows[0]
    named = named_columns(first)
    if named:
        return Layout("delimited", below, comments, separator, True, *named)
    # A header has no numbers, and below it in the one column or the other stand nothing but numbers.
    others = [fields for _, fields in rows[1:]]
    header = bool(others) and not any(re.fullmatch(_NUMBER, field) for field in first)
    header = header and any(
        all(re.fullmatch(_NUMBER, fields[column]) for fields in others if len(fields) > column)
        for column in (0, 1)
    )
    return Layout("delimited", below if header else begin, comments, separator, header)


def _cleaned(fields: list[str]) -> list[str]:
    return [field.strip().strip('"').strip() for field in fields]


def named_columns(header: list[str]) -> tuple[int, int] | None:
    """Return the columns of users and of items if names in the header say both."""
    names = [re.sub(r"[^a-z]", "", name.partition(":")[0].lower()) for name in header]
    users = [column for column, name in enumerate(names) if name in _USER_NAMES]
    items = [column for column, name in enumerate(names) if name in _ITEM_NAMES]
    return (users[0], items[0]) if users and items else None


def _separator(name: str, lines: list[Lines], file_format: str) -> str:
    if file_format == "adjacency":
        return " "
    counts = {separator: sum(separator in line for _, line in lines) for separator in SEPARATORS}
    for separator, count in counts.items():
        if 2 * count > len(lines):
            return separator
    best = max(counts, key=lambda separator: counts[separator])
    if not counts[best]:
        number, line = lines[0]
        raise InteractionsError(
            f"{name}: has one column only (line {number} is {line[:60]!r}); expected a user and an item on "
            f"each line, separated by one of {', '.join(SEPARATORS.values())}"
        )
    return best
