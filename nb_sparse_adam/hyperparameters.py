"""The options of `SparseAdam` that may be set between steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nb_sparse_adam import options
from nb_sparse_adam.backend import Backend
from nb_sparse_adam.errors import OptionError
from nb_sparse_adam.options import Options

__all__ = ["HyperParameters"]


class HyperParameters:
    """Properties that check what is set, and put another `Options` in the place of the old one."""

    # No __dict__: a misspelt option is an AttributeError, not a new attribute.
    __slots__ = ("_lock", "_options")
    _lock: Any
    _options: Options

    def _dtypes(self) -> set[np.dtype[Any]]:
        """Return the dtypes of all tables."""
        raise NotImplementedError

    def _backends(self) -> Collection[Backend]:
        """Return where the tables are."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until all steps are done."""
        raise NotImplementedError

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._options = self._options._replace(**values)

    @property
    def lr(self) -> float:
        """Learning rate, 0 ≤ lr < ∞; settable between steps."""
        return self._options.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._set(lr=options.learning_rate(value, self._dtypes(), zero_allowed=True))

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates (β₁, β₂), 0 ≤ β < 1; settable between steps."""
        return self._options.betas

    @betas.setter
    def betas(self, value: tuple[float, float]) -> None:
        self._set(betas=options.decay_rates(value, self._dtypes()))

    @property
    def eps(self) -> float:
        """Term added to the denominator, > 0; settable between steps."""
        return self._options.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._set(eps=options.epsilon(value, self._dtypes()))

    @property
    def eps_hat(self) -> bool:
        """Whether ε is added before the correction of v; settable between steps."""
        return self._options.eps_hat

    @eps_hat.setter
    def eps_hat(self, value: bool) -> None:
        self._set(eps_hat=options.flag("eps_hat", value))

    @property
    def maximize(self) -> bool:
        """Whether steps ascend; settable between steps."""
        return self._options.maximize

    @maximize.setter
    def maximize(self, value: bool) -> None:
        self._set(maximize=options.flag("maximize", value))

    @property
    def on_nonfinite(self) -> str:
        """What happens to values that are not finite; settable between steps."""
        return self._options.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, value: str) -> None:
        value = options.choice("on_nonfinite", value, options.ON_NONFINITE)
        _refuse_unseen(value, self._options.device_checks)
        self._set(on_nonfinite=value)

    @property
    def num_threads(self) -> int | None:
        """Threads for large steps, None for numba's setting or fewer; settable between steps."""
        return self._options.num_threads

    @num_threads.setter
    def num_threads(self, value: int | None) -> None:
        value = options.threads(value)
        if value is not None and not any(backend.has_threads for backend in self._backends()):
            raise OptionError(
                f"num_threads is {value}, expected None: all tables are on a GPU, with threads of its own"
            )
        self._set(num_threads=value)

    @property
    def device_checks(self) -> str:
        """When gradients of tables on a GPU are checked, and who waits; settable between steps."""
        return self._options.device_checks

    @device_checks.setter
    def device_checks(self, value: str) -> None:
        value = options.choice("device_checks", value, options.DEVICE_CHECKS)
        if value != "immediate" and not any(backend.has_streams for backend in self._backends()):
            raise OptionError(
                f"device_checks is {value!r}, expected 'immediate': no table is on a GPU, and what is on the "
                "host is always checked"
            )
        _refuse_unseen(self._options.on_nonfinite, value)
        if self._options.device_checks != "immediate":
            self.synchronize()
        self._set(device_checks=value)


def _refuse_unseen(on_nonfinite: str, device_checks: str) -> None:
    if device_checks == "off" and on_nonfinite == "raise":
        raise OptionError(
            "device_checks='off' with on_nonfinite='raise': nobody would see that a gradient is refused; set "
            "on_nonfinite to 'skip', which leaves out rows without telling the host, or to 'propagate'"
        )
