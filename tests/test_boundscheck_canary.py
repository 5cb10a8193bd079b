# SPDX-License-Identifier: Apache-2.0
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
import records

from nb_sparse_adam._src.engine.apply import apply_for
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.records import ELEMENT, ROW

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

    TOO_SHORT = {
        "parameters": ("tables", "param_length", -1),
        "state": ("tables", "state_length", -1),
        "counts": ("tables", "counts_length", -1),
        "corrections": ("tables", "corrections_length", -1 << 20),
        "ids": ("gradients", "ids_length", -1),
        "values": ("gradients", "values_rows", -1),
        "scratch": ("scratch", None, None),
    }

    @pytest.mark.parametrize("what", TOO_SHORT)
    @pytest.mark.parametrize("form", ["distinct", "segments"])
    @pytest.mark.parametrize("rule", [ELEMENT, ROW])
    def test_an_offset_one_too_large_is_caught_in_the_kernels_that_update(rule, form, what):
        """Records say that a table, a gradient or scratch memory is one element shorter than its rows are."""
        table = records.Table(np.zeros((3, 4), np.float32), rule)
        table.state.steps[...] = np.arange(table.state.steps.size).reshape(table.state.steps.shape)
        ids = np.array([0, 2]) if form == "distinct" else np.array([2, 0, 2])
        gradient = getattr(records, form)(ids, np.ones((len(ids), 4), np.float32))
        drivers = apply_for(np.dtype(np.float32), PLAIN, np.dtype(np.int32), rule).rows
        drivers.serial(1, records.step_of([table], [gradient]).record)
        step = records.step_of([table], [gradient])
        place, name, by = TOO_SHORT[what]
        if place == "scratch":
            if rule == ROW and form == "distinct":
                pytest.skip("uses no scratch memory")
            step.record["scratch_length"] = 1
        else:
            record = step.arrays[place]
            used = record[name][0]
            if name == "state_length":  # counts may lie after the last word of the moments
                used = 2 * record["state_stride"][0] + record["exp_avg_sq_offset"][0] + 4
            record[name] = max(used + by, 0)
        with pytest.raises(IndexError):
            drivers.serial(1, step.record)
