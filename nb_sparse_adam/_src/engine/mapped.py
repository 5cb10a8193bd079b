# SPDX-License-Identifier: Apache-2.0
"""State in files that are mapped, for tables whose state is larger than memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import OptionError, OptionTypeError, SparseAdamWarning, StateError


class StateFolder:
    """A folder of files that hold zeros until they are written to, and take room on the disk only then.

    Parameters
    ----------
    path : path
        New, or empty.
    reserve : bool
        Whether files take all of their room on the disk when they are made.

    Raises
    ------
    OptionError
        If there is something in it, or the system cannot reserve room.
    OSError
        If it cannot be created or written to.
    """

    def __init__(self, path: str | os.PathLike[str], reserve: bool = False) -> None:
        if reserve and not hasattr(os, "posix_fallocate"):
            raise OptionError(
                "reserve is True, expected False: room on a disk is reserved by posix_fallocate, which this "
                "system does not have (Linux has)"
            )
        self._reserve = reserve
        try:
            self.path = Path(path).absolute()  # counts may be widened when the working folder is another
        except TypeError as error:
            raise OptionTypeError(
                f"state_dir is {path!r} ({type(path).__name__}), expected a path"
            ) from error
        self._maps: dict[Path, np.memmap[Any, Any] | None] = {}
        self._number = 0  # of the next file
        self._process = os.getpid()
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise OptionError(
                f"state_dir is {os.fspath(self.path)!r}, which is there already and not an empty folder: "
                "state begins anew, and nothing is written over. Pass a new folder; to go on with a state, "
                "restore a checkpoint"
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def zeros(self, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make a file of zeros, and return it as a (length,) array; if it cannot be made, there is none."""
        if not length:
            return np.zeros(0, dtype)
        file = self.path / f"{self._number}.{dtype.name}"
        self._number += 1
        size = length * dtype.itemsize
        try:
            with self.removed_on_error(), open(file, "x+b") as opened:
                self._maps[file] = None
                if self._reserve:
                    os.posix_fallocate(opened.fileno(), 0, size)
                else:
                    opened.truncate(size)
                made = np.memmap(opened, dtype, "r+", shape=(length,))
        except FileExistsError as error:
            raise OptionError(
                f"state_dir is {os.fspath(self.path)!r}, which another optimizer has begun to use; pass a "
                "folder of its own for each"
            ) from error
        except OSError as error:
            reason = f"making a file of {size:,} bytes for state: {error.strerror or error}"
            raise OSError(error.errno, reason, os.fspath(file)) from error
        self._maps[file] = made
        return made.view(np.ndarray)

    def warn_if_too_large(self) -> None:
        """Warn if the files may come to take more room than there is: later, nobody can say so."""
        if self._reserve:
            return
        size = sum(made.nbytes for made in self._maps.values() if made is not None)
        free = shutil.disk_usage(self.path).free
        if size > free:
            warnings.warn(
                f"state_dir {os.fspath(self.path)!r}: state may come to take {size:,} bytes, and the file "
                f"system has {free:,} left. Rows take room when they are touched; if there is none, the "
                "system ends the process (SIGBUS). Pass reserve=True to have an error now, or another "
                "folder",
                SparseAdamWarning,
                stacklevel=3,
            )

    def check_process(self) -> None:
        """Refuse to go on in a child: it would change the parent's state, but not its tables."""
        if os.getpid() != self._process:
            raise StateError(
                f"the state in {os.fspath(self.path)!r} is mapped by the process that this one was forked "
                "from: a step here would change it there. Make an optimizer with a state_dir of its own"
            )

    def flush(self) -> None:
        """Write what has been changed to the files."""
        for made in self._maps.values():
            if made is not None:
                made.flush()

    @contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """Delete the files that are made in the block, if it fails."""
        before = set(self._maps)
        try:
            yield
        except BaseException:
            self._delete(set(self._maps) - before)
            raise

    def keep(self, arrays: Iterable[NDArray[Any]]) -> None:
        """Delete the files of all arrays but these: nobody goes on with them."""
        arrays = list(arrays)
        self._delete(
            file
            for file, made in list(self._maps.items())
            if made is not None and not any(np.may_share_memory(made, array) for array in arrays)
        )

    def remove(self) -> None:
        """Delete the files, if the optimizer could not be made after all."""
        self._delete(list(self._maps))

    def _delete(self, files: Iterable[Path]) -> None:
        for file in files:
            del self._maps[file]
            with contextlib.suppress(OSError):
                file.unlink()
