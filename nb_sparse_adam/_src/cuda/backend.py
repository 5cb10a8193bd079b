# SPDX-License-Identifier: Apache-2.0
"""The backend of tables on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nb_sparse_adam._src.backend import Request, Run
from nb_sparse_adam._src.cuda import steps
from nb_sparse_adam._src.cuda.guard import Guard
from nb_sparse_adam._src.cuda.table import DeviceTable
from nb_sparse_adam._src.engine.state import TableState
from nb_sparse_adam._src.options import Options
from nb_sparse_adam._src.stepping import finish
from nb_sparse_adam.errors import TableError

_stepping: set[Any] = set()  # backends whose tables are in a step


class DeviceBackend:
    """Tables of one optimizer on a GPU."""

    kind = "cuda"
    has_streams = True
    reader: Any = None  # each step has its own: it reads on the step's stream

    def __init__(self) -> None:
        self._places: dict[str, int] = {}  # names of tables, and their GPUs
        self.guard: Guard | None = None

    def new_table(self, name: str, array: Any, step_counts: str) -> TableState:
        """Take in a table."""
        table = DeviceTable(name, array, step_counts, self)
        self._places[name] = table.ordinal
        if len(set(self._places.values())) > 1:
            places = ", ".join(f"{each!r} on GPU {number}" for each, number in self._places.items())
            raise TableError(
                f"got tables on several GPUs ({places}), expected one: use an optimizer for each"
            )
        if self.guard is None:
            self.guard = Guard(table.ordinal)
        self.guard.add(table)
        return table

    def memory_changed(self, gone: bool = False) -> None:  # noqa: ARG002
        """Take note that a table has other memory than before; each step asks where."""
        if self.guard is not None:
            self.guard.memory_changed()

    def before_step(self, options: Options, tables: Mapping[str, TableState]) -> None:  # noqa: ARG002
        """Raise what a deferred step was refused for, if that is known by now."""
        if self.guard is not None and options.device_checks != "immediate":
            self.guard.raise_what_is_known()

    def prepare(self, requests: Sequence[Request], waits: bool) -> Sequence[Run]:
        """Make a step ready up to the first write."""
        parts = [steps.part_of(request, request.table.backend.guard) for request in requests]  # type: ignore[attr-defined]
        return steps.prepare(parts, waits)

    def step(self, request: Request) -> None:
        """Do a step of one table."""
        finish(self.prepare([request], waits=False))

    def step_alone(self, work: Callable[[], None]) -> None:
        """Do the work of a step while no other step works in the same memory."""
        if self in _stepping:
            raise TableError(
                "step of tables on a GPU within a step of the same tables, as a signal handler may call it: "
                "they have one memory to work in. Set a flag there, and step when the step is done"
            )
        try:
            _stepping.add(self)
            work()
        finally:
            _stepping.discard(self)

    def synchronize(self) -> None:
        """Wait until all steps are done, and raise what one of them was refused for."""
        if self.guard is not None:
            self.guard.raise_what_is_wrong()

    @property
    def has_refused(self) -> bool:
        """Whether it is known by now that a deferred step was refused."""
        return self.guard is not None and bool(self.guard.seen[0] != 0)
