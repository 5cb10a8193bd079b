# SPDX-License-Identifier: Apache-2.0
"""The write-ahead log: what was acknowledged is there, in order, whatever dies, and damage is refused."""

import errno
import os
import threading

import kills
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nb_sparse_adam._src.parameter_server import log
from nb_sparse_adam._src.parameter_server.log import HEAD_BYTES, Log, files_of, records
from nb_sparse_adam.errors import CheckpointError, LogError

contents = st.lists(st.binary(max_size=40) | st.just(log.MAGIC * 9), max_size=8)


def contents_in(folder, since=0):
    found = list(records(folder, since))
    assert [record.number for record in found] == list(range(since, since + len(found)))
    return [record.content for record in found]


def written(folder, given, begins=()):
    """Write records, some of which begin a file."""
    opened = Log(folder)
    for at, content in enumerate(given):
        if at in begins:
            opened.begin_file()
        assert opened.append(content) == at
    opened.close()


@settings(max_examples=settings().max_examples // 2)
@given(given=contents, begins=st.sets(st.integers(0, 8)), since=st.integers(0, 8))
def test_records_are_read_as_they_were_written(given, begins, since, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    written(folder, given, begins)
    since = min(since, len(given))
    assert contents_in(folder, since) == given[since:]
    opened = Log(folder)
    assert opened.next == len(given)
    assert opened.append(b"more") == len(given)
    opened.close()
    assert contents_in(folder, since) == [*given[since:], b"more"]


@given(given=contents, cut=st.integers(0, 500))
def test_a_torn_tail_is_cut_and_written_over(given, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    written(folder, given)
    whole = 0
    for _, path in files_of(folder):
        size = path.stat().st_size
        os.truncate(path, max(size - cut, 0))
        at = 0
        for content in given:
            at += HEAD_BYTES + len(content)
            whole += at <= size - cut
    assert contents_in(folder) == given[:whole]
    opened = Log(folder)
    assert opened.append(b"after") == whole
    opened.close()
    assert contents_in(folder) == [*given[:whole], b"after"]


@given(
    given=st.lists(st.binary(max_size=20), min_size=2, max_size=6),
    where=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_a_bit_that_is_changed_is_noticed(given, where, bit, tmp_path_factory):
    """In the last record it is a torn tail, before that a hole: nothing that is read is wrong."""
    folder = tmp_path_factory.mktemp("log")
    written(folder, given)
    ((_, path),) = files_of(folder)
    data = bytearray(path.read_bytes())
    place = where % len(data)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    if place >= len(data) - HEAD_BYTES - len(given[-1]):
        assert contents_in(folder) == given[:-1]
        return
    for read in (contents_in, Log):
        with pytest.raises(LogError, match=r"record \d, at byte \d+, is damaged and has others behind it"):
            read(folder)


def test_what_is_missing_is_refused_by_name(tmp_path):
    written(tmp_path, [b"a", b"b", b"c", b"d"], begins={1, 3})
    names = [path.name for _, path in files_of(tmp_path)]
    assert names == [f"log-{at:020d}" for at in (0, 1, 3)]
    aside = tmp_path / "aside"
    (tmp_path / names[1]).rename(aside)
    with pytest.raises(
        LogError, match=r"log-0{20}: ends before record 1, expected 3, .*; bring the file back"
    ):
        contents_in(tmp_path)
    (tmp_path / names[0]).unlink()
    with pytest.raises(
        LogError, match="begins with record 3, expected 1 or one before it: files are missing"
    ):
        contents_in(tmp_path, 1)
    assert contents_in(tmp_path, 3) == [b"d"]
    assert issubclass(LogError, CheckpointError)


def test_files_that_a_snapshot_has_made_needless_are_deleted(tmp_path):
    written(tmp_path, [b"a", b"b", b"c"], begins={1, 2})
    opened = Log(tmp_path)
    opened.forget(1)
    assert [first for first, _ in files_of(tmp_path)] == [1, 2]
    assert opened.begin_file() == 3
    opened.forget(3)  # nothing is in a new file yet
    assert [first for first, _ in files_of(tmp_path)] == [2]
    opened.append(b"d")
    opened.forget(3)
    assert [first for first, _ in files_of(tmp_path)] == [3]
    opened.close()
    assert contents_in(tmp_path, 3) == [b"d"]


def test_a_new_log_begins_where_it_is_told_to(tmp_path):
    opened = Log(tmp_path / "new" / "folder", first=70)
    assert opened.next == 70
    opened.append(b"x")
    opened.close()
    assert Log(tmp_path / "new" / "folder", first=5).next == 71


def test_many_threads_share_what_the_disk_writes(tmp_path, monkeypatch):
    synced = []

    def fsync(file, fsync=os.fsync):
        synced.append(file)
        fsync(file)

    opened = Log(tmp_path)
    opened.append(b"first")
    monkeypatch.setattr(os, "fsync", fsync)
    together = threading.Barrier(16)

    def work():
        for _ in range(10):
            together.wait()
            opened.wait_for(opened.append(b"x" * 100))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(synced) < 120  # of 160
    assert opened._on_disk == opened.next == 161
    opened.wait_for(3)
    opened.close()
    assert len(contents_in(tmp_path)) == 161


def test_a_full_disk_takes_nothing_of_a_record(tmp_path, monkeypatch):
    opened = Log(tmp_path)
    opened.append(b"a")

    def write(file, data, write=os.write):
        if len(data) > 1000:
            write(file, data[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        opened.append(b"b" * 2000)
    assert opened.append(b"c") == 1
    opened.close()
    assert contents_in(tmp_path) == [b"a", b"c"]


def test_a_disk_that_fails_ends_the_log_for_all_that_wait(tmp_path, monkeypatch):
    opened = Log(tmp_path)
    number = opened.append(b"a")

    def fsync(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(LogError, match=r"could not be written to the disk \(Input/output error\): "):
            opened.wait_for(number)
    for again in (lambda: opened.wait_for(number), lambda: opened.append(b"b")):
        with pytest.raises(LogError, match="open the log again"):
            again()
    assert contents_in(tmp_path) == [b"a"]


KILLS = """
import os, sys
from pathlib import Path
import kills
from nb_sparse_adam._src.parameter_server import log

folder, at_random = Path(sys.argv[1]), int(sys.argv[2])
acknowledged, acknowledge = os.pipe()
os.set_blocking(acknowledged, False)

def content(number):
    return b"%d " % number * (number % 2000)

def child():
    opened = log.Log(folder)
    while True:
        number = opened.append(content(opened.next))
        opened.wait_for(number)
        os.write(acknowledge, b"%d\\n" % number)
        if number % 5 == 4:
            opened.begin_file()

last, plans = -1, kills.plans((1, 3, 8), at_random, log.POINTS)
for point, hit in plans:
    kills.until_killed(child, point, hit, 0.03, log)
    try:
        last = int(os.read(acknowledged, 1 << 20).split()[-1])
    except BlockingIOError:  # nothing was acknowledged this time
        pass
    found = list(log.records(folder, 0))
    assert [record.content for record in found] == [content(at) for at in range(len(found))], point
    assert last < len(found), (point, last, len(found))
print(len(plans), last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path, request):
    at_random = 200 if request.config.getoption("--long") else 20
    killed, last = map(int, kills.run(KILLS, tmp_path, at_random).split())
    assert killed == 9 + at_random
    assert last > 30
