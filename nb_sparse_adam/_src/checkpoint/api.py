# SPDX-License-Identifier: Apache-2.0
"""What users call: an optimizer, or tables of ids, in a folder that is whole at every moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.manifest import read_manifest
from nb_sparse_adam._src.checkpoint.saving import (
    check_optimizer,
    folder_of,
    load_optimizer,
    restore_optimizer,
    save_optimizer,
)
from nb_sparse_adam._src.checkpoint.table_saving import save_tables
from nb_sparse_adam._src.checkpoint.tables import (
    compact_tables,
    load_tables,
    restore_tables,
    tables_in,
)
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam.errors import OptionError

Place = str | os.PathLike[str]
Places = Place | Sequence[Place]
Saved = SparseAdam | EmbeddingTable | Mapping[str, EmbeddingTable]


def _folders(paths: Any) -> list[Path]:
    """Read a path, or several: of a full save and its increments."""
    return [folder_of(path) for path in paths] if isinstance(paths, (list, tuple)) else [folder_of(paths)]


@public("nb_sparse_adam.checkpoint")
def save(
    path: Place, optimizer: Saved, extra: Any = None, *, base: Place | None = None, progress: bool = False
) -> None:
    """Save an optimizer, its tables included, so that `load` and `restore` go on with the same bits.

    Parameters
    ----------
    path : path
        A folder, created if need be. A checkpoint that is there already is replaced, by one atomic step.
    optimizer : SparseAdam, EmbeddingTable, or mapping of str to EmbeddingTable
        Steps of a SparseAdam in other Python threads wait meanwhile. EmbeddingTables, several as they are at
        one moment, go on at once: what a row was is kept in memory before it is changed, until it is saved.
        Not to be called from a signal handler, which may come in the middle of a step: set a flag there,
        and save after the step.
    extra : optional
        Something small of your own, as JSON can hold it: None, booleans, finite numbers, strings, lists, and
        dicts with strings for keys. Tuples come back as lists, and subclasses as what they are made of.
    base : path, optional
        A save of the same `EmbeddingTable`, or mapping of them: what is written is an increment, of the rows
        that were touched since, and the ids that were evicted. One of the last 64 saves, or the one that the
        table was loaded from; a table keeps the ids that went since then, as long as these are no more than
        half as many as its rows, or 65,536.
    progress : bool, default False
        Whether to show a bar.

    Raises
    ------
    CheckpointError
        If `extra` cannot be held, another process is saving there, or there is a ``manifest.json`` of
        something else: nothing is replaced or deleted but what `save` has written. If `base` is of other
        tables, too old, or in `path` itself.
    OptionTypeError
        If `optimizer` is of another kind.
    StateError
        If `optimizer` has been restored in part (see `restore`).
    OSError
        If something cannot be written; the checkpoint that was there is as it was.
    """
    tables = tables_in(optimizer)
    if tables is not None:
        single = isinstance(optimizer, EmbeddingTable)
        save_tables(
            folder_of(path), tables, single, extra, None if base is None else folder_of(base), progress
        )
        return
    check_optimizer(optimizer)
    if base is not None:
        raise OptionError(f"base is {base!r}, expected None: only EmbeddingTables have increments")
    save_optimizer(folder_of(path), optimizer, extra, progress)


@public("nb_sparse_adam.checkpoint")
def load(
    path: Places,
    mmap: bool = False,
    verify: bool | None = None,
    *,
    keep: Callable[[NDArray[Any]], Any] | None = None,
    initializer: Callable[[NDArray[Any]], Any] | None = None,
    progress: bool = False,
) -> tuple[Any, Any]:
    """Make what was saved: an optimizer, with tables of its own (``optimizer.tables``), or an EmbeddingTable.

    Parameters
    ----------
    path : path, or sequence of paths
        A folder that `save` wrote. Of an `EmbeddingTable` also several: a full save, and its increments in
        the order in which they were made.
    mmap : bool, default False
        Map the parameters instead of reading them: parts that are looked at are read when they are, and parts
        that are changed are copied; the file stays as it is. Moments and counts are read. Of an optimizer.
    verify : bool, optional
        Whether to compute the SHA-256 of every file; by default, unless mapped. Sizes and headers are checked
        in any case. Those of an `EmbeddingTable` are always verified.
    keep : callable, optional
        Is given the (n,) int64 ids of an `EmbeddingTable`, and returns a mask of those that are loaded. What
        it gives is another table: increments of it begin with a full save.
    initializer : callable, optional
        That of a table whose initializer was a function, which no file holds.
    progress : bool, default False
        Whether to show a bar.

    Returns
    -------
    optimizer : SparseAdam, EmbeddingTable, or dict of str to EmbeddingTable
        As it was saved, with ``num_threads=None``; tables without ``state_dir``.
    extra
        What was given to `save`, of the last increment.

    Raises
    ------
    CheckpointError
        If something is missing, incomplete, damaged or not a checkpoint; it names the file. If an increment
        is missing, there twice, of another table, or in another order.
    OSError
        If a file cannot be read.
    """
    folders = _folders(path)
    if len(folders) == 1 and "kind" not in read_manifest(folders[0]):
        if keep is not None or initializer is not None:
            raise OptionError(
                f"load got keep or initializer, and {folders[0]} is of a SparseAdam, expected None: they are "
                "of EmbeddingTables"
            )
        return load_optimizer(folders[0], mmap, verify, progress)
    if mmap or verify is False:
        raise OptionError(
            f"load of {folders[-1:]} got mmap={mmap!r} and verify={verify!r}, expected neither True nor "
            "False: files of EmbeddingTables are always read and verified"
        )
    return load_tables(folders, keep, initializer, progress)


@public("nb_sparse_adam.checkpoint")
def restore(path: Places, optimizer: Saved, *, progress: bool = False) -> Any:
    """Put what was saved into an optimizer or an EmbeddingTable, which goes on with the same bits.

    Parameters
    ----------
    path : path, or sequence of paths
        A folder that `save` wrote, of an optimizer with the same names, shapes and dtypes of tables, and the
        same ``step_counts``: nothing is converted. Of an `EmbeddingTable` as in `load`: it has the same dim,
        dtype and ``step_counts``.
    optimizer : SparseAdam, EmbeddingTable, or mapping of str to EmbeddingTable
        An optimizer's tables are written to where they are. What ends this in the middle (an interrupt, a
        disk that fails, a file that somebody changes after it was verified) leaves it restored in part: it
        then refuses to step and to be saved, with a StateError, until it is restored again.

        An EmbeddingTable gets all options that were saved, but for ``name``, ``capacity``, ``state_dir`` and
        ``num_threads``. It is filled beside what it has, which takes the memory of both, and exchanged: it is
        the old one or the new one at every moment. Where that is too much memory, let go of it, and `load`.
    progress : bool, default False
        Whether to show a bar.

    Returns
    -------
    extra
        What was given to `save`.

    Raises
    ------
    CheckpointError
        If it does not fit, or is missing, incomplete, damaged or not a checkpoint. Nothing has been changed
        then: every file is verified before the first write. Files are read twice, and nothing is copied
        that is not what was verified: if one changes in between, the message says what has become of the
        optimizer.
    OptionTypeError
        If `optimizer` is of another kind.
    OSError
        If a file cannot be read.
    """
    tables = tables_in(optimizer)
    if tables is not None:
        return restore_tables(_folders(path), tables, isinstance(optimizer, EmbeddingTable), progress)
    check_optimizer(optimizer)
    return restore_optimizer(folder_of(path), optimizer, progress)


@public("nb_sparse_adam.checkpoint")
def compact(paths: Sequence[Place], into: Place, *, progress: bool = False) -> None:
    """Fold a full save of an EmbeddingTable and its increments into a full one, without a table in memory.

    The files of tables are byte for byte what a full save in the place of the last increment would have
    written, and it is that save: increments that are based on the last one go on from it.

    Parameters
    ----------
    paths : sequence of paths
        A full save, and its increments in the order in which they were made. They stay as they are.
    into : path
        A folder, created if need be; it may be one of `paths`. A checkpoint that is there is replaced by one
        atomic step.
    progress : bool, default False
        Whether to show a bar.

    Raises
    ------
    CheckpointError
        As `load` and `save`.
    OSError
        If something cannot be read or written.
    """
    compact_tables(_folders(paths), folder_of(into), progress)
