# SPDX-License-Identifier: Apache-2.0
"""The domains of SparseAdam's options: every value that is set passes through here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np

from nb_sparse_adam._src.annotations import BagMode, DeviceChecks, OnNonfinite, StepCounts
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam.errors import OptionError, OptionTypeError, StateError, StateTypeError

STEP_COUNTS: tuple[StepCounts, ...] = get_args(StepCounts)
ON_NONFINITE: tuple[OnNonfinite, ...] = get_args(OnNonfinite)
DEVICE_CHECKS: tuple[DeviceChecks, ...] = get_args(DeviceChecks)
BAG_MODES: tuple[BagMode, ...] = get_args(BagMode)
# What a state dict holds.
SAVED = ("lr", "betas", "eps", "step_counts", "eps_hat", "maximize", "on_nonfinite")

Dtypes = Iterable[np.dtype[Any]]
Choice = TypeVar("Choice", bound=str)


class Options(NamedTuple):
    """Every option that may be set between steps; another one is another object."""

    lr: float
    betas: tuple[float, float]
    eps: float
    eps_hat: bool
    maximize: bool
    on_nonfinite: OnNonfinite
    num_threads: int | None
    device_checks: DeviceChecks


def choice(name: str, value: Any, allowed: tuple[Choice, ...]) -> Choice:
    """Check that a value is one of a few strings."""
    if not isinstance(value, str):
        raise OptionTypeError(f"{name} is {value!r} ({type(value).__name__}), expected one of {allowed}")
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}, expected one of {allowed}")
    return value


def flag(name: str, value: Any) -> bool:
    """Check that a value is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise OptionTypeError(f"{name} is {value!r} ({type(value).__name__}), expected True or False")
    return bool(value)


def number(name: str, value: Any) -> float:
    """Check that a value is a real number, and make it a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise OptionTypeError(f"{name} is {value!r} ({type(value).__name__}), expected a number")
    try:
        return float(value)
    except OverflowError:  # an int beyond every float
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def in_dtype(value: float, dtype: np.dtype[Any]) -> float:
    """Round a number as a table's dtype does."""
    with np.errstate(over="ignore", under="ignore"):
        return float(dtype.type(value))


def _positive(name: str, value: float, dtypes: Dtypes, expected: str, there: str = "") -> float:
    """Check that a number is positive and finite, also in the dtype of every table."""
    if not 0 < value < math.inf:
        raise OptionError(f"{name} is {value}, expected {expected}")
    for dtype in dtypes:
        rounded = in_dtype(value, dtype)
        if not 0 < rounded < math.inf:
            raise OptionError(f"{name} is {value}, which is {rounded} as {dtype}; expected {expected}{there}")
    return value


def learning_rate(value: Any, dtypes: Dtypes, zero_allowed: bool) -> float:
    """Check lr in the dtype of every table."""
    lr = number("lr", value)
    if zero_allowed and lr == 0:
        return lr
    expected = "0 <= lr < inf" if zero_allowed else "0 < lr < inf (0 only later, between steps)"
    return _positive("lr", lr, dtypes, expected)


def decay_rates(value: Any, dtypes: Dtypes) -> tuple[float, float]:
    """Check betas: 0 ≤ β < 1, and not rounded to 1 in the dtype of any table."""
    try:
        beta1, beta2 = value
    except (TypeError, ValueError) as error:
        raise OptionTypeError(f"betas is {value!r}, expected two numbers (beta1, beta2)") from error
    betas = number("betas[0]", beta1), number("betas[1]", beta2)
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise OptionError(f"betas[{i}] is {beta}, expected 0 <= beta < 1")
        for dtype in dtypes:
            if in_dtype(beta, dtype) == 1:
                raise OptionError(
                    f"betas[{i}] is {beta}, which rounds to 1 as {dtype}, so that old gradients would never "
                    "decay; use a smaller beta, or a float64 table"
                )
    return betas


def epsilon(value: Any, dtypes: Dtypes) -> float:
    """Check eps: positive and finite in the dtype of every table."""
    return _positive("eps", number("eps", value), dtypes, "0 < eps < inf", " in the dtype of every table")


def needless_checks(value: str, what: str, place: str) -> OptionError:
    """Refuse ``device_checks`` where there is no GPU."""
    return OptionError(
        f"device_checks is {value!r}, expected 'immediate': no {what} is on a GPU, and what is on the "
        f"{place} is always checked"
    )


def refuse_unseen(on_nonfinite: str, device_checks: str) -> None:
    """Refuse to refuse gradients that nobody looks at."""
    if device_checks == "off" and on_nonfinite == "raise":
        raise OptionError(
            "device_checks='off' with on_nonfinite='raise': nobody would see that a gradient is refused; set "
            "on_nonfinite to 'skip', which leaves out rows without telling the host, or to 'propagate'"
        )


def threads(value: Any) -> int | None:
    """Check num_threads: None, or no more than numba can start."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise OptionTypeError(f"num_threads is {value!r} ({type(value).__name__}), expected an int or None")
    if not 1 <= value <= max_threads():
        raise OptionError(
            f"num_threads is {value}, expected 1 <= num_threads <= {max_threads()}; start Python with "
            "NUMBA_NUM_THREADS set for more"
        )
    return int(value)


# What each of `Options` is checked by, in the dtypes of the tables.
CHECKS: dict[str, Callable[[Any, Dtypes], Any]] = {
    "lr": lambda value, dtypes: learning_rate(value, dtypes, zero_allowed=True),
    "betas": decay_rates,
    "eps": epsilon,
    "eps_hat": lambda value, _: flag("eps_hat", value),
    "maximize": lambda value, _: flag("maximize", value),
    "on_nonfinite": lambda value, _: choice("on_nonfinite", value, ON_NONFINITE),
    "num_threads": lambda value, _: threads(value),
    "device_checks": lambda value, _: choice("device_checks", value, DEVICE_CHECKS),
}


def checked(given: Mapping[str, Any], dtypes: Dtypes) -> dict[str, Any]:
    """Check those of `Options` that a state dict holds."""
    return {name: CHECKS[name](given[name], dtypes) for name in SAVED if name in CHECKS}


def check_part(what: str, has: str, given: Any, keys: Collection[str]) -> None:
    """Refuse a part of a state dict that is no mapping with these keys."""
    if not isinstance(given, Mapping):
        raise StateTypeError(f"state dict's {what} are a {type(given).__name__}, expected a mapping")
    if set(given) != set(keys):
        raise StateError(f"state dict {has} {sorted(map(str, given))}, expected {sorted(keys)}")


def check_saved(
    given: Any, dtypes: Dtypes, step_counts: str, device_checks: str = "immediate"
) -> dict[str, Any]:
    """Check the options of a state dict; return those of `Options`.

    The optimizer that they are for has ``step_counts`` and ``device_checks``, which stay.
    """
    check_part("options", "has options", given, SAVED)
    counts = given["step_counts"]
    if not isinstance(counts, str) or counts != step_counts:
        raise StateError(
            f"state dict has step_counts {counts!r}, expected {step_counts!r}, which this "
            "optimizer was made with and cannot change"
        )
    try:
        found = checked(given, dtypes)
        refuse_unseen(found["on_nonfinite"], device_checks)
        return found
    except OptionError as error:
        raise StateError(f"state dict: {error}") from error
