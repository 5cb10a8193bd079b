# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while a run trains: the first is noted, and the training ends after its batch."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Notes the first signal; a second one interrupts at once. In other threads than the main one, nothing.

    Attributes
    ----------
    arrived : int or None
        The signal that has come.
    """

    def __init__(self) -> None:
        self.arrived: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            # A handler of somebody else's, or a signal that is ignored, as under nohup, stays as it is.
            for number, default in zip(_SIGNALS, (signal.default_int_handler, signal.SIG_DFL), strict=True):
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (what Python passes)
        if self.arrived is not None:
            raise KeyboardInterrupt
        self.arrived = number

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.arrived is not None:
            raise KeyboardInterrupt
