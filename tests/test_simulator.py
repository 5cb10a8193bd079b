# SPDX-License-Identifier: Apache-2.0
"""The simulated GPU that tests run on: it finds what is wrong with a kernel."""

import numba
import numpy as np
import pytest
from needs import need

need("numba_cuda")
need("greenlet")

from numba import cuda  # noqa: E402

THREADS = 64


@pytest.fixture(autouse=True)
def _simulated():
    if not numba.config.ENABLE_CUDASIM:
        pytest.skip("NUMBA_ENABLE_CUDASIM=0: a GPU does not tell of a barrier that is missing")


def reversed_by_a_block(barrier):
    """Write numbers backwards through shared memory, with a barrier between the two steps or without."""

    @cuda.jit
    def kernel(values, out):
        i = cuda.threadIdx.x
        shared = cuda.shared.array(THREADS, np.int64)
        shared[i] = values[i]
        if barrier:
            cuda.syncthreads()
        out[i] = shared[THREADS - 1 - i]

    out = np.zeros(THREADS, np.int64)
    kernel[1, THREADS](np.arange(THREADS), out)
    return out.tolist()


def test_a_barrier_is_waited_for():
    assert reversed_by_a_block(barrier=True) == list(range(THREADS))[::-1]


def test_a_barrier_that_is_missing_is_seen():
    assert reversed_by_a_block(barrier=False) != list(range(THREADS))[::-1]


def test_what_a_thread_raises_ends_the_kernel():
    @cuda.jit
    def kernel(out):
        if cuda.threadIdx.x == 3:
            raise ValueError("thread 3")
        cuda.syncthreads()
        out[cuda.threadIdx.x] = 1

    out = np.zeros(8)
    with pytest.raises(ValueError, match="thread 3"):
        kernel[1, 8](out)
    assert not out.any()
