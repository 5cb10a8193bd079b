"""State in files that are mapped, for tables whose state is larger than memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import OptionError, OptionTypeError

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
            self.path = Path(path)
        except TypeError as error:
            raise OptionTypeError(
                f"state_dir is {path!r} ({type(path).__name__}), expected a path"
            ) from error
        self._maps: list[np.memmap[Any, Any]] = []
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
        file = self.path / f"{len(self._maps)}.{dtype.name}"
        made = np.memmap(file, dtype, "w+", shape=(length,))
        self._maps.append(made)
        return made.view(np.ndarray)

    def flush(self) -> None:
        """Write what has been changed to the files."""
        for made in self._maps:
            made.flush()

    def remove(self) -> None:
        """Delete the files, if the optimizer could not be made after all."""
        for file in self.path.glob("*.*"):
            with contextlib.suppress(OSError):
                file.unlink()
        self._maps.clear()
