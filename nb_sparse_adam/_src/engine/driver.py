# SPDX-License-Identifier: Apache-2.0
"""Phases of work that threads share out: one source of a driver, for one thread and for several.

A job is done in phases. Before each of them the calling thread decides, alone, of how many units the next one
consists; then every thread takes one unit after the other until there are none left. The serial variant is
the same function on one thread: it starts no thread and needs none, so that it works in forked children and
where other threads must not be disturbed (see `threads`).

What decides and what works are compiled once each, and called by their addresses: a driver holds no code of
them, so that they are not compiled for each variant of it again, and one driver serves all jobs whose arrays
have the same types. Two jobs of which the second follows the first are one native call: between two calls
there is Python, which takes microseconds, or hundreds of them where a step has driven it out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.core.compiler_lock import global_compiler_lock

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import call_at, new_turns, take_turn
from nb_sparse_adam._src.engine.parallel import float_mode, swap_float_mode, swap_threads


class Drivers:
    """A job's two drivers.

    Parameters
    ----------
    begin : function ``begin(phase, job) -> int64``, of `jit` with ``entry=True``
        Decides how many units a phase has. Only the calling thread runs it, when all units of the phase
        before are done. A negative number ends the job.
    work : function ``work(phase, unit, t, job)``, of `jit` with ``entry=True``
        Does a unit, in thread t of 0..threads - 1.
    kind_of : callable, optional
        What tells apart jobs of other types, of a job. Without it all jobs are of the same type.
    """

    __slots__ = ("_functions", "_kind_of", "begin", "work")

    def __init__(
        self,
        begin: Callable[..., Any],
        work: Callable[..., Any],
        kind_of: Callable[[Any], Hashable] | None = None,
    ) -> None:
        self.begin, self.work, self._kind_of = begin, work, kind_of
        self._functions: dict[Hashable, tuple[Any, Any]] = {}  # what a driver is given to call

    def serial(self, threads: int, job: Any, after: Drivers | None = None) -> Any:
        """Do a job on the calling thread; return the number with which ``begin`` has ended it.

        If it is -1, what comes after it has been done as well, in the same native call.
        """
        return _drive_alone(threads, *self._addresses(job, after), job)

    def parallel(self, threads: int, job: Any, after: Drivers | None = None) -> Any:
        """Do a job on so many threads, and what comes after it, as `serial` does."""
        return _drive(threads, *self._addresses(job, after), job)

    def _addresses(self, job: Any, after: Drivers | None) -> tuple[Any, Any, Any, Any]:
        """Give what a driver calls of this job, and of what comes after it; 0 if there is nothing."""
        here = self._functions.get(None) or self._functions_for(job)
        if after is None:
            return *here, 0, 0
        return *here, *(after._functions.get(None) or after._functions_for(job))

    def _functions_for(self, job: Any) -> tuple[Any, Any]:
        """Give what a driver calls: compiled once for jobs of one kind."""
        kind = None if self._kind_of is None else self._kind_of(job)
        return self._functions.get(kind) or self._compiled(kind, job)

    def _compiled(self, kind: Hashable, job: Any) -> tuple[Any, Any]:
        if numba.config.DISABLE_JIT:
            functions: tuple[Any, Any] = self.begin, self.work
        else:
            of_job = numba.typeof(job)
            with (
                global_compiler_lock
            ):  # LLVM has locks of its own: a child that is forked meanwhile would wait
                functions = (
                    _address_of(self.begin, types.int64, (types.int64, of_job)),
                    _address_of(self.work, types.none, (types.int64, types.int64, types.int64, of_job)),
                )
        self._functions[kind] = functions
        return functions


def _address_of(function: Any, result: Any, arguments: tuple[Any, ...]) -> int:
    """Compile a function, if it has not been, and return where its machine code is."""
    function.compile(arguments)
    compiled = function.overloads[arguments]
    if compiled.signature.return_type != result:
        raise TypeError(f"{function} returns {compiled.signature.return_type}, expected {result}")
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@jit
def _same_threads(number: Any) -> Any:
    """Leave numba's number of threads alone; see `swap_threads`."""
    return number


@jit
def _no_mode() -> Any:
    """Leave the mode of the calling thread alone; see `float_mode`."""
    return np.int64(0)


@jit
def _same_mode(mode: Any) -> Any:
    """Leave the mode of the calling thread alone; see `swap_float_mode`."""
    return mode


def _driver(set_threads: Any, mode_of_caller: Any, set_mode: Any, parallel: bool = False) -> Any:
    @jit(parallel=parallel)
    def drive(threads: Any, begin: Any, work: Any, begin_after: Any, work_after: Any, job: Any) -> Any:
        before, mode = set_threads(threads), mode_of_caller()
        turns = new_turns()
        ended = np.int64(0)
        for job_number in range(2):
            phase = np.int64(0)
            units = call_at(begin, np.int64(0), (phase, job))
            while units >= 0:
                turns[0] = 0
                if units > 0:
                    for t in prange(threads):
                        own = set_mode(mode)
                        unit = take_turn(turns)
                        while unit < units:
                            call_at(work, None, (phase, np.int64(unit), np.int64(t), job))
                            unit = take_turn(turns)
                        set_mode(own)
                phase += 1
                units = call_at(begin, np.int64(0), (phase, job))
            if job_number > 0:
                break
            ended = units
            if ended != -1 or begin_after == 0:
                break
            begin, work = begin_after, work_after
        set_threads(before)
        return ended

    return drive


_alone = _driver(_same_threads, _no_mode, _same_mode)
_drive = _driver(swap_threads, float_mode, swap_float_mode, parallel=True)


@jit(entry=True)
def _drive_alone(threads: Any, begin: Any, work: Any, begin_after: Any, work_after: Any, job: Any) -> Any:
    """Do a job on the calling thread, and another one if it has ended with -1; return with which it has."""
    return _alone(threads, begin, work, begin_after, work_after, job)
