# SPDX-License-Identifier: Apache-2.0
"""numba's simulator of a GPU, repaired."""

import sys
import threading

import numpy as np


def repair():
    """Give all threads of a block one array where they ask for shared memory.

    The simulator lacks a lock: of threads that ask at one time each may get an array of its own. With a
    machine that is busy, a few of a hundred sorts went wrong.
    """
    from numba.cuda.simulator import kernelapi

    lock = threading.Lock()

    def array(shared, shape, dtype):
        asked = sys._getframe(1)
        key = asked.f_code.co_filename, asked.f_lineno
        with lock:
            if key not in shared._allocations:
                shared._allocations[key] = np.empty(shape, kernelapi.numpy_support.as_dtype(dtype))
            return shared._allocations[key]

    kernelapi.FakeCUDAShared.array = array
