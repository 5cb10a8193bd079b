# SPDX-License-Identifier: Apache-2.0
"""State in mapped files: the same bits, memory for touched rows only, and ids of more than 31 bits."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, state_bits

from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam.errors import OptionError, OptionTypeError, TableError


def gradient(seed, rows=40, dim=5):
    rng = np.random.default_rng(seed)
    return RowGradient(rng.integers(0, rows, 12), rng.normal(size=(12, dim)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_bits_are_those_of_state_in_memory(step_counts, dtype, tmp_path):
    mapped = np.memmap(tmp_path / "table", dtype, "w+", shape=(40, 5))
    mapped[:] = 1
    table = np.ones((40, 5), dtype)
    opt = SparseAdam(mapped, step_counts=step_counts, state_dir=tmp_path / "new" / "state", num_threads=1)
    other = SparseAdam(table, step_counts=step_counts, num_threads=1)
    for step in range(4):
        for each in (opt, other):
            each.step(gradient(step))
    assert_same_bits(state_bits(opt, mapped), state_bits(other, table))
    assert list((tmp_path / "new" / "state").iterdir())
    opt.flush()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "table", dtype).reshape(40, 5), table)
    other.flush()  # there is nothing to write
    checkpoint.save(tmp_path / "c", opt)
    again = SparseAdam(np.zeros((40, 5), dtype), step_counts=step_counts, state_dir=tmp_path / "again")
    checkpoint.restore(tmp_path / "c", again)
    assert_same_bits(state_bits(again, again.tables["table"]), state_bits(other, table))


def test_counts_are_widened_in_a_file_too(tmp_path):
    opt = SparseAdam(np.ones((40, 5)), step_counts="row", state_dir=tmp_path)
    state = opt.state_dict()
    state["tables"]["table"]["steps"][:] = 2**31 - 1
    opt.load_state_dict(state)
    before = set(tmp_path.iterdir())
    opt.step(gradient(0))
    assert opt.state["table"].steps.max() == 2**31
    (more,) = set(tmp_path.iterdir()) - before
    assert more.name.endswith(".int64")


def test_a_folder_must_be_new_or_empty(tmp_path):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(OptionError, match="not an empty folder"):
            SparseAdam(np.ones((4, 2)), state_dir=path)
    with pytest.raises(OptionTypeError, match=r"state_dir is 3 \(int\)"):
        SparseAdam(np.ones((4, 2)), state_dir=3)
    with pytest.raises(OSError, match="mine"):
        SparseAdam(np.ones((4, 2)), state_dir=tmp_path / "mine" / "below")
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


def test_an_optimizer_that_is_refused_leaves_no_files(tmp_path):
    for error, tables, options in (
        (TableError, np.ones((4, 2))[:, ::2], {}),
        (OptionError, np.ones((4, 2)), {"lr": -1.0}),
    ):
        with pytest.raises(error):
            SparseAdam(tables, state_dir=tmp_path / "state", **options)
        assert list((tmp_path / "state").iterdir()) == []


def test_two_optimizers_on_one_folder(tmp_path, monkeypatch):
    SparseAdam(np.ones((4, 2)), state_dir=tmp_path / "state")
    monkeypatch.setattr(Path, "exists", lambda _: False)  # both have looked before either has begun
    with pytest.raises(OptionError, match="another optimizer has begun to use"):
        SparseAdam(np.ones((4, 2)), state_dir=tmp_path / "state")
    monkeypatch.undo()
    assert len(list((tmp_path / "state").iterdir())) == 1  # that of the first one


def test_the_working_folder_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt = SparseAdam(np.ones((40, 5)), step_counts="row", state_dir="state")
    state = opt.state_dict()
    state["tables"]["table"]["steps"][:] = 2**31 - 1
    opt.load_state_dict(state)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opt.step(gradient(0))
    assert list((tmp_path / "elsewhere").iterdir()) == []


FORKED = """
import os, sys
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam.errors import StateError
opt = SparseAdam(np.ones((4, 2)), state_dir=sys.argv[1], num_threads=1)
gradient = RowGradient([1], np.ones((1, 2)))
opt.step(gradient)
process = os.fork()
if process == 0:
    try:
        opt.step(gradient)
    except StateError as error:
        os._exit(0 if "forked" in str(error) else 2)
    os._exit(1)
print(os.waitpid(process, 0)[1], opt.state["table"].steps[1].tolist())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_does_not_step_its_parents_state(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 [1, 1]\n"


def test_empty_tables(tmp_path):
    opt = SparseAdam({"rows": np.zeros((0, 3)), "dim": np.zeros((3, 0))}, state_dir=tmp_path)
    opt.step({"rows": RowGradient([], np.ones((0, 3))), "dim": RowGradient([1], np.ones((1, 0)))})
    opt.flush()


LARGE = """
import os, re, sys
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam

folder, rows, dim, step_counts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3

SparseAdam(np.zeros((10, dim), np.float32), step_counts=step_counts, num_threads=1).step(
    RowGradient(np.array([9, 1, 1]), np.ones((3, dim), np.float32)))  # compiles
table = np.memmap(os.path.join(folder, "table"), np.float32, "w+", shape=(rows, dim))
state_dir = os.path.join(folder, "state")
optimizer = SparseAdam(table, lr=0.5, step_counts=step_counts, state_dir=state_dir, num_threads=1)
before = resident()
ids = np.random.default_rng(0).integers(0, rows, 200)
ids[:3] = rows - 1, 0, rows - 1
for _ in range(3):
    optimizer.step(RowGradient(ids, np.ones((200, dim), np.float32)))
optimizer.flush()
changed = table[np.unique(ids)]
assert np.allclose(changed, -1.5), changed
assert table[rows - 2].max() == 0 or rows - 2 in ids
steps = optimizer.state["table"].steps
assert step_counts == "global" or (steps[rows - 1] == 3).all()
files = [os.stat(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names]
mapped, on_disk = sum(file.st_size for file in files), sum(512 * file.st_blocks for file in files)
print(mapped / 1e6, on_disk / 1e6, resident() - before)
"""


@pytest.mark.jit
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rows", "dim", "step_counts"),
    [(2**31 + 10, 1, "row"), (2**31 + 10, 1, "global"), (400_000_000, 64, "element")],
)
def test_larger_than_memory(rows, dim, step_counts, tmp_path):
    """Files with holes: 26 GB and more, of which only what is touched is there."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path), str(rows), str(dim), step_counts],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    mapped, on_disk, grown = map(float, done.stdout.split())
    assert mapped > 25_000
    if Path("/proc/meminfo").exists() and dim == 64:
        assert mapped * 1e6 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert on_disk < 100
    assert grown < 100  # MB
