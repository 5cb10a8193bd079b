"""State in files that are mapped, for tables whose state is larger than memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import OptionError, OptionTypeError, StateError

__all__ = ["StateFolder"]


class StateFolder:
    """A folder of files that hold zeros until they are written to, and take room on the disk only then.

    Parameters
    ----------
    path : path
        New, or empty.

    Raises
    ------
    OptionError
        If there is something in it.
    OSError
        If it cannot be created or written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
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
        """Make a file of zeros, and return it as a (length,) array."""
        if not length:
            return np.zeros(0, dtype)
        file = self.path / f"{self._number}.{dtype.name}"
        self._number += 1
        try:
            with open(file, "x+b") as opened:
                self._maps[file] = None
                opened.truncate(length * dtype.itemsize)
                made = np.memmap(opened, dtype, "r+", shape=(length,))
        except FileExistsError as error:
            raise OptionError(
                f"state_dir is {os.fspath(self.path)!r}, which another optimizer has begun to use; pass a "
                "folder of its own for each"
            ) from error
        self._maps[file] = made
        return made.view(np.ndarray)

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

    def release(self, arrays: Iterable[NDArray[Any]]) -> None:
        """Delete the files of arrays that nobody goes on with."""
        arrays = [array for array in arrays if array.size]
        self._delete(
            file
            for file, made in list(self._maps.items())
            if made is not None and any(np.may_share_memory(made, array) for array in arrays)
        )

    def remove(self) -> None:
        """Delete the files, if the optimizer could not be made after all."""
        self._delete(list(self._maps))

    def _delete(self, files: Iterable[Path]) -> None:
        for file in files:
            del self._maps[file]
            with contextlib.suppress(OSError):
                file.unlink()
