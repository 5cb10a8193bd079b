# SPDX-License-Identifier: Apache-2.0
"""Text files: decoded, read a block of whole lines at a time, and taken apart into the fields of records."""

from __future__ import annotations

import codecs
import csv
import io
import re
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from nb_sparse_adam.errors import InteractionsError

CARRIAGE_RETURN = "\udc0d"  # stands for one within a line, where csv would take it for a line end

_QUOTING = (",", ";")  # beside the others, a quote is a character like any other
_BLOCK = 1 << 20  # characters that are read at a time
_LONGEST_LINE = 1 << 24
_RECORDS = 1 << 10  # with quotes in them that are passed on at a time
_LIMIT = threading.Lock()

Lines = tuple[int, str]  # the number of the first line, and lines without the last one's end


def decoded(name: str, stream: Any) -> io.TextIOWrapper:
    """Read a stream of bytes as text in UTF-8; UTF-16 is refused."""
    head = stream.peek(1)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InteractionsError(f"{name}: is UTF-16; convert it, for example with: iconv -f utf-16 -t utf-8")
    # Old Macs end lines with a carriage return. In other files it is a character like any other.
    newline = None if b"\r" in head[:-1] and b"\n" not in head else "\n"
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)


def blocks_of(name: str, decoder: io.TextIOWrapper) -> Iterator[Lines]:
    """Yield blocks of whole lines; the first has two at least, if there are: one does not show a format."""
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
            yield number, _as_text(name, number, whole)
            number += whole.count("\n") + 1
        else:
            rest = whole + end + rest
    if rest:
        yield number, _as_text(name, number, rest.rstrip("\r"))


def _as_text(name: str, number: int, text: str) -> str:
    """Refuse lines, of which the first has this number, that are no text; mark stray carriage returns."""
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
    return text.replace("\r", CARRIAGE_RETURN)


def records_of(
    name: str, blocks: Iterator[Lines], separator: str, splits: int = -1
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
    name: str, blocks: Iterator[Lines], separator: str, splits: int
) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Yield the same where fields may be in quotes, and then have separators and line ends in them."""
    lines = ((n, line) for first, text in blocks for n, line in enumerate(text.split("\n"), first))
    numbers: list[int] = []
    rows: list[list[str]] = []
    below = 0
    for number, line in lines:
        if '"' in line:
            source = chain([line + "\n"], (more + "\n" for _, more in lines))
            reader = csv.reader(source, delimiter=separator, strict=True)
            try:
                row = _next_row(reader)
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


def _next_row(reader: Iterator[list[str]]) -> list[str]:
    """Return the next row of a csv reader, of which a field may be as long as a line."""
    with _LIMIT:  # there is one for the whole process
        limit = csv.field_size_limit(_LONGEST_LINE)
        try:
            return next(reader)
        finally:
            csv.field_size_limit(limit)
