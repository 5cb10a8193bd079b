# SPDX-License-Identifier: Apache-2.0
"""What `SparseAdam` asks of the place where tables are: the memory of the host, or a GPU.

A step goes through three functions of a backend: `Backend.prepare` looks at the gradients, refuses them or
makes everything ready, and returns runs; each run, called, writes to tables, once; `Run.close` lets go of
what it worked in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nb_sparse_adam._src.gradients import Reader, on_gpu
from nb_sparse_adam._src.options import Options
from nb_sparse_adam.errors import OptionError

if TYPE_CHECKING:
    from nb_sparse_adam._src.engine.mapped import StateFolder
    from nb_sparse_adam._src.engine.state import TableState


class Request(NamedTuple):
    """One table in a step, with its gradient as the user passed it."""

    table: TableState
    gradient: object
    options: Options
    stream: Any  # the caller's wish; None on the host


class Run(Protocol):
    """A part of a prepared step that is done by one call, wholly or not at all."""

    @property
    def done(self) -> bool:
        """Whether it has been done."""

    @property
    def may_have_run(self) -> bool:
        """Whether it cannot be said that nothing has been written."""

    def rehearse(self) -> None:
        """Have everything compiled that it calls; nothing is written."""

    def __call__(self) -> None:
        """Do it."""

    def close(self) -> None:
        """Let go of what it worked in, after it has been done."""


class Backend(Protocol):
    """A place where tables are, with what they share there."""

    kind: str  # name of the place; requests of one kind are prepared by one call, of any optimizers
    has_streams: bool  # whether steps run on streams, and may be checked later

    @property
    def reader(self) -> Reader:
        """What reads gradients' arrays."""

    def new_table(self, name: str, array: Any, step_counts: str) -> TableState:
        """Take in a table."""

    def memory_changed(self, gone: bool = False) -> None:
        """Take note that a table has other memory than before; ``gone``: let go what it had."""

    def before_step(self, options: Options, tables: Mapping[str, TableState]) -> None:
        """Raise what is known to be wrong before an optimizer of these tables steps."""

    def prepare(self, requests: Sequence[Request], waits: bool) -> Sequence[Run]:
        """Make a step ready up to the first write.

        Parameters
        ----------
        requests : sequence of Request
            Of this kind of backend.
        waits : bool
            Whether tables elsewhere are in the step, too: all are written, or none.

        Raises
        ------
        GradientError
            As `SparseAdam.step`; nothing has been written then.
        """

    def step(self, request: Request) -> None:
        """Do a step of one table: prepare it, and do what has been prepared."""

    def step_alone(self, work: Callable[[], None]) -> None:
        """Do the work of a step while no other step, which a signal handler may call, works in its memory."""

    def synchronize(self) -> None:
        """Wait until all steps are done, and raise what one of them was refused for."""

    @property
    def has_refused(self) -> bool:
        """Whether it is known by now that a step was refused that the caller did not wait for."""


def backends_for(tables: Mapping[str, Any], folder: StateFolder | None) -> dict[str, Backend]:
    """Choose where each table belongs.

    Parameters
    ----------
    tables : mapping of str to array
    folder : StateFolder or None
        Where state is mapped; in the memory of the host only.
    """
    from nb_sparse_adam._src.engine.host import HostBackend

    host = HostBackend(folder)
    found: dict[str, Backend] = dict.fromkeys(tables, host)
    on_gpus = [name for name, table in tables.items() if on_gpu(table)]
    if on_gpus and folder is not None:
        raise OptionError(
            f"state_dir with table {on_gpus[0]!r}, which is on a GPU: expected tables in the memory of the "
            "host, whose state can be mapped from files"
        )
    if on_gpus:
        from nb_sparse_adam._src.cuda.backend import DeviceBackend

        found.update(dict.fromkeys(on_gpus, DeviceBackend()))
    return found
