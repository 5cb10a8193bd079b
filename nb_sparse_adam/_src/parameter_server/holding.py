# SPDX-License-Identifier: Apache-2.0
"""Who may write to a folder of a server: one process, as long as it lives."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path

from nb_sparse_adam.errors import LogError

PATIENCE = 5.0  # seconds: a process that is being ended holds its folder until it is gone
_PAUSE = 0.05
_FILE = (
    "lock"  # of its own: a file is locked on more file systems than a folder, those of networks among them
)


class HeldError(LogError):
    """Somebody else holds a folder; that may pass."""


class Hold:
    """A folder that nobody else writes to until this is let go of, or the process has ended.

    On Windows nothing is held.

    Parameters
    ----------
    folder : Path
    reads : bool, default False
        Only read there, as others may at the same time; nothing is made then.

    Raises
    ------
    HeldError
        If somebody else has it, and still after a few seconds.
    """

    def __init__(self, folder: Path, reads: bool = False) -> None:
        self._opened: int | None = None
        if os.name != "posix":
            return
        import fcntl

        path = folder / _FILE
        if reads and not path.exists():
            return  # nobody has ever written there
        flags = os.O_RDONLY if reads else os.O_RDWR | os.O_CREAT
        opened = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self._opened = opened
        self._end = weakref.finalize(self, _let_go, opened, os.getpid())
        wanted = (fcntl.LOCK_SH if reads else fcntl.LOCK_EX) | fcntl.LOCK_NB
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(opened, wanted)
                break
            except BlockingIOError as error:
                if time.monotonic() < end:
                    time.sleep(_PAUSE)
                    continue
                holder = _holder(path)
                self.let_go()
                raise HeldError(
                    f"{folder} is held by another process{holder}, which may write there, expected none: a "
                    "server that uses this folder is running, on this cluster or another one, or is being "
                    "restored from; shut it down, or end that process, and try again"
                ) from error
        if not reads:
            os.ftruncate(opened, 0)
            os.write(opened, f"{os.uname().nodename} {os.getpid()}".encode())

    def let_go(self) -> None:
        """Hold the folder no more."""
        if self._opened is not None:
            self._end.detach()
            _let_go(self._opened, os.getpid())
            self._opened = None


def _let_go(opened: int, process: int) -> None:
    import fcntl

    if os.getpid() == process:  # and not that of a child, where what was forked comes to its end
        fcntl.flock(opened, fcntl.LOCK_UN)  # which a child has open, too
    os.close(opened)


def _holder(path: Path) -> str:
    """Say who has written last that it holds a folder."""
    host, _, process = path.read_text(encoding="utf-8", errors="replace").partition(" ")
    return f" (process {process} of {host})" if process else ""
