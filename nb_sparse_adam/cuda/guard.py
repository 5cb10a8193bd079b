"""Whether an optimizer has refused a step on a GPU, and what for: known there first, and told to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nb_sparse_adam.cuda.device import Stream, copy_later, copy_to_device, copy_to_host, pinned, using
from nb_sparse_adam.cuda.gradients import Form
from nb_sparse_adam.cuda.layout import (
    AT_ID,
    AT_OFFSET,
    AT_SUM,
    AT_VALUE,
    AT_WEIGHT,
    BEFORE_OFFSET,
    FORM,
    GOT_ID,
    GOT_IDS,
    GOT_OFFSET,
    GOT_ROW,
    IDS,
    NOWHERE,
)
from nb_sparse_adam.cuda.table import DeviceTable
from nb_sparse_adam.engine.corrections import Corrections
from nb_sparse_adam.engine.planning import nonfinite_error, overflow_error
from nb_sparse_adam.errors import GradientError
from nb_sparse_adam.gradients import Target, id_error, offset_error

__all__ = ["FORMS", "Guard"]


class Guard:
    """Whether an optimizer has refused a step, as its GPU knows it; and what is shared by its tables there.

    Parameters
    ----------
    ordinal : int
        The GPU.
    """

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        with using(ordinal):
            stream = Stream(0)
            # The number, from 1 on, of the table that a step was refused for; −1: another optimizer's.
            self.flags = copy_to_device(np.zeros(1, np.int64), stream)
            # The flags of a guard under which nothing is written.
            self.refused = copy_to_device(np.ones(1, np.int64), stream)
            self.seen = pinned(1, np.int64)  # what `flags` was some time ago
        self.tables: list[DeviceTable] = []
        self.targets: dict[str, Target] = {}
        self._corrections: dict[Any, Any] = {}

    def corrections(self, known: Corrections) -> Any:
        """Return a table of corrections, copied to the GPU once."""
        key = known.pairs.dtype
        if key not in self._corrections or self._corrections[key][0] is not known:
            self._corrections[key] = known, copy_to_device(known.pairs, Stream(0))
        return self._corrections[key][1]

    def tell(self, stream: Stream) -> None:
        """Have the host told, some time later."""
        copy_later(self.flags, self.seen, stream)

    def raise_what_is_known(self) -> None:
        """Raise what a step of some time ago was refused for, if the host knows by now."""
        if self.seen[0] != 0:
            self.raise_what_is_wrong()

    def raise_what_is_wrong(self) -> None:
        """Wait for all steps, and raise what one of them was refused for, if one was."""
        with using(self.ordinal):
            for table in self.tables:
                table.synchronize()
            stream = Stream(0)
            number = int(copy_to_host(self.flags, stream)[0])
            if number == 0:
                self.seen[0] = 0
                return
            error = self._error_of(self.tables[number - 1]) if number > 0 else None
            self.flags.copy_to_device(np.zeros(1, np.int64), stream=stream.numba)
            stream.synchronize()
            self.seen[0] = 0
        if error is not None:  # else it was another optimizer's table, which reports it
            raise error

    def _error_of(self, table: DeviceTable) -> GradientError | None:
        words = [int(word) for word in table._read(table.info)]
        target = self.targets.get(table.name)
        if target is None:
            return None
        form = FORMS.known[words[FORM]]
        errors: list[tuple[int, Callable[[int], GradientError]]] = [
            (AT_OFFSET, lambda at: _offset_error(form, at, words, target)),
            (
                AT_ID,
                lambda at: id_error(
                    form.ids,
                    at,
                    words[GOT_ID],
                    target.rows if form.of == "row" else target.dim,
                    form.of,
                    target,
                ),
            ),
            (AT_VALUE, lambda at: self._nonfinite(table, form, at, target)),
            (
                AT_WEIGHT,
                lambda at: nonfinite_error(form.weights, (at,), float(table._read(table.got)[1]), target),
            ),
            (AT_SUM, lambda _: _overflow(form, words, target)),
        ]
        if form.offsets.startswith("Bag"):
            errors[:2] = errors[1::-1]  # ids first, as on a CPU
        for word, make in errors:
            if words[word] != NOWHERE:
                return make(words[word])
        return None

    def _nonfinite(self, table: DeviceTable, form: Form, at: int, target: Target) -> GradientError:
        got = float(table._read(table.got)[0])
        if form.of == "column":
            return nonfinite_error("data", (at,), got, target)
        return nonfinite_error(form.values, divmod(at, target.dim), got, target)


def _offset_error(form: Form, at: int, words: list[int], target: Target) -> GradientError:
    got, n = words[GOT_OFFSET], words[IDS]
    return offset_error(form.offsets, at, got, words[BEFORE_OFFSET], n, 0 <= got <= n, target)


def _overflow(form: Form, words: list[int], target: Target) -> GradientError:
    if form.of == "column":
        return overflow_error(target, words[GOT_ROW] // max(target.dim, 1), 1)
    return overflow_error(target, words[GOT_ROW], words[GOT_IDS])


class _Forms:
    """Numbers of forms, for the words that kernels keep."""

    def __init__(self) -> None:
        self.known: list[Form] = []

    def number(self, form: Form) -> int:
        if form not in self.known:
            self.known.append(form)
        return self.known.index(form)


FORMS = _Forms()
