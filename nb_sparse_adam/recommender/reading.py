"""Files of interactions -> `Interactions` or `Split`: delimited text, LightGCN adjacency lines, Parquet.

Text is read once, from beginning to end and a block at a time, with the standard library: pipes can be read,
and memory follows the distinct ids and pairs, not the size of the file. Parquet is polars' work. What is ours
is to tell the formats apart, to find the two columns, to say what was understood, and where a file is wrong.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam.errors import InteractionsError, OptionError
from nb_sparse_adam.extras import require
from nb_sparse_adam.recommender.interactions import Interactions, Split, UserItems, sorted_distinct

__all__ = ["FORMATS", "read_interactions", "read_split"]

FORMATS = ("auto", "delimited", "adjacency", "parquet")

# In order of precedence: a tab or "::" never stands in an id by accident, a comma or a space may.
_SEPARATORS = {"::": "'::'", "\t": "tab", ";": "semicolon", ",": "comma", " ": "space"}
_QUOTING = (",", ";")  # beside the others, a quote is a character like any other
_COMMENTS = ("# ", "% ")  # so begin the files of SNAP and of KONECT
_CARRIAGE_RETURN = "\udc0d"  # stands for one within a line, where csv would take it for a line end
_BLOCK = 1 << 20  # characters that are read at a time
_LONGEST_LINE = 1 << 24
_RECORDS = 1 << 10  # with quotes in them that are passed on at a time
_FRESH = 1 << 20  # pairs that may wait before those that came twice are dropped
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]*)?"
_USER_NAMES = frozenset(
    "user users userid uid customer customerid member memberid reviewer reviewerid".split()
)
_ITEM_NAMES = frozenset(
    "item items itemid iid movie movieid product productid book bookid isbn asin parentasin artist artistid "
    "track trackid song songid business businessid article articleid anime animeid game gameid".split()
)
_LIMIT = threading.Lock()

_Block = tuple[int, str]  # the number of the first line, and lines without the last one's end
_Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Layout:
    """How a text file is laid out, as far as its beginning shows."""

    format: str
    begin: int  # line of the first interaction: above it are blank lines, comments and the header
    comments: int
    separator: str = " "
    header: bool = False
    user_column: int = 0
    item_column: int = 1


@dataclass(frozen=True)
class _Pairs:
    """The distinct pairs of a file in codes of `_Ids`, parallel, and how many pairs there were."""

    users: _Codes
    items: _Codes
    read: int
    description: str


class _Ids(dict[str, int]):
    """Ids, each with its code: 0, 1, ... as they come."""

    def __missing__(self, name: str) -> int:
        code = self[name] = len(self)
        return code

    def codes(self, names: Sequence[str]) -> _Codes:
        """Return the codes of ids, and give new ids theirs."""
        return np.fromiter(map(self.__getitem__, names), np.int64, len(names))

    def sorted(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return the ids in the order of `Interactions`, and the row there of each code."""
        names = list(self)
        if all(map(_is_integer, names)):
            ids = np.array([int(name) for name in names], dtype=np.int64)
        else:
            ids = np.array(names, dtype=object)
        order = np.argsort(ids, kind="stable")
        rows = np.empty(len(order), dtype=np.int64)
        rows[order] = np.arange(len(order))
        return ids[order], rows


def _is_integer(name: str) -> bool:
    """Say whether an id comes back from int64 as it was written."""
    return _INTEGER.fullmatch(name) is not None and -(2**63) <= int(name) < 2**63


def read_interactions(path: str | os.PathLike[str], file_format: str = "auto") -> Interactions:
    """Read interactions from a file.

    Parameters
    ----------
    path : path
        One of:

        * delimited text (comma, tab, semicolon, space or ``::``), with or without a header. The user is in
          the first column and the item in the second, unless the header names both a user and an item
          column. Further columns are ignored. Quotes are understood with comma and semicolon.
        * LightGCN adjacency lines, ``user item item ...``; a user without items is left out.
        * Parquet: columns with names like ``user_id`` and ``item_id`` if there are any, else the first two.

        Text is UTF-8, and may be compressed with gzip; it is read once, from beginning to end, so that it may
        come from a pipe. Lines end as on Unix, Windows or old Macs, and have at most 16,777,216 characters.
        Lines at the beginning that start with ``# `` or ``% `` are comments. A field in quotes may have line
        ends in it, but an id may not; such line ends are counted in the description, for a quote that does
        not match makes the lines below it part of its field.

        Ids are integers or strings; blanks around them are dropped. They count as integers if every one of a
        column is written as one (``007`` is not) and fits int64. The name of a file is taken as it is: there
        are no wildcards.
    file_format : {"auto", "delimited", "adjacency", "parquet"}
        ``"auto"`` looks at the beginning of the file. Lines separated by spaces are ambiguous: they are
        taken for adjacency lines if they differ in length and no first field comes twice, else for
        delimited text.

    Returns
    -------
    Interactions

    Raises
    ------
    InteractionsError
        If the file cannot be read or has no interactions.
    MissingExtraError
        If polars is not installed.
    OptionError
        If `file_format` is none of the above.
    """
    users, items = _Ids(), _Ids()
    pairs = _read(path, file_format, users, items)
    (user_ids, user_rows), (item_ids, item_rows) = users.sorted(), items.sorted()
    shape = len(user_ids), len(item_ids)
    unique = UserItems.from_pairs(user_rows[pairs.users], item_rows[pairs.items], *shape)
    return Interactions(unique, user_ids, item_ids, pairs.read - len(unique), pairs.description)


def read_split(
    train: str | os.PathLike[str], test: str | os.PathLike[str], file_format: str = "auto"
) -> Split:
    """Read what to train on and what to predict from two files.

    Items that occur in `test` only stay in the catalogue. Test interactions that are in `train` too are left
    out, and so are those of users of whom `train` knows nothing; the notes of the split say how many.

    Parameters
    ----------
    train, test : path
        As in `read_interactions`.
    file_format : {"auto", "delimited", "adjacency", "parquet"}
        Of both files, as in `read_interactions`.

    Returns
    -------
    Split

    Raises
    ------
    InteractionsError, MissingExtraError, OptionError
        As `read_interactions` does; also if nothing of `test` remains.
    """
    users, items = _Ids(), _Ids()
    known, wanted = (_read(path, file_format, users, items) for path in (train, test))
    (user_ids, user_rows), (item_ids, item_rows) = users.sorted(), items.sorted()
    shape = len(user_ids), len(item_ids)
    train_pairs, test_pairs = (
        UserItems.from_pairs(user_rows[pairs.users], item_rows[pairs.items], *shape)
        for pairs in (known, wanted)
    )
    seen = train_pairs.contains(test_pairs)
    strangers = train_pairs.counts()[test_pairs.users()] == 0
    counts = {
        "repeated pairs of the training file were used once": known.read - len(train_pairs),
        "repeated pairs of the test file were used once": wanted.read - len(test_pairs),
        "test interactions left out: they are in the training file": int(seen.sum()),
        "test interactions left out: their user is not in the training file": int(strangers.sum()),
    }
    kept = test_pairs.select(~(seen | strangers))
    if not len(kept):
        raise InteractionsError(
            f"{_printable(str(test))}: none of its {len(test_pairs):,} interactions can be predicted: "
            f"{strangers.sum():,} are of users that {_printable(str(train))} does not have, and "
            f"{seen.sum():,} are in it too"
        )
    notes = [f"{count:,} {what}" for what, count in counts.items() if count]
    description = f"trained on {known.description}; tested on {wanted.description}"
    return Split(train_pairs, kept, user_ids, item_ids, description, notes)


def _read(path: str | os.PathLike[str], file_format: str, users: _Ids, items: _Ids) -> _Pairs:
    if file_format not in FORMATS:
        raise OptionError(f"file_format: expected one of {', '.join(FORMATS)}, got {file_format!r}")
    pl = require("polars", "train", "reading interactions")
    file = Path(path)
    name, shown = _printable(str(file)), _printable(file.name)
    try:
        if file.is_dir():
            raise InteractionsError(f"{name}: is a directory; name the file in it that has the interactions")
        with file.open("rb") as stream:
            magic = stream.peek(4)[:4]
            if file_format == "parquet" or (file_format == "auto" and magic == b"PAR1"):
                pairs = _read_parquet(pl, name, shown, stream, users, items)
            elif magic.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=stream) as unpacked:
                    pairs = _read_text(name, shown, unpacked, file_format, users, items)
            else:
                pairs = _read_text(name, shown, stream, file_format, users, items)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InteractionsError(f"{name}: polars cannot read it: {reason}") from error
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a gzip file that was cut off
        reason = getattr(error, "strerror", None) or str(error)
        hint = " (standard input is /dev/stdin)" if name == "-" else ""
        raise InteractionsError(f"{name}: cannot be read: {reason}{hint}") from error
    if not pairs.read:
        raise InteractionsError(f"{name}: has no interactions; expected a user and an item on each line")
    return pairs


def _printable(text: str) -> str:
    """Return a name as it can be shown: in one line, and in Unicode."""
    return text if text.isprintable() else repr(text)


def _distinct(batches: Iterable[tuple[_Codes, _Codes]]) -> tuple[_Codes, _Codes, int]:
    """Return the distinct ones of all pairs, and the number of all; repetitions never add up in memory."""
    kept, fresh, waiting, read = np.empty(0, dtype=np.int64), [], 0, 0
    for users, items in batches:
        fresh.append(users << 32 | items)
        waiting += len(users)
        read += len(users)
        if waiting > max(len(kept), _FRESH):
            kept, fresh, waiting = sorted_distinct(np.concatenate([kept, *fresh])), [], 0
    kept = sorted_distinct(np.concatenate([kept, *fresh]))
    return kept >> 32, kept & 0xFFFFFFFF, read


def _read_text(name: str, shown: str, stream: Any, file_format: str, users: _Ids, items: _Ids) -> _Pairs:
    with _decoder(name, stream) as decoder:
        blocks = _blocks(name, decoder)
        number, text = next((block for block in blocks if block[1].strip()), (0, ""))
        if not number:
            raise InteractionsError(f"{name}: is empty; expected a user and an item on each line")
        layout = _sniff(name, number, text, file_format)
        below = text.split("\n")[layout.begin - number :]
        blocks, notes = chain([(layout.begin, "\n".join(below))] if below else [], blocks), []
        if layout.format == "adjacency":
            what = f"{shown}, adjacency lines (user item item ...)"
            pairs = _distinct(_adjacency(name, blocks, users, items))
        else:
            header = "with header" if layout.header else "no header"
            what = f"{shown}, delimited text ({_SEPARATORS[layout.separator]}, {header})"
            if (layout.user_column, layout.item_column) != (0, 1):
                at = layout.user_column + 1, layout.item_column + 1
                notes.append(f"users in column {at[0]} and items in column {at[1]} by their names")
            pairs = _distinct(_delimited(name, blocks, layout, users, items, notes))
    if layout.comments:
        notes.append(f"comments above: {layout.comments:,} lines")
    return _Pairs(*pairs, ", ".join([what, *notes]))


def _decoder(name: str, stream: Any) -> io.TextIOWrapper:
    head = stream.peek(1)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InteractionsError(f"{name}: is UTF-16; convert it, for example with: iconv -f utf-16 -t utf-8")
    # Old Macs end lines with a carriage return. In other files it is a character like any other.
    newline = None if b"\r" in head[:-1] and b"\n" not in head else "\n"
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)


def _blocks(name: str, decoder: io.TextIOWrapper) -> Iterator[_Block]:
    """Yield whole lines. The first time at least two, if there are: one alone does not show a format."""
    number, rest = 1, ""
    while block := decoder.read(_BLOCK):
        whole, end, rest = re.sub("\r+\n", "\n", rest + block).rpartition("\n")
        if len(rest) > _LONGEST_LINE:
            number += whole.count("\n") + len(end)
            raise InteractionsError(
                f"{name}, line {number}: is longer than {_LONGEST_LINE:,} characters, got {rest[:30]!r}...; "
                f"expected a user and an item on each line"
            )
        if end and (number > 1 or "\n" in whole):
            yield number, _checked(name, number, whole)
            number += whole.count("\n") + 1
        else:
            rest = whole + end + rest
    if rest:
        yield number, _checked(name, number, rest.rstrip("\r"))


def _checked(name: str, number: int, text: str) -> str:
    """Return lines, of which the first has that number, if they are text."""
    nul = text.find("\0")
    if nul >= 0:
        number += text.count("\n", 0, nul)
        raise InteractionsError(
            f"{name}, line {number}: has a NUL byte, as a binary file has; expected text in UTF-8 (gzip is "
            f"fine) or Parquet"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that are not UTF-8 were decoded to surrogates
        number += text.count("\n", 0, error.start)
        raise InteractionsError(
            f"{name}, line {number}: is not UTF-8; convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error
    return text.replace("\r", _CARRIAGE_RETURN)


def _sniff(name: str, number: int, text: str, file_format: str) -> _Layout:
    """Find out from its first lines how a file is laid out."""
    lines = [(at, line) for at, line in enumerate(text.split("\n"), number) if line.strip()]
    if lines[0][1].startswith(('{"', '[{"')):
        raise InteractionsError(
            f"{name}: is JSON; expected delimited text: convert it, for example with: "
            f"jq -r '[.user_id, .item_id] | @csv'"
        )
    separator = _separator(name, lines, file_format)
    comments = 0
    for _, line in lines:
        if not line.startswith(_COMMENTS) or (separator != " " and _named_columns(line.split(separator))):
            break
        comments += 1
    if comments == len(lines):
        raise InteractionsError(f"{name}: has no interactions, only comments; expected a user and an item")
    begin = lines[comments][0]
    text = "\n".join(text.split("\n")[begin - number :])
    rows: list[tuple[int, list[str]]] = []  # of each: the number of the line below it, and its fields
    with contextlib.suppress(InteractionsError):  # of the last, which may be cut; reading will tell
        for numbers, records in _records(name, iter([(begin, text)]), separator):
            rows.extend(zip(numbers[1:], map(_cleaned, records), strict=True))
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return _Layout("delimited", begin, comments, separator)
    firsts = [fields[0] for _, fields in rows]
    ragged = len({len(fields) for _, fields in rows}) > 1 and len(set(firsts)) == len(rows)
    if file_format == "adjacency" or (file_format == "auto" and separator == " " and ragged):
        return _Layout("adjacency", begin, comments)
    below, first = rows[0]
    named = _named_columns(first)
    if named:
        return _Layout("delimited", below, comments, separator, True, *named)
    # A header has no numbers, and below it in the one column or the other stand nothing but numbers.
    others = [fields for _, fields in rows[1:]]
    header = bool(others) and not any(re.fullmatch(_NUMBER, field) for field in first)
    header = header and any(
        all(re.fullmatch(_NUMBER, fields[at]) for fields in others if len(fields) > at) for at in (0, 1)
    )
    return _Layout("delimited", below if header else begin, comments, separator, header)


def _cleaned(fields: list[str]) -> list[str]:
    return [field.strip().strip('"').strip() for field in fields]


def _named_columns(header: list[str]) -> tuple[int, int] | None:
    """Return the columns of users and of items if names in the header say both."""
    names = [re.sub(r"[^a-z]", "", name.partition(":")[0].lower()) for name in header]
    users = [at for at, name in enumerate(names) if name in _USER_NAMES]
    items = [at for at, name in enumerate(names) if name in _ITEM_NAMES]
    return (users[0], items[0]) if users and items else None


def _separator(name: str, lines: list[_Block], file_format: str) -> str:
    if file_format == "adjacency":
        return " "
    counts = {separator: sum(separator in line for _, line in lines) for separator in _SEPARATORS}
    for separator, count in counts.items():
        if 2 * count > len(lines):
            return separator
    best = max(counts, key=lambda separator: counts[separator])
    if not counts[best]:
        number, line = lines[0]
        raise InteractionsError(
            f"{name}: has one column only (line {number} is {line[:60]!r}); expected a user and an item on "
            f"each line, separated by one of {', '.join(_SEPARATORS.values())}"
        )
    return best


def _records(
    name: str, blocks: Iterator[_Block], separator: str, splits: int = -1
) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Yield the fields of records, and the numbers of their first lines and of the line below the last."""
    for number, text in blocks:
        if '"' in text and separator in _QUOTING:
            yield from _quoted_records(name, chain([(number, text)], blocks), separator, splits)
            return
        by = None if separator == " " else separator
        rows = [line.split(by, splits) for line in text.split("\n")]
        yield range(number, number + len(rows) + 1), rows


def _quoted_records(
    name: str, blocks: Iterator[_Block], separator: str, splits: int
) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Yield the same where fields may be in quotes, and then have separators and line ends in them."""
    lines = ((at, line) for number, text in blocks for at, line in enumerate(text.split("\n"), number))
    numbers: list[int] = []
    rows: list[list[str]] = []
    below = 0
    for number, line in lines:
        if '"' in line:
            source = chain([line + "\n"], (more + "\n" for _, more in lines))
            reader = csv.reader(source, delimiter=separator, strict=True)
            try:
                row = _next(reader)
            except csv.Error as error:
                yield [*numbers, number], rows
                last = number + reader.line_num - 1
                raise InteractionsError(
                    f"{name}, line {number}: a quote opens that is not closed as it should be (line {last}: "
                    f"{error}); expected quotes around a whole field, and those within it twice"
                ) from error
            below = number + reader.line_num
        else:
            row, below = line.split(separator, splits), number + 1
        numbers.append(number)
        rows.append(row)
        if len(rows) == _RECORDS:
            yield [*numbers, below], rows
            numbers, rows = [], []
    yield [*numbers, below], rows


def _next(reader: Iterator[list[str]]) -> list[str]:
    """Return the next row of a csv reader, of which a field may be as long as a line."""
    with _LIMIT:  # there is one for the whole process
        limit = csv.field_size_limit(_LONGEST_LINE)
        try:
            return next(reader)
        finally:
            csv.field_size_limit(limit)


def _adjacency(
    name: str, blocks: Iterable[_Block], users: _Ids, items: _Ids
) -> Iterator[tuple[_Codes, _Codes]]:
    for number, text in blocks:
        if _CARRIAGE_RETURN in text:
            raise _line_end(name, number + text.count("\n", 0, text.index(_CARRIAGE_RETURN)))
        rows = [fields for fields in map(str.split, text.split("\n")) if len(fields) > 1]
        who = users.codes([fields[0] for fields in rows])
        what = items.codes([item for fields in rows for item in fields[1:]])
        yield np.repeat(who, [len(fields) - 1 for fields in rows]), what


def _delimited(
    name: str, blocks: Iterator[_Block], layout: _Layout, users: _Ids, items: _Ids, notes: list[str]
) -> Iterator[tuple[_Codes, _Codes]]:
    wanted = layout.user_column, layout.item_column
    inside, where = 0, 0
    for numbers, rows in _records(name, blocks, layout.separator, max(wanted) + 1):
        who, what = ([fields[at].strip() if len(fields) > at else "" for fields in rows] for at in wanted)
        pairs = "\0".join(chain(who, what))
        if "\n" in pairs or _CARRIAGE_RETURN in pairs:
            raise next(
                _line_end(name, number)
                for number, user, item in zip(numbers, who, what, strict=False)
                if "\n" in user + item or _CARRIAGE_RETURN in user + item
            )
        if "" in who or "" in what:
            for number, fields, user, item in zip(numbers, rows, who, what, strict=False):
                if bool(user) != bool(item):
                    raise _missing_field(name, number, layout.separator, fields)
            who, what = list(filter(None, who)), list(filter(None, what))  # lines with neither are blank
        between = numbers[-1] - numbers[0] - len(rows)
        if between and not inside:
            where = next(at for at, below in pairwise(numbers) if below > at + 1)
        inside += between
        yield users.codes(who), items.codes(what)
    if inside:
        notes.append(f"line ends within quotes: {inside:,} (the first in line {where})")


def _missing_field(name: str, number: int, separator: str, fields: list[str]) -> InteractionsError:
    return InteractionsError(
        f"{name}, line {number}: expected a user and an item separated by {_SEPARATORS[separator]}, got "
        f"{separator.join(fields)[:60]!r}; mend or remove the line (or choose another --format)"
    )


def _line_end(name: str, number: int) -> InteractionsError:
    return InteractionsError(
        f"{name}, line {number}: has a line end within an id; expected line ends of one kind, and quotes in "
        f"pairs"
    )


def _read_parquet(pl: Any, name: str, shown: str, stream: Any, users: _Ids, items: _Ids) -> _Pairs:
    # polars is given what is open, not the name: in names it looks for wildcards.
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    names = list(pl.read_parquet_schema(source))
    if len(names) < 2:
        raise InteractionsError(f"{name}: has the columns {names}; expected one of users and one of items")
    user, item = (names[at] for at in _named_columns(names) or (0, 1))
    source.seek(0)
    frame = pl.read_parquet(source, columns=[user, item])
    if not frame.height:
        raise InteractionsError(f"{name}: has no rows; expected an interaction in each")
    pairs = [_id_codes(pl, name, frame[column], ids) for column, ids in ((user, users), (item, items))]
    description = f"{shown}, Parquet (users in {user!r}, items in {item!r})"
    return _Pairs(*_distinct([(pairs[0], pairs[1])]), description)


def _id_codes(pl: Any, name: str, column: Any, ids: _Ids) -> _Codes:
    """Return the codes of the ids in a polars column."""
    if column.null_count():
        row = column.is_null().arg_max()
        raise InteractionsError(f"{name}, row {row}: has no value in column {column.name!r}; drop such rows")
    if not column.dtype.is_integer() and column.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise InteractionsError(
            f"{name}: column {column.name!r} has the type {column.dtype}; ids must be integers or strings"
        )
    column = column.cast(pl.String)
    distinct = column.unique()
    codes = pl.Series(ids.codes(distinct.to_list()))
    rows: _Codes = column.replace_strict(distinct, codes).to_numpy()
    return rows
