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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.codes import Codes, Found, Ids, Pairs, distinct_pairs
from nb_sparse_adam._src.recommender.columns import ReadOptions, find_columns, what_was_taken
from nb_sparse_adam._src.recommender.further import Further
from nb_sparse_adam._src.recommender.given import Given
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems
from nb_sparse_adam._src.recommender.packed import unpacked
from nb_sparse_adam._src.recommender.text import read_text
from nb_sparse_adam.errors import InteractionsError, OptionError

Times = npt.NDArray[Any] | None
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
    sample_weights: bool = False,
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
    sample_weights : bool, default False
        Take ratings (stars, or how often a song was played) for the weights of interactions, which must be
        greater than 0; those of repeated pairs are added.

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
    options = ReadOptions(
        file_format, user_column, item_column, rating_column, separator, header, min_rating, sample_weights
    )
    return read_given(path, options).interactions


def read_given(path: Paths, options: ReadOptions) -> Given:
    """Read interactions as `read_interactions` does, with their times if the options say so."""
    users, items = Ids(), Ids()
    files = _files(path)
    pairs = _read_all(files, options, users, items)
    (user_ids, user_rows), (item_ids, item_rows) = users.sorted(), items.sorted()
    unique, times = _placed(files, pairs, user_rows, item_rows)
    repeated = pairs.read - len(unique)
    return Given(Interactions(unique, user_ids, item_ids, repeated, pairs.description), times)


def _placed(
    files: Sequence[str | os.PathLike[str]], pairs: Pairs, user_rows: Codes, item_rows: Codes
) -> tuple[UserItems, Times]:
    """Return interactions by the rows of their codes, and their times, parallel."""
    users, items, weights, times = pairs.found
    users, items = user_rows[users], item_rows[items]
    if weights is not None and weights.max(initial=0) > np.finfo(np.float32).max:
        raise InteractionsError(
            f"{_named(files)}: sample_weights of repeated pairs add up to more than float32 holds; divide all"
        )
    unique = UserItems.from_pairs(
        users, items, len(user_rows), len(item_rows), None if weights is None else weights.astype(np.float32)
    )
    return unique, None if times is None else times[np.lexsort((items, users))]


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
    sample_weights: bool = False,
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
    sample_weights : bool, default False
        Of the files to train on, as in `read_interactions`.

    Returns
    -------
    Split

    Raises
    ------
    InteractionsError, MissingExtraError, OptionError
        As `read_interactions` does; also if nothing of `test` remains.
    """
    options = ReadOptions(
        file_format, user_column, item_column, rating_column, separator, header, min_rating, sample_weights
    )
    return read_given_split(train, test, options)[0]


def read_given_split(train: Paths, test: Paths, options: ReadOptions) -> tuple[Split, Times]:
    """Read as `read_split` does; the second are the times to train on, (n,), if the options want them."""
    users, items = Ids(), Ids()
    sources = _files(train), _files(test)
    if sum(source.count("-") for source in sources) > 1:
        raise OptionError("standard input, -, can be read once; name it once")
    of_test = replace(  # of which neither weights nor times are used
        options,
        sample_weights=False, times=False, time_column=None,
        rating_column=None if options.min_rating is None else options.rating_column,
    )  # fmt: skip
    known = _read_all(sources[0], options, users, items)
    wanted = _read_all(sources[1], of_test, users, items)
    (user_ids, user_rows), (item_ids, item_rows) = users.sorted(), items.sorted()
    (train_pairs, times), (test_pairs, _) = (
        _placed(files, pairs, user_rows, item_rows)
        for files, pairs in zip(sources, (known, wanted), strict=True)
    )
    seen = train_pairs.contains(test_pairs)
    strangers = train_pairs.counts()[test_pairs.users()] == 0
    counts = {
        f"repeated pairs of the training file {what_of_repeated(train_pairs)}": known.read - len(train_pairs),
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
    return Split(train_pairs, kept, user_ids, item_ids, description, notes), times


def what_of_repeated(pairs: UserItems) -> str:
    """Say what became of pairs that came several times."""
    return "were used once" if pairs.weights is None else "had their weights added"


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
    for pairs, file in zip(read, files, strict=True):
        _refuse_mixed(pairs.found.times, read[0].found.times, file, files[0])
    distinct, _ = distinct_pairs(pairs.found for pairs in read)
    return Pairs(distinct, sum(pairs.read for pairs in read), "; ".join(pairs.description for pairs in read))


def _refuse_mixed(times: Times, first: Times, *files: str | os.PathLike[str]) -> None:
    if times is None or first is None or (times.dtype.kind == "M") == (first.dtype.kind == "M"):
        return
    kinds = [
        f"{_named([file])} has {'dates' if one.dtype.kind == 'M' else 'numbers'}"
        for file, one in zip(files, (times, first), strict=True)
    ]
    raise InteractionsError(f"{' and '.join(kinds)} as times; expected the same in all files")


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
    further = Further(name, options)
    ratings, times = (
        None if kind not in columns.further else read(pl, name, frame[names[columns.further[kind]]])
        for kind, read in (("rating", _ratings), ("time", _times))
    )
    taken = further.of_arrays(ratings, times, lambda row: f"row {row}")
    if taken.mask is not None:
        frame = frame.filter(pl.Series(taken.mask))
    pairs = [
        _id_codes(pl, name, frame[names[column]], ids)
        for column, ids in ((columns.user, users), (columns.item, items))
    ]
    description = ", ".join([f"{label}, Parquet ({what_was_taken(columns, names)})", *further.note()])
    return Pairs(*distinct_pairs([Found(pairs[0], pairs[1], taken.weights, taken.times)]), description)


def _ratings(pl: Any, name: str, column: Any) -> npt.NDArray[np.float64]:
    """Return the ratings in a polars column."""
    if not column.dtype.is_numeric():
        raise InteractionsError(
            f"{name}: column {column.name!r} has the type {column.dtype}; ratings must be numbers"
        )
    values: npt.NDArray[np.float64] = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
    _refuse_unknown(name, column.name, np.isnan(values))
    return values


def _times(pl: Any, name: str, column: Any) -> npt.NDArray[Any]:
    """Return the times in a polars column: numbers, dates, or text of ISO 8601."""
    kind = column.dtype
    _refuse_unknown(name, column.name, column.is_null().to_numpy())
    if kind == pl.String:
        return Further(name, ReadOptions(times=True)).times(column.to_list(), lambda row: f"row {row}")
    if kind.is_integer() or kind.is_float():
        values: npt.NDArray[Any] = column.cast(pl.Float64 if kind.is_float() else pl.Int64).to_numpy()
        _refuse_unknown(name, column.name, ~np.isfinite(values))
        return values
    if kind not in (pl.Date, pl.Datetime):
        raise InteractionsError(
            f"{name}: column {column.name!r} has the type {kind}; times must be numbers, dates or text"
        )
    column = column.cast(pl.Datetime("us")) if kind == pl.Date else column.dt.cast_time_unit("us")
    instants: npt.NDArray[Any] = column.to_physical().to_numpy().view("M8[us]")
    return instants


def _refuse_unknown(name: str, column: str, unknown: npt.NDArray[np.bool_]) -> None:
    if unknown.any():
        raise InteractionsError(
            f"{name}, row {unknown.argmax()}: has no number in column {column!r}; drop such rows"
        )


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
