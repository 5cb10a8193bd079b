# SPDX-License-Identifier: Apache-2.0
"""The options of Adam that may be set between steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nb_sparse_adam._src import options
from nb_sparse_adam._src.annotations import DeviceChecks, OnNonfinite
from nb_sparse_adam._src.backend import Backend
from nb_sparse_adam._src.options import Options
from nb_sparse_adam._src.views import Shown
from nb_sparse_adam.errors import OptionError

if TYPE_CHECKING:
    from nb_sparse_adam._src.engine.state import TableState


T = TypeVar("T")


class Option(Shown[T]):
    """An option as a property: what is set is checked, and another `Options` put in the old one's place.

    Parameters
    ----------
    name : str
        One of `Options`.
    doc : str
    also : callable, optional
        Called before a value in the option's domain is taken over; it may refuse it.
    """

    def __init__(self, name: str, doc: str, also: Callable[[HyperParameters, T], None] | None = None) -> None:
        def change(owner: HyperParameters, value: Any) -> None:
            value = options.CHECKS[name](value, owner._dtypes())
            if also is not None:
                also(owner, value)
            owner._set(**{name: value})

        super().__init__(f"_options.{name}", doc, change)

    if TYPE_CHECKING:

        def __set__(self, instance: HyperParameters, value: T) -> None: ...


def _check_threads(self: HyperParameters, value: int | None) -> None:
    if value is not None and all(backend.has_streams for backend in self._backends()):
        raise OptionError(
            f"num_threads is {value}, expected None: all tables are on a GPU, with threads of its own"
        )


def _leave_device_checks(self: Any, value: DeviceChecks) -> None:
    if value != "immediate" and not any(backend.has_streams for backend in self._backends()):
        raise options.needless_checks(value, "table", "host")
    options.refuse_unseen(self.on_nonfinite, value)
    if self.device_checks != "immediate":
        self.synchronize()


class HyperParameters:
    """Options of tables: properties that check what is set."""

    # No __dict__: a misspelt option is an AttributeError, not a new attribute.
    __slots__ = ("_lock", "_options", "_tables")
    _lock: Any
    _options: Options
    _tables: dict[str, TableState]

    def _dtypes(self) -> set[np.dtype[Any]]:
        return {table.dtype for table in self._tables.values()}

    def _backends(self) -> Collection[Backend]:
        return dict.fromkeys(table.backend for table in self._tables.values())

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._options = self._options._replace(**values)

    lr = Option[float]("lr", "Learning rate, 0 ≤ lr < ∞; settable between steps.")
    betas = Option[tuple[float, float]]("betas", "Decay rates (β₁, β₂), 0 ≤ β < 1; settable between steps.")
    eps = Option[float]("eps", "Term added to the denominator, > 0; settable between steps.")
    eps_hat = Option[bool](
        "eps_hat", "Whether ε is added before the correction of v; settable between steps."
    )
    maximize = Option[bool]("maximize", "Whether steps ascend; settable between steps.")
    # Of literals: pyright takes what is not annotated for any string.
    on_nonfinite: Option[OnNonfinite] = Option(
        "on_nonfinite",
        "What happens to values that are not finite; settable between steps.",
        lambda self, value: options.refuse_unseen(value, self._options.device_checks),
    )
    num_threads = Option[int | None](
        "num_threads",
        "Threads for large steps, None for numba's setting or fewer; settable between steps.",
        _check_threads,
    )


class DeviceOptions(HyperParameters):
    """Options of tables some of which may be on a GPU."""

    __slots__ = ()

    def synchronize(self) -> None:
        """Wait until all steps on a GPU are done; with tables of the host there is nothing to wait for.

        Raises
        ------
        GradientError
            With ``device_checks="deferred"``, if a step was refused. That step, and all that were called
            after it, have changed nothing; the next one is a new beginning.
        """
        with self._lock:
            for backend in self._backends():
                backend.synchronize()

    device_checks: Option[DeviceChecks] = Option(
        "device_checks",
        "When gradients of tables on a GPU are checked, and who waits; settable between steps.",
        _leave_device_checks,
    )
