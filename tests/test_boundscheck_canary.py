"""The lane with ``NUMBA_BOUNDSCHECK=1 NUMBA_NUM_THREADS=1`` must be able to see a wild index inside `prange`.

Such a lane is silent in three ways that look like success: a variable that numba did not read, an error that
was raised on a worker thread and lost, and machine code from a disk cache that was filled without bounds
checks (numba does not key its cache by them; that of the package's kernels is). So a wild kernel is run on
purpose.

`test_this_process_checks_bounds` exists in that lane only; `.ci/run` asks for it by name and for nothing
else, so that the lane fails if pytest does not find it.
"""

import os
import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest

from nb_sparse_adam.engine.grouping import scan_ids

pytestmark = pytest.mark.jit

LANE = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_NUM_THREADS": "1"}

KERNEL = textwrap.dedent(
    """
    import numpy as np
    from numba import njit, prange

    @njit(parallel=True, cache=True)
    def gather(x, ids, out):
        for i in prange(ids.size):
            out[i] = x[ids[i]]

    def caught(ids):
        # numba gives an IndexError that was raised inside prange as the cause of a SystemError.
        try:
            gather(np.zeros(4), np.array(ids), np.zeros(len(ids)))
        except (IndexError, SystemError) as error:
            return isinstance(error, IndexError) or isinstance(error.__cause__, IndexError)
        return False

    if __name__ == "__main__":
        print(caught([0, 3]), caught([0, 4]))  # 4 is one past the end: reading it harms nobody
    """
)


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "wild.py"
    path.write_text(KERNEL, encoding="utf-8")
    return path


def run(path, **env):
    """Run the kernel in an interpreter of its own, with a cache of its own."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(path.parent / "cache"), **env}
    out = subprocess.run([sys.executable, str(path)], env=env, check=True, text=True, stdout=subprocess.PIPE)
    return out.stdout.split()


def test_the_lane_sees_a_wild_index_in_prange(kernel):
    assert run(kernel, **LANE) == ["False", "True"]


def test_a_cache_filled_without_bounds_checks_blinds_the_lane(kernel):
    """Why the package's kernels have a cache of their own, `kernel_cache`, with the flag in its keys."""
    assert run(kernel, NUMBA_BOUNDSCHECK="0") == ["False", "False"]
    assert run(kernel, **LANE) == ["False", "False"]


if os.environ.get("NUMBA_BOUNDSCHECK") == "1":

    def test_this_process_checks_bounds():
        assert numba.config.BOUNDSCHECK
        assert numba.config.NUMBA_NUM_THREADS == 1
        namespace = {"__name__": "wild", "__file__": __file__}
        exec(KERNEL.replace(", cache=True", ""), namespace)
        assert namespace["caught"]([0, 4])
        assert not namespace["caught"]([0, 3])

    def test_the_kernels_of_the_package_check_bounds():
        """A real kernel, compiled here or read from the disk cache, as the library never calls it."""
        with pytest.raises(IndexError):
            scan_ids(np.arange(1)[:0])  # it begins at ids[0], which is there, just out of bounds
