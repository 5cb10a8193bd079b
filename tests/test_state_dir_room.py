# SPDX-License-Identifier: Apache-2.0
"""Room on the disk for state in mapped files: reserved on request, else a warning if there is too little."""

import errno
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits

from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam.errors import OptionError, OptionTypeError, SparseAdamWarning

RESERVES = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room")


def gradient(seed, rows=40, dim=5):
    rng = np.random.default_rng(seed)
    return RowGradient(rng.integers(0, rows, 12), rng.normal(size=(12, dim)))


def sizes(folder):
    """Bytes of its files, and those that are on the disk."""
    found = [file.stat() for file in folder.iterdir()]
    return sum(file.st_size for file in found), sum(512 * file.st_blocks for file in found)


@RESERVES
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_all_room_is_taken_at_once(step_counts, tmp_path):
    table, other_table = (np.ones((5000, 40), np.float32) for _ in range(2))
    opt = SparseAdam(table, step_counts=step_counts, state_dir=tmp_path / "a", reserve=True, num_threads=1)
    size, on_disk = sizes(tmp_path / "a")
    assert on_disk >= size >= 2 * table.nbytes
    other = SparseAdam(other_table, step_counts=step_counts, state_dir=tmp_path / "b", num_threads=1)
    assert sizes(tmp_path / "b")[0] == size
    assert sizes(tmp_path / "b")[1] < size / 10
    for step in range(3):
        for each in (opt, other):
            each.step(gradient(step, 5000, 40))
    assert_same_bits(state_bits(opt, table), state_bits(other, other_table))


@RESERVES
def test_a_disk_that_is_full_is_an_error_when_it_is_made(tmp_path, monkeypatch):
    reserved, reserve = [], os.posix_fallocate

    def full(number, offset, size):
        if len(reserved) == 3:
            os.truncate(number, size // 2)  # it may have got so far
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserved.append(size)
        reserve(number, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    tables = {name: np.ones((40, 5)) for name in "abc"}
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(OSError, match=r"making a file of 3,200 bytes for state: No space left") as caught:
        SparseAdam(tables, step_counts="row", state_dir=tmp_path / "state", reserve=True)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "state") in str(caught.value.filename)
    assert sum(reserved) == 2 * (40 * 4) + 3200
    assert list((tmp_path / "state").iterdir()) == []
    monkeypatch.undo()
    SparseAdam(tables, step_counts="row", state_dir=tmp_path / "state", reserve=True)


LIMITED = """
import os, resource, sys
import numpy as np
from nb_sparse_adam import SparseAdam
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what a quota is like
SparseAdam(np.ones((100, 8)), state_dir=sys.argv[1] + "/small", reserve=True)
for reserve in (True, False):
    try:
        SparseAdam(np.ones((10_000, 8)), state_dir=sys.argv[1] + "/large", reserve=reserve)
    except OSError as error:
        print(error.strerror, os.listdir(sys.argv[1] + "/large"))
"""


@RESERVES
def test_files_that_may_not_grow_so_large(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == 2 * ["making a file of 1,600,000 bytes for state: File too large []"]


@pytest.fixture
def at_the_end_of_int32(tmp_path):
    """Two tables, the counts of the first of which are about to be widened, and then those of the second."""
    tables = {name: np.ones((40, 5)) for name in "ab"}
    opt = SparseAdam(tables, step_counts="row", state_dir=tmp_path / "state", reserve=True, num_threads=1)
    state = opt.state_dict()
    for name in "ab":
        state["tables"][name]["steps"][:] = 2**31 - 1
    opt.load_state_dict(state)
    return opt, tables, tmp_path / "state"


@RESERVES
@pytest.mark.parametrize("how", ["step", "kernel_table", "restore"])
def test_counts_that_cannot_be_widened_change_nothing(how, at_the_end_of_int32, tmp_path, monkeypatch):
    opt, tables, folder = at_the_end_of_int32
    opt.on_nonfinite = "skip"
    wide = opt.state_dict()
    wide["tables"]["b"]["steps"] = np.full(40, 2**40)
    other = SparseAdam({name: np.zeros((40, 5)) for name in "ab"}, step_counts="row")
    other.load_state_dict(wide)
    checkpoint.save(tmp_path / "c", other)
    before = sorted(folder.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    work = {
        "step": lambda: opt.step({name: gradient(0) for name in "ab"}),
        "kernel_table": lambda: opt.kernel_table("b").__enter__(),
        "restore": lambda: checkpoint.restore(tmp_path / "c", opt),
    }[how]
    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(OSError, OSError, "for state: No space left", opt=opt, tables=tables):
        work()
    assert sorted(folder.iterdir()) == before
    monkeypatch.undo()
    opt.step({name: gradient(0) for name in "ab"})  # there is room again
    assert opt.state["b"].steps.max() == 2**31
    size, on_disk = sizes(folder)
    assert on_disk >= size
    assert len(list(folder.iterdir())) == len(before) + 2


def test_too_little_room_is_a_warning(tmp_path, monkeypatch):
    def usage(path):
        assert os.path.samefile(path, tmp_path / "state")
        return shutil._ntuple_diskusage(10_000, 7_000, 3_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    tables = {name: np.ones((40, 5)) for name in "ab"}  # 3,200 bytes of moments each, and counts
    message = r"may come to take 6,720 bytes.*3,000 left.*reserve=True"
    with pytest.warns(SparseAdamWarning, match=message) as got:
        opt = SparseAdam(tables, step_counts="row", state_dir=tmp_path / "state")
    assert [warning.filename for warning in got] == [__file__]
    opt.step({"a": gradient(0)})
    shutil.rmtree(tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SparseAdamWarning):
            SparseAdam(tables, step_counts="row", state_dir=tmp_path / "state")
        assert list((tmp_path / "state").iterdir()) == []
        SparseAdam(np.ones((4, 5)), step_counts="row", state_dir=tmp_path / "state")  # there is room for


@RESERVES
def test_there_is_no_warning_where_room_is_reserved(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    SparseAdam(np.ones((40, 5)), state_dir=tmp_path, reserve=True)


def test_reserve_is_refused_where_it_means_nothing(tmp_path, monkeypatch):
    with refused(OptionError, ValueError, "reserve is True without state_dir"):
        SparseAdam(np.ones((4, 2)), reserve=True)
    with refused(OptionTypeError, TypeError, "reserve is 1 (int)"):
        SparseAdam(np.ones((4, 2)), state_dir=tmp_path / "state", reserve=1)
    SparseAdam(np.ones((4, 2)), reserve=False)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with refused(OptionError, ValueError, "posix_fallocate"):
        SparseAdam(np.ones((4, 2)), state_dir=tmp_path / "state", reserve=True)
    assert not (tmp_path / "state").exists()
