# SPDX-License-Identifier: Apache-2.0
"""Calls of a server's processes, which may die meanwhile: called again, with more and more time between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam.errors import ServerError, ServerTimeout

_FIRST, _LONGEST = 0.02, 1.0  # seconds between two tries


def import_ray() -> Any:
    """Import Ray, or say how to install it."""
    return require("ray", "ray", "the parameter server")


class CannotStartError(ServerError):
    """A process is there, and cannot open what it has on the disk.

    Attributes
    ----------
    passes : bool
        Whether it may be able to without anybody doing something: another process holds the folder still, or
        the disk is away.
    """

    passes = False


class Calls:
    """Several calls, each of another process.

    Parameters
    ----------
    ray : module
    what : str
        What is done, in messages.
    begin : sequence of callables
        Each begins a call, and returns what Ray gives for it.
    deadline : float
        When to give up, of `time.monotonic`.
    waits : bool, default False
        Whether to wait for one that says that it cannot start now.
    """

    def __init__(
        self, ray: Any, what: str, begin: Sequence[Callable[[], Any]], deadline: float, waits: bool = False
    ) -> None:
        self._ray, self._what, self._begin, self._deadline = ray, what, begin, deadline
        self._waits = waits
        self._references = [each() for each in begin]

    def results(self) -> list[Any]:
        """Wait for all of them.

        Raises
        ------
        ServerTimeout
            If one has not come to its end before the deadline.
        ServerError
            If a process cannot be started. Ray does not try that again.
        Exception
            What a method has raised. All calls have come to their ends then.
        """
        try:
            left = max(self._deadline - time.monotonic(), 0)
            return self._ray.get(self._references, timeout=left)  # type: ignore[no-any-return]
        except self._ray.exceptions.RayError:
            return self._one_by_one()

    def _one_by_one(self) -> list[Any]:
        found: list[Any] = []
        failures: list[Exception] = []
        late: list[str] = []
        for number in range(len(self._begin)):
            try:
                found.append(self._result(number))
            except ServerTimeout as error:
                late.append(str(error))
            except Exception as error:  # noqa: BLE001 (raised below, when the others have ended)
                failures.append(error)
        if failures:
            raise failures[0]
        if late:
            others = len(self._begin) - len(late)
            raise ServerTimeout(
                f"{self._what}: {'; '.join(late)}. {others} of {len(self._begin)} processes have done it. It "
                "may have been done by the others, too; a push that is made again is another one"
            )
        return found

    def _result(self, number: int) -> Any:
        """Wait for one call, and call again when the process has died."""
        errors, pause = self._ray.exceptions, _FIRST
        while True:
            left = self._deadline - time.monotonic()
            try:
                return self._ray.get(self._references[number], timeout=max(left, 0))
            except errors.GetTimeoutError:
                raise ServerTimeout(f"process {number} has not answered in time") from None
            except errors.RayTaskError as error:
                cause = error.cause
                if not (self._waits and isinstance(cause, CannotStartError) and cause.passes):
                    raise (cause if isinstance(cause, Exception) else error) from None
                if left <= pause:
                    raise ServerTimeout(str(cause)) from None
            except (errors.RayActorError, errors.ObjectLostError) as error:
                if getattr(error, "actor_init_failed", False):
                    raise ServerError(
                        f"{self._what}: process {number} cannot be started: {_last_line(error)}"
                    ) from None
                if left <= pause:
                    raise ServerTimeout(
                        f"process {number} cannot be reached: {_first_line(error)} (of a server that was "
                        "shut down and attached again, make another client)"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
            self._references[number] = self._begin[number]()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
