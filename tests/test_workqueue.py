# SPDX-License-Identifier: Apache-2.0
"""numba's workqueue layer aborts the process if two threads enter parallel kernels at once: ours do not."""

import pytest
from needs import need
from test_threads_and_forks import run

pytestmark = pytest.mark.jit

BESIDE_A_USERS_KERNEL = """
import threading
import numba, numpy as np
from nb_sparse_adam import RowGradient, SparseAdam

rng = np.random.default_rng(0)
gradient = RowGradient(rng.integers(0, 5000, 8000), rng.normal(size=(8000, 16)).astype(np.float32))
several = {f"t{i}": gradient for i in range(6)}

@numba.njit(parallel=True, nogil=True)
def users(values):
    for i in numba.prange(len(values)):
        values[i] = values[i] * 0.5 + 1.0

def trained(num_threads):
    table = np.zeros((5000, 16), np.float32)
    tables = {f"t{i}": np.zeros((5000, 16), np.float32) for i in range(6)}
    one, six = SparseAdam(table, num_threads=num_threads), SparseAdam(tables, num_threads=num_threads)
    for _ in range(5):
        one.step(gradient)
        six.step(several)
    return table.tobytes(), tables["t5"].tobytes()

START

expected = trained(1)
ended = threading.Event()
calls = 0
def work():
    global calls
    values = np.zeros(20_000)
    while not ended.is_set():
        users(values)
        calls += 1
HOW
for num_threads in (None, 2):
    before = calls
    while calls < before + 20:  # it takes a while to be compiled
        assert trained(num_threads) == expected  # beside it
ended.set()
STOP
assert trained(2) == expected  # alone again
print(numba.threading_layer())
"""

THREADS = {
    "threading": ("thread = threading.Thread(target=work); thread.start()", "thread.join()"),
    "_thread": (
        "import _thread; done = _thread.allocate_lock(); done.acquire()\n"
        "_thread.start_new_thread(lambda: (work(), done.release()), ())",
        "done.acquire()",
    ),
}


@pytest.mark.parametrize("started", [True, False], ids=["layer known", "layer not known"])
@pytest.mark.parametrize("how", THREADS)
def test_steps_beside_a_users_parallel_kernel(how, started):
    start, stop = THREADS[how]
    program = BESIDE_A_USERS_KERNEL.replace("START", "trained(2)" if started else "")
    assert run(program.replace("HOW", start).replace("STOP", stop), "workqueue") == ["workqueue"]


BESIDE_A_BAR = """
import threading
import numba, numpy as np
from tqdm import tqdm
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src.engine import driver

for _ in tqdm(range(3), disable=True):
    table = np.zeros((5000, 16), np.float32)
    SparseAdam(table, num_threads=2).step(RowGradient(np.arange(5000), np.ones((5000, 16), np.float32)))
assert threading.active_count() == 2
print(len(driver._drive.signatures) > 0, len(driver._drive_alone.signatures))
"""


def test_the_monitor_of_a_bar_is_no_company():
    need("tqdm")
    assert run(BESIDE_A_BAR, "workqueue") == ["True", "0"]
