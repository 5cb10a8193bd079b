# SPDX-License-Identifier: Apache-2.0
"""What else than user and item is read of interactions: ratings, which leave out or weigh, and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.recommender.codes import Found, Ids
from nb_sparse_adam._src.recommender.columns import ReadOptions
from nb_sparse_adam._src.recommender.interactions import is_weight
from nb_sparse_adam.errors import InteractionsError

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)

Where = Callable[[int], str]  # the place of an interaction -> where in the file it is


class Taken(NamedTuple):
    """What is taken of some interactions."""

    mask: npt.NDArray[np.bool_] | None = None  # (n,); None: all of them
    weights: npt.NDArray[np.float64] | None = None  # of those, if they have any
    times: npt.NDArray[Any] | None = None  # the same: int64, float64 or datetime64

    def of(self, who: Sequence[str], what: Sequence[str], users: Ids, items: Ids) -> Found:
        """Return them with codes of their users and items, which only what is taken is given."""
        if self.mask is not None:
            who, what = list(compress(who, self.mask)), list(compress(what, self.mask))
        return Found(users.codes(who), items.codes(what), self.weights, self.times)


class Further:
    """Reads the further columns of the file `name`, and counts what is left out."""

    def __init__(self, name: str, options: ReadOptions) -> None:
        self._name = name
        self._least, self._weighted = options.min_rating, options.sample_weights
        self._dropped = 0
        self._clock: Callable[[Sequence[str]], npt.NDArray[Any]] | None = None

    def of_text(self, lines: Sequence[int], columns: Mapping[str, Sequence[str]]) -> Taken:
        """Read the fields of some interactions, of which each has the number of its line.

        Parameters
        ----------
        lines : sequence of int, n
        columns : mapping
            ``"rating"`` and ``"time"``, those that are needed -> n fields.
        """
        if not any(map(len, columns.values())):
            return Taken()
        ratings, times = columns.get("rating"), columns.get("time")

        def where(place: int) -> str:
            return f"line {lines[place]}"

        return self.of_arrays(
            None if ratings is None else self._ratings(ratings, where),
            None if times is None else self.times(times, where),
            where,
        )

    def of_arrays(
        self,
        ratings: npt.NDArray[np.float64] | None,
        times: npt.NDArray[Any] | None,
        where: Where,
    ) -> Taken:
        """Take of interactions with these ratings and times, (n,) each, those that are rated high enough.

        Parameters
        ----------
        ratings : float64 array, shape (n,), optional
        times : array, shape (n,), optional
        where : callable
            Says where in the file an interaction is.
        """
        mask = None
        if ratings is not None and self._least is not None:
            mask = ratings >= self._least
            self._dropped += len(mask) - int(mask.sum())
        weights = ratings if self._weighted else None
        if weights is not None:
            with np.errstate(over="ignore", under="ignore"):
                wrong = ~is_weight(weights.astype(np.float32))
            at = np.flatnonzero(wrong if mask is None else wrong & mask)
            if len(at):
                raise InteractionsError(
                    f"{self._name}, {where(int(at[0]))}: the rating {weights[at[0]]:g} can be no weight, as "
                    f"sample_weights takes it for; expected a finite number greater than 0 (--min-rating "
                    f"leaves low ones out)"
                )
        if mask is not None:
            weights = None if weights is None else weights[mask]
            times = None if times is None else times[mask]
        return Taken(mask, weights, times)

    def note(self) -> list[str]:
        """Say how many were left out, if any could be, and what ratings are."""
        notes = []
        if self._least is not None:
            notes.append(f"{self._dropped:,} interactions left out: rated below {self._least:g}")
        return [*notes, "weighted by their ratings"] if self._weighted else notes

    def _ratings(self, texts: Sequence[str], where: Where) -> npt.NDArray[np.float64]:
        try:
            return _floats(texts)
        except ValueError:
            raise self._wrong("a number as rating", texts, _floats, where) from None

    def times(self, texts: Sequence[str], where: Where) -> npt.NDArray[Any]:
        """Read times: all are numbers, or all are dates, as those that were read before.

        Parameters
        ----------
        texts : sequence of str, n > 0
        where : callable
            Says where in the file an interaction is.

        Returns
        -------
        int64, float64 or datetime64 array, shape (n,)
        """
        if self._clock is None:
            self._clock = _instants if _fails(_numbers, texts[0]) else _numbers
        try:
            return self._clock(texts)
        except ValueError:
            kind = "a number" if self._clock is _numbers else "a number or a date like 2026-01-31T12:00:00Z"
            raise self._wrong(f"{kind} as time", texts, self._clock, where) from None

    def _wrong(
        self, expected: str, texts: Sequence[str], read: Callable[[Sequence[str]], Any], where: Where
    ) -> InteractionsError:
        at = next(place for place, text in enumerate(texts) if _fails(read, text))
        return InteractionsError(
            f"{self._name}, {where(at)}: expected {expected}, got {texts[at][:60]!r}; mend or remove the line"
        )


def _fails(read: Callable[[Sequence[str]], Any], text: str) -> bool:
    try:
        read([text])
    except ValueError:
        return True
    return False


def _floats(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    numbers = np.fromiter(map(float, texts), np.float64, len(texts))
    if np.isnan(numbers).any():
        raise ValueError
    return numbers


def _numbers(texts: Sequence[str]) -> npt.NDArray[Any]:
    """Return times as they are: integers exactly, for those in nanoseconds do not fit float64."""
    try:
        return np.fromiter(map(int, texts), np.int64, len(texts))
    except (ValueError, OverflowError):
        numbers = _floats(texts)
    if np.isinf(numbers).any():
        raise ValueError
    return numbers


def _instants(texts: Sequence[str]) -> npt.NDArray[np.datetime64]:
    """Return dates and times of ISO 8601; those that do not say where, in UTC."""
    instants: npt.NDArray[np.datetime64] = np.fromiter(map(_instant, texts), np.int64, len(texts)).view(
        "M8[us]"
    )
    return instants


def _instant(text: str) -> int:
    text = text.removesuffix(" UTC")  # as BigQuery writes it
    when = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
    return ((when if when.tzinfo else when.replace(tzinfo=timezone.utc)) - _EPOCH) // _MICROSECOND
