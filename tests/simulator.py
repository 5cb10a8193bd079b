# SPDX-License-Identifier: Apache-2.0
"""numba's simulator of a GPU, with threads of a block that take turns.

Its own are threads of the system, and what waits for their barriers asks one after another whether it is
there yet: most of the time of a test. Here each is a greenlet, which runs until it ends or is at a barrier.
Which one comes next is drawn at random, so that a barrier that is missing shows: with threads it hardly ever
did. For the same reason shared memory holds nonsense at first.
"""

import random
import sys
import types

import numpy as np
from greenlet import greenlet


class Thread(greenlet):
    """A thread of a block, as `numba.cuda.simulator.kernelapi` asks for it."""

    def __init__(self, function, block, thread, shape):
        from numba.cuda.simulator.kernel import Dim3

        super().__init__(function)
        self.blockIdx, self.threadIdx = Dim3(*block), Dim3(*thread)
        self.thread_id = thread[0] + shape[0] * (thread[1] + shape[1] * thread[2])

    def syncthreads(self):
        """Let the others run until they are here, too, or have ended."""
        self.parent.switch()


class BlockManager:
    """Runs the threads of a block."""

    def __init__(self, function, grid, shape, debug):
        del grid, debug
        self.function, self.shape = function, shape

    def run(self, block, *args):
        """Run them all."""
        order = random.Random(repr((self.function.__name__, block)))
        left = [Thread(self.function, block, thread, self.shape) for thread in np.ndindex(*self.shape)]
        while left:
            order.shuffle(left)
            for thread in left:
                thread.switch(*args)  # what is raised there is raised here; who waits ignores the arguments
            left = [thread for thread in left if not thread.dead]


def shared_array(shared, shape, dtype):
    """Return the array of a block that is made at the line that asks for it."""
    from numba.cuda.simulator import kernelapi

    asked = sys._getframe(1)
    key = asked.f_code.co_filename, asked.f_lineno
    if key not in shared._allocations:
        if not isinstance(dtype, type):
            dtype = kernelapi.numpy_support.as_dtype(dtype)
        array = shared._allocations[key] = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xA5)
    return shared._allocations[key]


def repair():
    """Put these threads, and this memory, in the place of the simulator's."""
    from numba.cuda.simulator import kernel, kernelapi

    kernel.BlockManager = BlockManager
    kernelapi.threading = types.SimpleNamespace(current_thread=greenlet.getcurrent)
    kernelapi.FakeCUDAShared.array = shared_array
