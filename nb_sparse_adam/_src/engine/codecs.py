# SPDX-License-Identifier: Apache-2.0
"""How moments lie in memory, as a variant that kernels are made for and that none of them names.

A codec is a class and one object of it; its two functions are plain Python that numba compiles for a CPU, for
a GPU and for the simulator of one, and that NUMBA_DISABLE_JIT runs as it is. They may call other such
functions, decorated for neither. A new codec is a class here and its tests.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit


class Codec:
    """Each number as it is; base class of the others.

    The kernels convert what the functions return: ``load`` to the table's dtype, ``store`` to the storage
    dtype. An element that takes no step keeps its word, whatever ``store`` would make of it. Zeroed memory
    has to mean 0.
    """

    name = "plain"

    @staticmethod
    def storage(real: np.dtype[Any]) -> np.dtype[Any]:
        """Dtype of a word, the number as it lies in memory, of a table of float32 or float64."""
        return real

    @staticmethod
    def load(word: Any) -> Any:
        """Return the number that a word stands for."""
        return word

    @staticmethod
    def store(number: Any) -> Any:
        """Return the word that stands for a number."""
        return number


PLAIN = Codec()


@functools.cache
def compiled(codec: Codec) -> tuple[Any, Any]:
    """``load`` and ``store`` of a codec, for kernels of a CPU."""
    return jit(codec.load), jit(codec.store)
