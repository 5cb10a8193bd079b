# SPDX-License-Identifier: Apache-2.0
"""Files of interactions -> `Interactions` or `Split`: delimited text, adjacency lines, JSON lines, Parquet.

Text is read once, from beginning to end and a block at a time, with the standard library: pipes can be read,
and memory follows the distinct ids and pairs, not the size of the file. Parquet is polars' work. What is ours
is to tell the formats apart, to find the two columns, to say what was understood, and where a file is wrong.
"""

from __future__ import annotations

import io
import os
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.codes import Codes, Ids, Pairs, distinct_pairs
from nb_sparse_adam._src.recommender.columns import ReadOptions, find_columns, what_was_taken
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems
from nb_sparse_adam._src.recommender.packed import unpacked
from nb_sparse_adam._src.recommender.ratings import AtLeast
from nb_sparse_adam._src.recommender.text import read_text
from nb_sparse_adam.errors import InteractionsError, OptionError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_interactions(
    path: Paths,
    file_format: str = "auto",
    *,
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    separator: str | None = None,
    header: bool | None = None,
    min_rating: float | None = None,
    rating_column: str | int | None = None,
) -> Interactions:
    """Read interactions from a file, or from several.

    Parameters
    ----------
    path : path, or sequence of paths
        Of several, the interactions of all are taken. The string ``"-"`` is standard input (``"./-"`` is a
        file of that name). Each is one of:

        * delimited text (comma, tab, semicolon, space or ``::``), with or without a header. Users and items
          are in the columns that the header names so, in one of many languages; else the user is in the first
          column and the item in the second. Quotes are understood with comma and semicolon.
        * LightGCN adjacency lines, ``user item item ...``; a user without items is left out.
        * JSON lines: an object on each, users and items under keys with such names.
        * Parquet: columns with such names, else the first two.

        Further columns are ignored; the description of the result says which were taken. Where names do not
        say which column is which, the file is refused. So is a matrix of ratings, a row for each user, and a
        file in the format of libfm.

        Text is UTF-8, and may be compressed with gzip or Zstandard; it is read once, from beginning to end,
        so that it may come from a pipe. Nothing is fetched: an address is refused. Lines end as on Unix,
        Windows or old Macs, and have at most 16,777,216 characters. Lines at the beginning that start with
        ``#`` or ``%`` and a blank are comments. A field in quotes may have line ends in it, but an id may
        not; such line ends are counted in the description, for a quote that does not match makes the lines
        below it part of its field.

        Ids are integers or strings; blanks around them are dropped. They count as integers if every one of a
        column is written as one (``007`` is not) and fits int64. The name of a file is taken as it is: there
        are no wildcards.
    file_format : {"auto", "delimited", "adjacency", "json", "parquet"}
        ``"auto"`` looks at the beginning of the file. Lines separated by spaces are ambiguous: they are
        taken for adjacency lines if they differ in length and no first field comes twice, else for
        delimited text.
    user_column, item_column : str or int, optional
        Names of columns, or their numbers counted from 1; of JSON lines, keys.
    separator : str, optional
        Of delimited text: ``"comma"``, ``"tab"``, ``"semicolon"``, ``"space"``, ``"pipe"``, or characters.
    header : bool, optional
        Whether the first line of delimited text names the columns. It is found out if this is None: it does
        if it has usual names of columns, or no number where all lines below it do, or if it has, where ids
        repeat, ids that come nowhere else. Where that cannot be told, the file is refused.
    min_rating : float, optional
        Interactions with a rating below it are left out; the description says how many.
    rating_column : str or int, optional
        Where ratings are, as in `user_column`. None: in the column with a name like ``rating``.

    Returns
    -------
    Interactions

    Raises
    ------
    InteractionsError
        If a file cannot be read, has no interactions, or can be understood in more than one way.
    MissingExtraError
        If polars is not installed; or, for Zstandard, zstandard.
    OptionError
        If an option is out of its domain, or cannot work with the file: Parquet has no separator.
    """
    options = ReadOptions(file_format, user_column, item_column, rating_column, separator, header, min_rating)
    users, items = Ids(), Ids()
    files = _files(path)
    pairs = _read_all(files, options, users, items)
    (user_ids, user_rows), (item_ids, item_rows) = users.sorted(), items.sorted()
    shape = len(user_ids), len(item_ids)
    unique = UserItems.from_pairs(user_rows[pairs.users], item_rows[pairs.items], *shape)
    return Interactions(unique, user_ids, item_ids, pairs.read - len(unique), pairs.description)


def read_split(
    train: Paths,
    test: Paths,
    file_format: str = "auto",
    *,
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    separator: str | None = None,
    header: bool | None = None,
    min_rating: float | None = None,
    rating_column: str | int | None = None,
) -> Split:
    """Read what to train on and what to predict from two files, or from several each.

    Items that occur in `test` only stay in the catalogue. Test interactions that are in `train` too are left
    out, and so are those of users of whom `train` knows nothing; the notes of the split say how many.

    Parameters
    ----------
    train, test : path, or sequence of paths
        As in `read_interactions`.
    file_format : {"auto", "delimited", "adjacency", "json", "parquet"}
        The format of all files, as in `read_interactions`.
    user_column, item_column, separator, header, min_rating, rating_column
        Of all files, as in `read_interactions`.

    Returns
    -------
    Split

    Raises
    ------
    InteractionsError, MissingExtraError, OptionError
        As `read_interactions` does; also if nothing of `test` remains.
    """
    options = ReadOptions(file_format, user_column, item_column, rating_column, separator, header, min_rating)
    users, items = Ids(), Ids()
    sources = _files(train), _files(test)
    if sum(source.count("-") for source in sources) > 1:
        raise OptionError("standard input, -, can be read once; name it once")
    known, wanted = (_read_all(files, options, users, items) for files in sources)
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
            f"{_named(sources[1])}: none of its {len(test_pairs):,} interactions can be predicted: "
            f"{strangers.sum():,} are of users that {_named(sources[0])} does not have, and "
            f"{seen.sum():,} are in it too"
        )
    notes = [f"{count:,} {what}" for what, count in counts.items() if count]
    description = f"trained on {known.description}; tested on {wanted.description}"
    return Split(train_pairs, kept, user_ids, item_ids, description, notes)


def _files(path: Paths) -> list[str | os.PathLike[str]]:
    files = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not files:
        raise OptionError("path: expected a file, got an empty sequence")
    if files.count("-") > 1:
        raise OptionError("standard input, -, can be read once; name it once")
    return files


def _named(files: Sequence[str | os.PathLike[str]]) -> str:
    return ", ".join(_printable(os.fspath(file)) for file in files)


def _read_all(files: Sequence[str | os.PathLike[str]], options: ReadOptions, users: Ids, items: Ids) -> Pairs:
    read = [_read(file, options, users, items) for file in files]
    if len(read) == 1:
        return read[0]
    distinct = distinct_pairs((pairs.users, pairs.items) for pairs in read)[:2]
    return Pairs(*distinct, sum(pairs.read for pairs in read), "; ".join(pairs.description for pairs in read))


def _read(path: str | os.PathLike[str], options: ReadOptions, users: Ids, items: Ids) -> Pairs:
    pl = require("polars", "train", "reading interactions")
    name = "standard input" if path == "-" else _printable(os.fspath(path))
    label = name if path == "-" else _printable(Path(path).name)
    try:
        with _opened(path, name) as stream:
            magic = stream.peek(4)[:4]
            if options.file_format == "parquet" or (options.file_format == "auto" and magic == b"PAR1"):
                pairs = _read_parquet(pl, name, label, stream, options, users, items)
            else:
                with unpacked(name, stream, magic) as text:
                    pairs = read_text(name, label, text, options, users, items)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InteractionsError(f"{name}: polars cannot read it: {reason}") from error
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a compressed file that was cut off
        reason = getattr(error, "strerror", None) or str(error)
        raise InteractionsError(f"{name}: cannot be read: {reason}{_hint(path, error)}") from error
    if not pairs.read:
        left = " left: all are rated too low" if options.min_rating is not None else ""
        raise InteractionsError(
            f"{name}: has no interactions{left}; expected a user and an item on each line"
        )
    return pairs


def _opened(path: str | os.PathLike[str], name: str) -> Any:
    if path == "-":
        if sys.stdin is None:
            raise InteractionsError("standard input is closed; name a file")
        return open(os.dup(sys.stdin.fileno()), "rb")
    if Path(path).is_dir():
        raise InteractionsError(f"{name}: is a directory; name the file in it that has the interactions")
    return Path(path).open("rb")


def _hint(path: str | os.PathLike[str], error: Exception) -> str:
    # pathlib makes one slash of two.
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", os.fspath(path))
    if address is None or not isinstance(error, FileNotFoundError):
        return ""
    if address[1].lower() == "file":
        return "; it is a URL: give the path alone"
    return "; it is a URL, which is not fetched: download it first, or give - and pipe it in"


def _read_parquet(
    pl: Any, name: str, label: str, stream: Any, options: ReadOptions, users: Ids, items: Ids
) -> Pairs:
    options.refuse_what_has_no_meaning("parquet", name)
    # polars is given what is open, not the name: in names it looks for wildcards.
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    names = list(pl.read_parquet_schema(source))
    if len(names) < 2:
        raise InteractionsError(f"{name}: has the columns {names}; expected one of users and one of items")
    columns = find_columns(name, options, names, len(names))
    source.seek(0)
    frame = pl.read_parquet(source, columns=[names[column] for column in columns.all()])
    if not frame.height:
        raise InteractionsError(f"{name}: has no rows; expected an interaction in each")
    kept = AtLeast(name, options)
    if columns.rating is not None:
        frame = _rated(pl, name, frame, names[columns.rating], kept)
    pairs = [
        _id_codes(pl, name, frame[names[column]], ids)
        for column, ids in ((columns.user, users), (columns.item, items))
    ]
    description = ", ".join([f"{label}, Parquet ({what_was_taken(columns, names)})", *kept.note()])
    return Pairs(*distinct_pairs([(pairs[0], pairs[1])]), description)


def _rated(pl: Any, name: str, frame: Any, rating: str, kept: AtLeast) -> Any:
    """Return the rows whose rating is high enough."""
    column = frame[rating]
    if not column.dtype.is_numeric():
        raise InteractionsError(
            f"{name}: column {rating!r} has the type {column.dtype}; ratings must be numbers"
        )
    values = column.cast(pl.Float64)
    unknown = values.is_null() | values.is_nan()
    if unknown.any():
        raise InteractionsError(
            f"{name}, row {unknown.arg_max()}: has no number in column {rating!r}; drop such rows"
        )
    high = values >= kept.least
    kept.dropped = frame.height - int(high.sum())
    return frame.filter(high)


def _id_codes(pl: Any, name: str, column: Any, ids: Ids) -> Codes:
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
    rows: Codes = column.replace_strict(distinct, codes).to_numpy()
    return rows


def _printable(text: str) -> str:
    """Return a name as it can be shown: in one line, and in Unicode."""
    return text if text.isprintable() else repr(text)
