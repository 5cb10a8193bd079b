"""Files of interactions -> `Interactions` or `Split`: delimited text, LightGCN adjacency lines, Parquet.

Parsing is polars' work. What is ours is to tell the formats apart, to find the two columns, to say what was
understood, and to say where a file is wrong.
"""

from __future__ import annotations

import gzip
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam.errors import InteractionsError, OptionError
from nb_sparse_adam.extras import require
from nb_sparse_adam.interactions import Interactions, Split, UserItems

__all__ = ["FORMATS", "read_interactions", "read_split"]

FORMATS = ("auto", "delimited", "adjacency", "parquet")

# In order of precedence: a tab or "::" never stands in an id by accident, a comma or a space may.
_SEPARATORS = {"::": "'::'", "\t": "tab", ";": "semicolon", ",": "comma", " ": "space"}
_SAMPLE_BYTES = 1 << 20
_INTEGER = r"^(?:0|-?[1-9][0-9]{0,17})$"  # fits int64, and comes back from int64 as it was written
_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]*)?"
_USER_NAMES = frozenset(
    "user users userid uid customer customerid member memberid reviewer reviewerid".split()
)
_ITEM_NAMES = frozenset(
    "item items itemid iid movie movieid product productid book bookid isbn asin parentasin artist artistid "
    "track trackid song songid business businessid article articleid anime animeid game gameid".split()
)


@dataclass(frozen=True)
class _Layout:
    """How a text file is laid out, as far as its beginning shows."""

    format: str
    separator: str = " "
    header: bool = False
    user_column: int = 0
    item_column: int = 1
    blank: int = 0  # lines before the first that is not blank


@dataclass(frozen=True)
class _Pairs:
    """Two polars columns of ids, parallel, without missing values: Int64 or String."""

    user: Any
    item: Any
    description: str


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

        Text is UTF-8, and may be compressed with gzip. Ids are integers or strings; blanks around them are
        dropped. They count as integers if every one of a column is written as one (``007`` is not).
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
    pairs = _read(path, file_format)
    (user_ids, (users,)), (item_ids, (items,)) = _index([pairs.user]), _index([pairs.item])
    unique = UserItems.from_pairs(users, items, len(user_ids), len(item_ids))
    return Interactions(unique, user_ids, item_ids, len(users) - len(unique), pairs.description)


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
    known, wanted = _read(train, file_format), _read(test, file_format)
    user_ids, (train_users, test_users) = _index([known.user, wanted.user])
    item_ids, (train_items, test_items) = _index([known.item, wanted.item])
    shape = len(user_ids), len(item_ids)
    train_pairs = UserItems.from_pairs(train_users, train_items, *shape)
    test_pairs = UserItems.from_pairs(test_users, test_items, *shape)
    seen = train_pairs.contains(test_pairs)
    strangers = train_pairs.counts()[test_pairs.users()] == 0
    counts = {
        "repeated pairs of the training file were used once": len(train_users) - len(train_pairs),
        "repeated pairs of the test file were used once": len(test_users) - len(test_pairs),
        "test interactions left out: they are in the training file": int(seen.sum()),
        "test interactions left out: their user is not in the training file": int(strangers.sum()),
    }
    kept = test_pairs.select(~(seen | strangers))
    if not len(kept):
        raise InteractionsError(
            f"{test}: none of its {len(test_pairs):,} interactions can be predicted: {strangers.sum():,} "
            f"are of users that {train} does not have, and {seen.sum():,} are in it too"
        )
    notes = [f"{count:,} {what}" for what, count in counts.items() if count]
    description = f"trained on {known.description}; tested on {wanted.description}"
    return Split(train_pairs, kept, user_ids, item_ids, description, notes)


def _index(columns: list[Any]) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
    """Map the ids in polars columns to rows 0..n-1, the same id to the same row in all columns."""
    pl = require("polars", "train", "reading interactions")
    if any(column.dtype != pl.Int64 for column in columns):
        columns = [column.cast(pl.String) for column in columns]
        if all(column.str.contains(_INTEGER).all() for column in columns):
            columns = [column.cast(pl.Int64) for column in columns]
    values = pl.concat(columns)
    ids = values.unique().sort()
    if values.dtype == pl.Int64:
        ids = ids.to_numpy()
        return ids, [np.searchsorted(ids, column.to_numpy()) for column in columns]
    codes = pl.Enum(ids)
    return ids.to_numpy().astype(object), [column.cast(codes).to_physical().to_numpy() for column in columns]


def _read(path: str | os.PathLike[str], file_format: str) -> _Pairs:
    if file_format not in FORMATS:
        raise OptionError(f"file_format: expected one of {', '.join(FORMATS)}, got {file_format!r}")
    pl = require("polars", "train", "reading interactions")
    file = Path(path)
    if file.is_dir():
        raise InteractionsError(f"{file}: is a directory; name the file in it that has the interactions")
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
        if file_format == "parquet" or (file_format == "auto" and magic == b"PAR1"):
            return _read_parquet(pl, file)
        layout = _sniff(file, _sample(file, magic), file_format)
        adjacency = layout.format == "adjacency"
        pairs = _read_adjacency(pl, file) if adjacency else _read_delimited(pl, file, layout)
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InteractionsError(f"{file}: polars cannot read it: {reason}") from error
    except (OSError, EOFError, UnicodeError) as error:  # EOFError: a gzip file that was cut off
        raise InteractionsError(
            f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not len(pairs.user):
        raise InteractionsError(f"{file}: has no interactions; expected a user and an item on each line")
    return pairs


def _sample(file: Path, magic: bytes) -> list[str]:
    """Return the first lines of a text file."""
    with gzip.open(file) if magic.startswith(b"\x1f\x8b") else file.open("rb") as stream:
        head = stream.read(_SAMPLE_BYTES)
    if not head.strip():
        raise InteractionsError(f"{file}: is empty; expected a user and an item on each line")
    if b"\0" in head:
        raise InteractionsError(f"{file}: is a binary file; expected text in UTF-8 (gzip is fine) or Parquet")
    if len(head) == _SAMPLE_BYTES:
        head = head[: head.rfind(b"\n") + 1] or head
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = head.count(b"\n", 0, error.start) + 1
        raise InteractionsError(
            f"{file}, line {line}: is not UTF-8; convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error
    return text.splitlines()


def _sniff(file: Path, sample: list[str], file_format: str) -> _Layout:
    lines = [line for line in sample if line.strip()]
    blank = sample.index(lines[0])
    separator = _separator(file, lines, file_format)
    rows = [_fields(line, separator) for line in lines]
    if separator == " ":
        ragged = len({len(row) for row in rows}) > 1 and len({row[0] for row in rows}) == len(rows)
        if file_format == "adjacency" or (file_format == "auto" and ragged):
            return _Layout("adjacency")
    first, others = rows[0], rows[1:]
    names = [re.sub(r"[^a-z]", "", name.partition(":")[0].lower()) for name in first]
    users = [at for at, name in enumerate(names) if name in _USER_NAMES]
    items = [at for at, name in enumerate(names) if name in _ITEM_NAMES]
    if users and items:
        return _Layout("delimited", separator, True, users[0], items[0], blank)
    # A header has no numbers, and below it in the one column or the other stand nothing but numbers.
    header = bool(others) and not any(re.fullmatch(_NUMBER, field) for field in first)
    header = header and any(
        all(re.fullmatch(_NUMBER, row[at]) for row in others if len(row) > at) for at in (0, 1)
    )
    return _Layout("delimited", separator, header, blank=blank)


def _separator(file: Path, lines: list[str], file_format: str) -> str:
    if file_format == "adjacency":
        return " "
    counts = {separator: sum(separator in line for line in lines) for separator in _SEPARATORS}
    for separator, count in counts.items():
        if 2 * count > len(lines):
            return separator
    best = max(counts, key=lambda separator: counts[separator])
    if not counts[best]:
        raise InteractionsError(
            f"{file}: has one column only (line 1 is {lines[0][:60]!r}); expected a user and an item on each "
            f"line, separated by one of {', '.join(_SEPARATORS.values())}"
        )
    return best


def _fields(line: str, separator: str) -> list[str]:
    fields = line.split() if separator == " " else line.split(separator)
    return [field.strip().strip('"').strip() for field in fields]


def _lines(pl: Any, file: Path) -> Any:
    """Read a text file as one polars column of lines, blank ones dropped."""
    frame = pl.read_csv(
        file, separator="\x01", quote_char=None, has_header=False, infer_schema_length=0, new_columns=["line"]
    )
    lines = frame["line"].drop_nulls().str.strip_chars()
    return lines.filter(lines.str.len_bytes() > 0)


def _read_adjacency(pl: Any, file: Path) -> _Pairs:
    fields = _lines(pl, file).str.replace_all(r"\s+", " ").str.split(" ")
    frame = pl.DataFrame({"user": fields.list.first(), "item": fields.list.slice(1)})
    frame = frame.filter(pl.col("item").list.len() > 0).explode("item")
    return _Pairs(frame["user"], frame["item"], f"{file.name}, adjacency lines (user item item ...)")


def _read_delimited(pl: Any, file: Path, layout: _Layout) -> _Pairs:
    wanted = (layout.user_column, layout.item_column)
    if layout.separator in (" ", "::"):
        lines = _lines(pl, file)
        if layout.separator == " ":
            lines = lines.str.replace_all(r"\s+", " ")
        fields = lines.str.split(layout.separator)
        columns = [fields.list.get(at, null_on_oob=True) for at in wanted]
    else:
        frame = pl.read_csv(
            file,
            separator=layout.separator,
            quote_char=None if layout.separator == "\t" else '"',
            skip_rows=layout.blank,  # the first line that polars sees says how many columns there are
            has_header=False,  # so that the header, if any, is a row like the others: nothing to mangle
            infer_schema_length=0,  # every column is text
            truncate_ragged_lines=True,
        )
        columns = [frame[frame.columns[at]] for at in wanted if at < frame.width]
    if len(columns) < 2:
        raise _missing_field(file, layout)
    columns = [column.str.strip_chars() for column in columns]
    pairs = pl.DataFrame({"user": columns[0], "item": columns[1]})
    pairs = pairs.with_columns(pl.when(pl.all().str.len_bytes() > 0).then(pl.all()))  # "" -> null
    pairs = pairs.filter(pl.any_horizontal(pl.all().is_not_null()))  # blank lines
    pairs = pairs.slice(1) if layout.header else pairs
    if pairs["user"].null_count() or pairs["item"].null_count():
        raise _missing_field(file, layout)
    header = "with header" if layout.header else "no header"
    how = f"{file.name}, delimited text ({_SEPARATORS[layout.separator]}, {header})"
    if wanted != (0, 1):
        how += f", users in column {wanted[0] + 1} and items in column {wanted[1] + 1} by their names"
    return _Pairs(pairs["user"], pairs["item"], how)


def _missing_field(file: Path, layout: _Layout) -> InteractionsError:
    """Look for the first line without a user or an item, slowly: this is the way to an error message."""
    with file.open("rb") as raw:
        magic = raw.read(2)
    where, got = "", ""
    with gzip.open(file) if magic == b"\x1f\x8b" else file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = line.decode("utf-8", "replace").strip("\r\n")
            fields = _fields(text, layout.separator)
            wanted = (layout.user_column, layout.item_column)
            if text.strip() and not all(at < len(fields) and fields[at] for at in wanted):
                where, got = f", line {number}", f", got {text[:60]!r}"
                break
    return InteractionsError(
        f"{file}{where}: expected a user and an item separated by {_SEPARATORS[layout.separator]}{got}; "
        f"mend or remove the line (or choose another --format)"
    )


def _read_parquet(pl: Any, file: Path) -> _Pairs:
    names = list(pl.read_parquet_schema(file))
    if len(names) < 2:
        raise InteractionsError(f"{file}: has the columns {names}; expected one of users and one of items")
    plain = [re.sub(r"[^a-z]", "", name.lower()) for name in names]
    users = [name for name, key in zip(names, plain, strict=True) if key in _USER_NAMES]
    items = [name for name, key in zip(names, plain, strict=True) if key in _ITEM_NAMES]
    wanted = [users[0], items[0]] if users and items else names[:2]
    frame = pl.read_parquet(file, columns=wanted)
    if not frame.height:
        raise InteractionsError(f"{file}: has no rows")
    user, item = (_id_column(pl, file, frame[name]) for name in wanted)
    return _Pairs(user, item, f"{file.name}, Parquet (users in {wanted[0]!r}, items in {wanted[1]!r})")


def _id_column(pl: Any, file: Path, column: Any) -> Any:
    if column.null_count():
        row = column.is_null().arg_max()
        raise InteractionsError(f"{file}, row {row}: has no value in column {column.name!r}; drop such rows")
    if column.dtype.is_integer() and column.dtype != pl.UInt64:
        return column.cast(pl.Int64)
    if column.dtype.is_integer() or column.dtype in (pl.String, pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    raise InteractionsError(
        f"{file}: column {column.name!r} has the type {column.dtype}; ids must be integers or strings"
    )
