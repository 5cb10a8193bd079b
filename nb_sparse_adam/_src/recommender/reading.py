# SPDX-License-Identifier: Apache-2.0
"""Files of interactions -> `Interactions` or `Split`: delimited text, LightGCN adjacency lines, Parquet.

Text is read once, from beginning to end and a block at a time, with the standard library: pipes can be read,
and memory follows the distinct ids and pairs, not the size of the file. Parquet is polars' work. What is ours
is to tell the formats apart, to find the two columns, to say what was understood, and where a file is wrong.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.codes import Codes, Ids, Pairs, distinct_pairs
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems
from nb_sparse_adam._src.recommender.layout import named_columns
from nb_sparse_adam._src.recommender.text import read_text
from nb_sparse_adam.errors import InteractionsError, OptionError

FORMATS = ("auto", "delimited", "adjacency", "parquet")


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
        Lines at the beginning that start with ``#`` or ``%`` and a blank are comments. A field in quotes may
        have line ends in it, but an id may not; such line ends are counted in the description, for a quote
        that does not match makes the lines below it part of its field.

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
    users, items = Ids(), Ids()
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
        The format of both files, as in `read_interactions`.

    Returns
    -------
    Split

    Raises
    ------
    InteractionsError, MissingExtraError, OptionError
        As `read_interactions` does; also if nothing of `test` remains.
    """
    users, items = Ids(), Ids()
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


def _read(path: str | os.PathLike[str], file_format: str, users: Ids, items: Ids) -> Pairs:
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
                    pairs = read_text(name, shown, unpacked, file_format, users, items)
            else:
                pairs = read_text(name, shown, stream, file_format, users, items)
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


def _read_parquet(pl: Any, name: str, shown: str, stream: Any, users: Ids, items: Ids) -> Pairs:
    # polars is given what is open, not the name: in names it looks for wildcards.
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    names = list(pl.read_parquet_schema(source))
    if len(names) < 2:
        raise InteractionsError(f"{name}: has the columns {names}; expected one of users and one of items")
    user, item = (names[column] for column in named_columns(names) or (0, 1))
    source.seek(0)
    frame = pl.read_parquet(source, columns=[user, item])
    if not frame.height:
        raise InteractionsError(f"{name}: has no rows; expected an interaction in each")
    pairs = [_id_codes(pl, name, frame[column], ids) for column, ids in ((user, users), (item, items))]
    description = f"{shown}, Parquet (users in {user!r}, items in {item!r})"
    return Pairs(*distinct_pairs([(pairs[0], pairs[1])]), description)


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
