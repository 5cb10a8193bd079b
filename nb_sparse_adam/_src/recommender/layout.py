# SPDX-License-Identifier: Apache-2.0
"""How a text file of interactions is laid out: the format, the separator, the header, the columns."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nb_sparse_adam._src.recommender.codes import Codes, Ids
from nb_sparse_adam._src.recommender.columns import (
    SEPARATORS,
    Columns,
    ReadOptions,
    find_columns,
    named_columns,
    resolve,
    role,
    shown,
)
from nb_sparse_adam._src.recommender.lines import Lines, records_of
from nb_sparse_adam.errors import InteractionsError, OptionError

_COMMENTS = ("# ", "% ")  # so begin the files of SNAP and of KONECT
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")
_DATE = re.compile(r"[0-9]{1,4}([-/.])[0-9]{1,2}\1[0-9]{1,4}(?:[T ].*)?")
_NO_NUMBERS = frozenset(r"na n/a nan inf -inf null none \n - ?".split())  # and yet stand where numbers do
_LIBFM = re.compile(r"(?:[0-9]+:){1,2}[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")

_WIDE = 5  # columns that a matrix has at least
_FEW = 21  # different values: half stars from 0 to 10
_SELDOM = 0.05  # of pairs: so many may have an id that comes once, where one that comes once is no id


_FIRST_TWO = Columns(0, 1)


@dataclass(frozen=True)
class Layout:
    """How a text file is laid out, as far as its beginning shows."""

    format: str
    begin: int  # line of the first interaction, or of what may be one: above it is what is none
    comments: int = 0
    separator: str = " "
    columns: Columns = _FIRST_TWO
    header: bool | None = False  # None: the line at `begin` may be one, which the ids below it show
    names: Sequence[str] = ()  # the fields of the header, or of that line


Rows = list[tuple[int, int, list[str]]]  # of each record: its line, the line below it, and its fields


def find_layout(name: str, number: int, text: str, options: ReadOptions) -> Layout:
    """Find out from its first lines, of which the first has this number, how a file is laid out."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), number) if line.strip()]
    if options.file_format in ("auto", "json"):
        kind = _json_or_matrix_market(name, *lines[0], options)
        if kind:
            return Layout("json", lines[0][0])
    separator = _separator(name, lines, options)
    comments = 0
    for _, line in lines:
        if not line.startswith(_COMMENTS) or (separator != " " and named_columns(line.split(separator))):
            break
        comments += 1
    if comments == len(lines):
        raise InteractionsError(f"{name}: has no interactions, only comments; expected a user and an item")
    begin = lines[comments][0]
    text = "\n".join(text.split("\n")[begin - number :])
    rows: Rows = []
    with contextlib.suppress(InteractionsError):  # of the last, which may be cut; reading will tell
        for numbers, records in records_of(name, iter([(begin, text)]), separator):
            rows.extend(zip(numbers, numbers[1:], map(_cleaned, records), strict=False))
    rows = [row for row in rows if any(row[2])]
    if options.file_format == "adjacency":
        return Layout("adjacency", begin, comments)
    if not rows:
        return Layout("delimited", begin, comments, separator)
    if options.file_format == "auto" and separator == " ":
        _refuse_libfm(name, rows)
        firsts = [fields[0] for *_, fields in rows]
        ragged = len({len(fields) for *_, fields in rows}) > 1 and len(set(firsts)) == len(rows)
        if ragged and not options.of_columns:
            return Layout("adjacency", begin, comments)
    if options.user_column is None and options.item_column is None:
        _refuse_matrix(name, rows, separator)
    return _delimited_layout(name, rows, comments, separator, options)


def _delimited_layout(name: str, rows: Rows, comments: int, separator: str, options: ReadOptions) -> Layout:
    begin, below, first = rows[0]
    width = max(len(fields) for *_, fields in rows)
    header = options.header
    if header is None:
        header = _is_header([fields for *_, fields in rows], options)
    if header:
        columns = find_columns(name, options, first, len(first))
        return Layout("delimited", below, comments, separator, columns, True, first)
    columns = find_columns(name, options, None, width)
    return Layout("delimited", begin, comments, separator, columns, header, first)


def _is_header(rows: list[list[str]], options: ReadOptions) -> bool | None:
    """Say whether the first row names the columns, as far as the rows that are looked at show."""
    first, others = rows[0], rows[1:]
    given = (options.user_column, options.item_column, options.rating_column, options.time_column)
    if named_columns(first) or any(isinstance(one, str) and not _NUMBER.fullmatch(one) for one in given):
        return True
    at = [0, 1]
    for place, one in enumerate(given[:2]):
        if one is not None:
            with contextlib.suppress(OptionError):
                at[place] = resolve("", "", one, None, len(first), True) or 0
    if any(_is_value(first[column]) for column in at if column < len(first)):
        return False
    if any(_is_named(column, first, others) for column in range(len(first))):
        return True
    typed = [column for column in range(len(first)) if _differs_in_type(column, first, others)]
    if any(map(_is_value, first)) and not set(typed) & set(at):
        return False
    return True if typed else None


def _is_value(field: str) -> bool:
    return bool(_NUMBER.fullmatch(field) or _DATE.fullmatch(field) or field.lower() in _NO_NUMBERS)


def _fields(column: int, rows: list[list[str]]) -> list[str]:
    return [fields[column] for fields in rows if len(fields) > column and fields[column]]


def _is_named(column: int, first: list[str], others: list[list[str]]) -> bool:
    """Say whether a field is a usual name of a column, and no value of that column."""
    expected = ("user", "item") if column < 2 else ("user", "item", "rating", "other")
    return (
        bool(first[column])
        and role(first[column]) in expected
        and bool(others)
        and first[column] not in _fields(column, others)
    )


def _differs_in_type(column: int, first: list[str], others: list[list[str]]) -> bool:
    """Say whether a field is no number or date, and nothing else is in its column."""
    below = _fields(column, others)
    return bool(first[column] and below) and not _is_value(first[column]) and all(map(_is_value, below))


def header_from_ids(cells: tuple[str, str], ids: tuple[Ids, Ids], pairs: tuple[Codes, Codes]) -> bool | None:
    """Say whether a first line is a header by the pairs of all the lines below it; None: it cannot be told.

    Parameters
    ----------
    cells : tuple of str
        What the line has in the columns of users and items.
    ids : tuple of Ids
        The ids of users and of items, those of files that were read before as well.
    pairs : tuple of arrays, int64, shapes (n,)
        The distinct pairs below the line, in codes of `ids`.
    """
    counts = [np.bincount(codes, minlength=1) for codes in pairs]
    if any(cell in known for cell, known in zip(cells, ids, strict=True)):
        return False
    if not len(pairs[0]):
        return None
    columns: list[list[str]] = []
    for known, count in zip(ids, counts, strict=True):
        names = list(known)
        columns.append([names[code] for code in np.flatnonzero(count)])
    with_digits = [np.mean([any(map(str.isdigit, name)) for name in column]) for column in columns]
    for cell, share in zip(cells, with_digits, strict=True):
        if any(map(str.isdigit, cell)) and share >= 0.5:
            return False
    for cell, share, column in zip(cells, with_digits, columns, strict=True):
        if share == 1 and len(column) > 1 and not any(map(str.isdigit, cell)):
            return True
    # Would an interaction have ids that come once only? As often as others do: so many of the pairs.
    once = min((int((count == 1).sum()) + 1) / (len(pairs[0]) + 1) for count in counts)
    return True if once <= _SELDOM else None


def ask_for_the_header(name: str, number: int, fields: Sequence[str]) -> InteractionsError:
    """Return the error of a line that may be a header and may be none."""
    return InteractionsError(
        f"{name}, line {number}: cannot tell whether {', '.join(map(shown, fields[:5]))} are names of "
        f"columns or an interaction; say it with --header or --no-header (in Python "
        f"header=True or header=False)"
    )


def _cleaned(fields: Iterable[str]) -> list[str]:
    return [field.strip().strip('"').strip() or field.strip() for field in fields]


def _json_or_matrix_market(name: str, number: int, line: str, options: ReadOptions) -> bool:
    """Say whether a file, of which this is the first line, is JSON lines; refuse what is like it."""
    if options.file_format == "json" or re.match(r'\s*\{\s*(?:"|\}|$)', line):
        return True
    if re.match(r"\s*\[\s*(?:[\[{\]]|$)", line):
        raise InteractionsError(
            f"{name}: is a JSON array; expected an object on each line: convert it, for example with: "
            f"jq -c '.[]'"
        )
    if line.startswith("%%MatrixMarket"):
        raise InteractionsError(
            f"{name}, line {number}: is a Matrix Market file, which is not read here; expected a user and an "
            f"item on each line: read it with scipy.io.mmread, and give its row and col to "
            f"Interactions.from_ids"
        )
    return False


def _refuse_libfm(name: str, rows: Rows) -> None:
    features = [fields[1:] for *_, fields in rows]
    if any(features) and all(
        _NUMBER.fullmatch(fields[0]) and all(map(_LIBFM.fullmatch, fields[1:])) for *_, fields in rows
    ):
        raise InteractionsError(
            f"{name}, line {rows[0][0]}: is in the format of libfm or libsvm, a label and index:value each, "
            f"got {' '.join(rows[0][2])[:60]!r}; expected a user and an item on each line. If these are ids, "
            f"choose --format delimited or --format adjacency"
        )


def _refuse_matrix(name: str, rows: Rows, separator: str) -> None:
    """Refuse a table of a row for each user and a column for each item, as far as it can be told from pairs.

    The column that would be that of items then looks like all the columns on its right: few values that come
    again and again, or mostly zeros and blanks.
    """
    below = [fields[1:] for *_, fields in rows[1:]]  # the first may name the items
    width = len(rows[0][2])
    if width < _WIDE or len(below) < 2 or named_columns(rows[0][2]):
        return
    if any(len(fields) != width - 1 for fields in below):
        return
    cells = [cell for fields in below for cell in fields]
    if not all(not cell or _NUMBER.fullmatch(cell) for cell in cells):
        return
    values = {float(cell) for cell in cells if cell}
    nothing = [[not cell or float(cell) == 0 for cell in column] for column in zip(*below, strict=True)]
    sparse = np.mean(nothing) >= 0.5 and np.mean(nothing[0]) >= 0.1
    alike = len(values) <= min(_FEW, len(cells) // 4) and all(
        len({cell for cell in column if cell}) > 1 or len(below) < 8 for column in zip(*below, strict=True)
    )
    firsts = [fields[0] for *_, fields in rows[1:]]
    of_each = len(set(firsts)) == len(firsts)  # else the first column is one of ratings, too
    if not of_each and all(not one or _NUMBER.fullmatch(one) for one in firsts):
        none = np.mean([not one or float(one) == 0 for one in firsts])
        of_each = bool(none >= 0.1) or all(float(one) in values for one in firsts if one)
    if of_each and (sparse or alike):
        other = ", or choose --format adjacency" if separator == " " else ""
        raise InteractionsError(
            f"{name}: looks like a matrix of ratings, with a row for each user and {width - 1} columns of "
            f"items or so; expected a user and an item on each line. If it is not, say which columns have "
            f"them with --user-column and --item-column{other}; "
            f"if it is, make it long, for example with polars' DataFrame.unpivot"
        )


def _separator(name: str, lines: list[Lines], options: ReadOptions) -> str:
    if options.file_format == "adjacency":
        return " "
    counts = {separator: sum(separator in line for _, line in lines) for separator in SEPARATORS}
    if options.separator is not None:
        if not any(options.separator in line for _, line in lines):
            raise OptionError(
                f"separator: {name} has no {options.separator!r} in its first lines (line {lines[0][0]} is "
                f"{lines[0][1][:60]!r}); choose another one"
            )
        return options.separator
    for separator, count in counts.items():
        if 2 * count > len(lines):
            return separator
    best = max(counts, key=lambda separator: counts[separator])
    if not counts[best]:
        number, line = lines[0]
        raise InteractionsError(
            f"{name}: has one column only (line {number} is {line[:60]!r}); expected a user and an item on "
            f"each line, separated by one of {', '.join(SEPARATORS.values())}, or by what --separator says"
        )
    return best
