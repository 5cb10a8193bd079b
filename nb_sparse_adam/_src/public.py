# SPDX-License-Identifier: Apache-2.0
"""Public names know the module that users import them from, whichever file they are written in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def public(module: str) -> Callable[[T], T]:
    """Give a class or function its public home: what tracebacks, help and pickles call it by.

    Parameters
    ----------
    module : str
        Where it can be imported from.
    """

    def move(made: T) -> T:
        if isinstance(made, type):  # its annotations are resolved here, for they are written for its file
            made.__annotations__ = inspect.get_annotations(made, eval_str=True)
        made.__module__ = module
        return made

    return move
