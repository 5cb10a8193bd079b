# SPDX-License-Identifier: Apache-2.0
"""What is in an `EmbeddingTable` at one moment, read later, piece by piece, while the table goes on.

To capture a table takes no longer than to copy what is small: the numbers of records that are nobody's, the
filter of `admission`, ages. From then on, whoever changes a row has its record kept aside first
(`Store.keep_aside`), once; a row that is read is the one that was kept or, if none was, the one that is
there. New rows are in records that were nobody's, or come after those that were used.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.tensor_files import PieceReader, rows_of_size
from nb_sparse_adam._src.engine.records import GLOBAL, ROW
from nb_sparse_adam._src.table.records import fields_of

if TYPE_CHECKING:
    from nb_sparse_adam._src.table.embedding_table import EmbeddingTable

AT_ONCE = 1 << 16  # rows of which is asked at a time whether they were kept; who changes rows waits for that
COPY_BYTES = 1 << 20  # of rows that are copied at a time, which takes as much memory beside them
_UNWANTED = 2**31 - 1  # the place of rows that are not in it; there are not as many
BLOCK_BYTES = 1 << 22  # of rows that are kept aside; there is memory for more when it is needed


class _Rows:
    """Rows of an array, and of some of them what they were."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.blocks: list[NDArray[Any]] = []
        self.in_block = rows_of_size(array.dtype, array.shape, BLOCK_BYTES)

    def keep(self, rows: NDArray[np.integer[Any]], first: int) -> None:
        """Copy rows to the places from the first one on."""
        blocks, done = self.blocks, 0  # if it is closed meanwhile, by another thread, those go with this call
        while done < len(rows):
            block, at = divmod(first + done, self.in_block)
            while block >= len(blocks):
                blocks.append(np.empty((self.in_block, *self.array.shape[1:]), self.array.dtype))
            end = min(done + self.in_block - at, len(rows))
            into = blocks[block][at : at + end - done]
            np.take(self.array, rows[done:end], 0, into, "clip")  # "raise" would copy once more
            done = end


class Capture:
    """A table at the moment at which this is made, while nobody writes to the table.

    Parameters
    ----------
    table : EmbeddingTable
    since : int, optional
        Only rows that were touched after this time of its clock.
    """

    def __init__(self, table: EmbeddingTable, since: int | None = None) -> None:
        store, state = table._store, table._store.table
        self._store, self._since = store, since
        self._saying = (
            threading.RLock()
        )  # not the table's, which a thread that steps all the time hardly lets go of
        self._process = os.getpid()
        self._free = store.free.copy()
        self._places = np.zeros(store.used, np.int32)  # 0: not kept; what is not looked at takes no memory
        self._kept = 0
        self._fields = partial(fields_of, dim=store.dim, dtype=store.dtype, count_rule=state.mode)
        wide = state.wide_counts()
        self._is_wide, self._by_row = wide.shape[1] > 0, state.mode == ROW
        self._records, self._wide = _Rows(store.records), _Rows(wide[: store.used])
        self._count = state.steps.copy() if state.mode == GLOBAL else None
        self._counters, self._ages = table._admission.counters.copy(), table._ages.entries.copy()
        self._reference = weakref.ref(self)
        store.captures.append(self._reference)

    @property
    def is_of_this_process(self) -> bool:
        """Whether it was not made by the one that this was forked from, whose save it is of."""
        return os.getpid() == self._process

    def close(self) -> None:
        """Let go of what was kept; nothing can be read any more."""
        self._store.forget(self._reference)
        for rows in (self._records, self._wide):
            rows.blocks = []

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Keep what rows hold, which are about to be changed: of those that are in it, what was not kept."""
        rows = rows[(rows >= 0) & (rows < len(self._places))]
        rows = rows[self._places[rows] <= 0]
        if not len(rows):
            return
        # Each once: the number that stays where several are written is that of one of them.
        numbers = -1 - np.arange(len(rows), dtype=np.int32)
        self._places[rows] = numbers
        rows = rows[self._places[rows] == numbers]
        first = self._kept
        self._records.keep(rows, first)
        if self._is_wide:
            self._wide.keep(rows, first)
        self._kept = first + len(rows)  # before places say so: an interrupt may come between
        numbers = np.arange(first + 1, self._kept + 1, dtype=np.int32)
        with self._saying:
            self._places[rows] = numbers

    # --- reading ------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, PieceReader]:
        """Give `snapshot.ARRAYS`."""
        is_in = np.ones(len(self._places), np.bool_)
        is_in[self._free] = False
        rows = np.flatnonzero(is_in).astype(np.int32)  # there are fewer than 2**31
        if self._since is not None:
            is_later = Column(self, "touched", rows)[:] > self._since
            is_in[rows[~is_later]] = False
            rows = rows[is_later]
        self._places[~is_in] = _UNWANTED  # whatever `keep` writes there meanwhile: nobody reads it
        del is_in
        ids = Column(self, "ids", rows)[:]
        order = np.argsort(ids)
        rows, ids = rows[order], ids[order]
        del order
        names = ("admitted", "touched", "seen", "param", "exp_avg", "exp_avg_sq")
        return {
            "ids": ids,
            **{name: Column(self, name, rows) for name in names},
            "steps": Column(self, "steps", rows) if self._count is None else self._count,
            "counters": self._counters,
            "ages_clock": np.array([entry[0] for entry in self._ages], np.int64),
            "ages_seconds": np.array([entry[1] for entry in self._ages], np.float64),
            "ages_steps": np.array([entry[2] for entry in self._ages], np.int64),
        }

    def see(self, name: str, number: int | None = None) -> NDArray[Any]:
        """See a field of all rows as they are, or of a block of those that were kept."""
        if name == "steps" and self._is_wide:
            rows = self._wide
            counts = rows.array if number is None else rows.blocks[number]
            return counts[:, 0] if self._by_row else counts
        rows = self._records
        return self._fields(rows.array if number is None else rows.blocks[number])[name]

    def read(self, name: str, rows: NDArray[np.integer[Any]], out: NDArray[Any]) -> None:
        """Read a field of some rows, as it was.

        What is there is copied while others may change it: who does so has kept it aside, and said so,
        before. So a row of which nobody has said so after it was copied had not been changed then.
        """
        self.copy(name, rows, out)
        with self._saying:
            places = self._places[rows]
        kept = np.flatnonzero(places > 0)  # what was kept stays as it is
        in_block = (self._wide if name == "steps" and self._is_wide else self._records).in_block
        blocks, at = np.divmod(places[kept] - 1, in_block)
        for block in np.unique(blocks):
            which = blocks == block
            out[kept[which]] = self.see(name, block)[at[which]]

    def copy(self, name: str, rows: NDArray[np.integer[Any]], out: NDArray[Any]) -> None:
        """Copy a field of some rows as it is."""
        array = self.see(name)
        at_once = rows_of_size(out.dtype, out.shape, COPY_BYTES)
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            out[part] = array[rows[part]]


class Column:
    """A field of some rows of a capture, which is read a piece at a time."""

    def __init__(self, capture: Capture, name: str, rows: NDArray[np.integer[Any]]) -> None:
        self._capture, self._name, self._rows = capture, name, rows
        like = capture.see(name)
        self.dtype: np.dtype[Any] = like.dtype
        self.shape = (len(rows), *like.shape[1:])
        self.ndim = like.ndim

    def __getitem__(self, part: Any, /) -> NDArray[Any]:
        rows = self._rows[part]
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for first in range(0, len(rows), AT_ONCE):
            piece = slice(first, first + AT_ONCE)
            self._capture.read(self._name, rows[piece], out[piece])
        return out
