# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the same bits again, whatever is damaged is refused by name, and a kill loses nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc

import kills
import numpy as np
import pytest
from backends import CPU, CUDA, host
from checks import STEP_COUNTS, assert_same_bits, options_of, refused, state_bits
from needs import need

from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam._src.checkpoint import manifest as manifests
from nb_sparse_adam._src.checkpoint import saving, tensor_files
from nb_sparse_adam.errors import CheckpointError, OptionTypeError, TableError

EXTRA = {"epoch": 3, "best": [0.5, None, True], "name": "Zürich", "nested": {"a": -1e-300}}


def tables():
    rng = np.random.default_rng(0)
    return {
        "user": rng.normal(size=(50, 3)).astype(np.float32),
        "ça/../b": rng.normal(size=(20, 17)),
        "line": rng.normal(size=9).astype(np.float32),
        "empty": np.zeros((0, 4)),
    }


def gradient(k):
    rng = np.random.default_rng(k)
    values = rng.normal(size=(6, 3)).astype(np.float32)
    if k % 3 == 2:
        values[0, 0] = np.nan  # is skipped
    return {
        "user": RowGradient(rng.integers(0, 50, 6), values),
        "ça/../b": RowGradient(rng.integers(0, 20, 4), rng.normal(size=(4, 17))),
        "line": RowGradient(rng.integers(0, 9, 3), rng.normal(size=3)),
    }


def trained(steps=5, backend=CPU, **options):
    if backend is CPU:
        options["num_threads"] = 1
    opt = SparseAdam(backend.table(tables()), **{"lr": 0.1, "on_nonfinite": "skip", **options})
    for k in range(steps):
        opt.step(backend.gradient(gradient(k)))
    return opt


def bits_of(opt):
    return state_bits(opt, dict(opt.tables))


def assert_same(a, b):
    assert_same_bits(bits_of(a), bits_of(b))
    assert {**options_of(a), "num_threads": None} == {**options_of(b), "num_threads": None}


@pytest.fixture
def saved(tmp_path):
    opt = trained()
    checkpoint.save(tmp_path / "c", opt, EXTRA)
    return tmp_path / "c", opt


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load", "mmap", "restore"])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_training_goes_on_with_the_same_bits(step_counts, how, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 100)  # many pieces
    opt = trained(step_counts=step_counts, betas=(0.8, 0.95), eps=1e-5, eps_hat=True, maximize=True)
    opt.lr = 0.0  # a scheduler may end there
    checkpoint.save(tmp_path / "new" / "folder", opt, EXTRA)
    if how == "restore":
        other = SparseAdam(tables(), step_counts=step_counts)
        assert checkpoint.restore(tmp_path / "new" / "folder", other) == EXTRA
    else:
        other, extra = checkpoint.load(tmp_path / "new" / "folder", mmap=how == "mmap")
        assert extra == EXTRA
    assert_same(other, opt)
    other.num_threads = 1
    for k in range(5, 9):
        for each in (opt, other):
            each.lr = 0.01 * k
            each.step(gradient(k))
    assert_same(other, opt)
    assert opt.skipped_rows["user"] > 1


@pytest.mark.gpu
@pytest.mark.parametrize(("of", "to"), [(CPU, CUDA), (CUDA, CPU), (CUDA, CUDA)], ids=["to", "from", "on"])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_so_it_does_on_a_gpu_and_from_a_host_to_a_gpu_and_back(step_counts, of, to, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 100)
    opt = trained(3, of, step_counts=step_counts, betas=(0.8, 0.95), maximize=True)
    checkpoint.save(tmp_path, opt, EXTRA)
    other = SparseAdam(to.table(tables()), step_counts=step_counts)
    assert checkpoint.restore(tmp_path, other) == EXTRA
    loaded, _ = checkpoint.load(tmp_path)
    for each in (other, loaded):
        assert_same(each, opt)
    for k in (4, 5):
        for each, backend in ((opt, of), (other, to), (loaded, CPU)):
            each.step(backend.gradient(gradient(k)))
    assert_same(other, opt)
    assert_same(loaded, opt)
    assert opt.skipped_rows["user"] == 2
    checkpoint.save(tmp_path / "again", other)
    assert_same(checkpoint.load(tmp_path / "again")[0], opt)


@pytest.mark.gpu
@pytest.mark.parametrize("damage", ["a file is missing", "the last bit", "no manifest", "other counts"])
def test_what_is_damaged_changes_nothing_on_a_gpu(damage, tmp_path):
    opt = trained(1, CUDA)
    checkpoint.save(tmp_path, opt)
    opt.step(CUDA.gradient(gradient(1)))
    damaging, message = DAMAGES[damage]
    damaging(tmp_path)
    with refused(CheckpointError, ValueError, opt=opt, tables=dict(opt.tables)) as caught:
        checkpoint.restore(tmp_path, opt)
    caught.match(message)


def test_counts_beyond_int32_are_kept(tmp_path, backend):
    opt = trained(2, backend, step_counts="row")
    state = opt.state_dict()
    state["tables"]["user"]["steps"] = np.full(50, 2**40)
    opt.load_state_dict(state)
    checkpoint.save(tmp_path, opt)
    fresh = SparseAdam(backend.table(tables()), step_counts="row")
    for other, of_other in ((checkpoint.load(tmp_path)[0], CPU), (fresh, backend)):
        checkpoint.restore(tmp_path, other)
        assert other.state["user"].steps.dtype == np.int64
        assert_same(other, opt)
        other.step(of_other.gradient({"user": gradient(0)["user"]}))
        assert host(other.state["user"].steps).max() == 2**40 + 1


def test_the_package_safetensors_reads_the_files(saved):
    numpy = need("safetensors.numpy")
    folder, opt = saved
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert len(list(folder.iterdir())) == 5
    for record in manifest["tables"]:
        arrays, state = numpy.load_file(folder / record["file"]), opt.state[record["name"]]
        assert set(arrays) == {"param", "exp_avg", "exp_avg_sq", "steps"}
        np.testing.assert_array_equal(arrays["param"], state.param, strict=True)
        for name in ("exp_avg", "exp_avg_sq", "steps"):
            np.testing.assert_array_equal(arrays[name], getattr(state, name), strict=True)


def test_a_second_save_replaces_the_first_one(saved):
    folder, opt = saved
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    first = set(os.listdir(folder))
    opt.step(gradient(7))
    checkpoint.save(folder, opt)
    left = set(os.listdir(folder))
    assert first & left == {"manifest.json", "notes.txt"}
    assert len(left) == 6
    other, extra = checkpoint.load(folder)
    assert extra is None
    assert_same(other, opt)


def test_mapped_parameters_are_copied_when_they_are_changed(saved):
    folder, opt = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other, _ = checkpoint.load(folder, mmap=True, verify=True)
    other.num_threads = 1
    other.step(gradient(5))
    opt.step(gradient(5))
    assert_same(other, opt)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    checkpoint.save(folder, other)  # into the folder that it is mapped from
    assert_same(other, opt)
    assert_same(checkpoint.load(folder)[0], opt)


@pytest.mark.jit
def test_pieces_are_all_the_memory_that_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 1 << 20)
    opt = SparseAdam(np.ones((100_000, 32), np.float32))  # 13 MB, and four times that with its state
    opt.step(RowGradient(np.arange(100), np.ones((100, 32))))
    peaks = []
    for work in (lambda: checkpoint.save(tmp_path, opt), lambda: checkpoint.restore(tmp_path, opt)):
        tracemalloc.start()
        work()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 4 << 20
    assert 4 * 32 << 20 < 256 << 20  # with pieces as large as they are


def test_a_bar_is_shown_on_request(saved, capsys):
    folder, opt = saved
    checkpoint.save(folder, opt, progress=True)
    checkpoint.load(folder, progress=True)
    checkpoint.restore(folder, opt, progress=True)
    said = capsys.readouterr().err
    for what in ("saving: 100%", "loading: 100%", "verifying: 100%", "restoring: 100%"):
        assert what in said


# --- damage -------------------------------------------------------------------------------------------------


def one_file(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def rewrite(folder, change):
    """A manifest that somebody has edited, checksum included."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = manifests.digest(manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")


DAMAGES = {
    "a file is missing": (lambda c: one_file(c).unlink(), "is missing, which"),
    "a file is cut": (lambda c: os.truncate(one_file(c), one_file(c).stat().st_size - 1), "bytes, expected"),
    "a file is empty": (lambda c: os.truncate(one_file(c), 0), "has 0 bytes, expected"),
    "a file is longer": (
        lambda c: one_file(c).write_bytes(one_file(c).read_bytes() + b"x"),
        "bytes, expected",
    ),
    "a bit in the length": (lambda c: flip(one_file(c), 7), "a header of"),
    "a bit in the header": (lambda c: flip(one_file(c), 20), "is damaged"),
    "a bit in the parameters": (lambda c: flip(one_file(c), 600), "SHA-256"),
    "the last bit": (lambda c: flip(one_file(c), -1), "is damaged"),
    "a file of something else": (
        lambda c: one_file(c).write_bytes(b"{" * one_file(c).stat().st_size),
        "damaged",
    ),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda c: os.truncate(c / "manifest.json", 300), "manifest.json is damaged"),
    "a bit in the manifest": (lambda c: flip(c / "manifest.json", 200), "manifest.json"),
    "another manifest": (
        lambda c: (c / "manifest.json").write_text("[]", encoding="utf-8"),
        "is not the manifest",
    ),
    "of the future": (lambda c: rewrite(c, lambda m: m.update(version=2)), "has version 2, expected 1"),
    "a file elsewhere": (
        lambda c: rewrite(c, lambda m: m["tables"][0].update(file="../secret")),
        "was not written by",
    ),
    "no options": (lambda c: rewrite(c, lambda m: m.pop("options")), "was not written by"),
    "other options": (lambda c: rewrite(c, lambda m: m["options"].update(lr=-1.0)), "lr is -1.0"),
    "another shape": (
        lambda c: rewrite(c, lambda m: m["tables"][0].update(shape=[25, 6])),
        "not what the manifest says",
    ),
    "other counts": (
        lambda c: rewrite(c, lambda m: m["options"].update(step_counts="global")),
        "not what the manifest says|step_counts",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_by_name_and_nothing_is_changed(damage, saved):
    folder, opt = saved
    damaging, message = DAMAGES[damage]
    damaging(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)
    with refused(CheckpointError, ValueError, str(folder), opt=opt, tables=dict(opt.tables)):
        checkpoint.restore(folder, opt)


FIELDS = {
    "name": [None, 3, ["user"]],
    "file": [None, "/etc/passwd"],
    "size": ["3", -1, 2.0],
    "sha256": [None, 3],
    "shape": ["63", [50.0, 3], [-50, 3], [10**30, 3], None],
    "dtype": ["float16", None, 3],
    "steps": ["float64", None],
    "skipped_rows": [None, -1, 1.5, True, 2**70, "x"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in FIELDS for value in FIELDS[field]])
def test_a_manifest_that_somebody_has_edited(field, value, saved):
    folder, opt = saved
    rewrite(folder, lambda m: m["tables"][1].update({field: value}))
    with pytest.raises(CheckpointError):
        checkpoint.load(folder, mmap=True)
    with refused(CheckpointError, ValueError, str(folder), opt=opt, tables=dict(opt.tables)):
        checkpoint.restore(folder, opt)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("extra"),
        lambda m: m.update(more=1),
        lambda m: m["tables"].append(m["tables"][0]),
        lambda m: m["tables"][1].update(name="user"),
        lambda m: m.update(tables=[[]]),
    ],
)
def test_a_manifest_with_more_or_less_in_it(change, saved):
    folder, opt = saved
    rewrite(folder, change)
    with refused(CheckpointError, ValueError, "was not written by", opt=opt, tables=dict(opt.tables)):
        checkpoint.restore(folder, opt)


def test_json_that_is_too_deep(saved):
    folder, opt = saved
    (folder / "manifest.json").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        checkpoint.load(folder)
    itself = []
    itself.append(itself)
    with pytest.raises(CheckpointError, match="extra cannot be kept"):
        checkpoint.save(folder, opt, itself)


def test_a_table_that_cannot_be_written_to_changes_no_other(saved):
    folder, _ = saved
    other = trained(1)
    other.tables["line"].flags.writeable = False
    with refused(TableError, ValueError, "'line'", opt=other, tables=dict(other.tables)):
        checkpoint.restore(folder, other)


@pytest.mark.parametrize("name", ["steps", "exp_avg_sq"])
def test_negative_numbers_are_refused_even_with_the_right_checksums(name, saved):
    """A negative count would be an index."""
    folder, opt = saved
    file, state = one_file(folder), opt.state["user"]
    arrays = {"param": state.param, **{key: np.array(getattr(state, key)) for key in manifests.ARRAYS[1:]}}
    arrays[name][4] = -1
    if name == "exp_avg_sq":
        arrays[name][3] = np.nan  # which a negative number may hide behind
    with open(file, "wb") as opened:
        digest = tensor_files.write_tensors(opened, arrays, lambda _: None)
    rewrite(folder, lambda m: m["tables"][0].update(sha256=digest))
    for read in (lambda: checkpoint.load(folder), lambda: checkpoint.load(folder, mmap=True)):
        with pytest.raises(CheckpointError, match=f"has a negative number in {name}"):
            read()


def test_a_count_that_no_number_of_steps_is_is_refused(saved):
    folder, opt = saved
    file, state = one_file(folder), opt.state["user"]
    arrays = {"param": state.param, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    steps = np.array(state.steps, np.int64)
    steps[4] = 2**62 + 1
    with open(file, "wb") as opened:
        digest = tensor_files.write_tensors(opened, {**arrays, "steps": steps}, lambda _: None)
    size = file.stat().st_size
    rewrite(folder, lambda m: m["tables"][0].update(sha256=digest, steps="int64", size=size))
    for read in (lambda: checkpoint.load(folder), lambda: checkpoint.restore(folder, opt)):
        with pytest.raises(CheckpointError, match="has a count beyond"):
            read()


def test_mapped_files_are_verified_on_request(saved):
    folder, opt = saved
    flip(one_file(folder), 600)
    other, _ = checkpoint.load(folder, mmap=True)
    assert (bits_of(other)["user", "param"] != bits_of(opt)["user", "param"]).sum() == 1
    checkpoint.load(folder, verify=False)
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.load(folder, mmap=True, verify=True)


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ({"user": np.zeros((50, 3), np.float32)}, {}, "is of tables"),
        ({**tables(), "user": np.zeros((51, 3), np.float32)}, {}, r"\(50, 3\) float32, expected \(51, 3\)"),
        ({**tables(), "user": np.zeros((50, 3))}, {}, r"\(50, 3\) float64; nothing is converted"),
        (tables(), {"step_counts": "row"}, "step_counts 'element', expected 'row'"),
    ],
)
def test_what_does_not_fit_is_refused(tables, options, message, saved):
    folder, _ = saved
    other = SparseAdam(tables, **options)
    with refused(CheckpointError, ValueError, opt=other, tables=tables) as caught:
        checkpoint.restore(folder, other)
    caught.match(message)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": [1, {"b": np.zeros(3)}]}, r"extra\['a'\]\[1\]\['b'\] is a ndarray"),
        ({1: 2}, "has the key 1, expected str"),
        (object(), "extra is a object"),
    ],
)
def test_what_json_cannot_hold_is_refused(extra, message, saved):
    folder, opt = saved
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(folder, opt, extra)
    assert sorted(os.listdir(folder)) == before


# --- when it cannot be written ------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["a file begun", "a file written", "a file synced", "manifest written"])
def test_a_full_disk_leaves_the_checkpoint_that_was_there(point, saved, monkeypatch):
    folder, opt = saved
    expected, before = bits_of(opt), sorted(os.listdir(folder))
    opt.step(gradient(6))

    def full(where):
        if where == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")

    monkeypatch.setattr(saving, "_reached", full)
    with pytest.raises(OSError, match=r"saving a checkpoint in .*: No space left .* is as it was") as caught:
        checkpoint.save(folder, opt)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(folder)) == before
    assert_same_bits(bits_of(checkpoint.load(folder)[0]), expected)


LIMITED = """
import resource, sys
import numpy as np
from nb_sparse_adam import SparseAdam, checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what a full disk or a quota is like
try:
    checkpoint.save(sys.argv[1], SparseAdam({"small": np.ones(10), "large": np.ones((10_000, 8))}))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs limits of files")
def test_a_file_that_may_not_grow(saved):
    folder, opt = saved
    before = sorted(os.listdir(folder))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder)], capture_output=True, text=True, check=True
    )
    assert "File too large; the one that was there, if any, is as it was" in done.stdout
    assert sorted(os.listdir(folder)) == before
    assert_same(checkpoint.load(folder)[0], opt)


READ_ONLY = """
import os, sys
import numpy as np
from nb_sparse_adam import SparseAdam, checkpoint
optimizer = SparseAdam(np.ones((10, 2)))
if os.geteuid() == 0:  # may write anywhere
    os.setgid(65534)
    os.setuid(65534)
for folder in sys.argv[1:]:
    try:
        checkpoint.save(folder, optimizer)
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs users")
def test_a_folder_that_may_not_be_written_to(saved):
    folder, opt = saved
    before = sorted(os.listdir(folder))
    for path in (folder, *folder.parents[:3]):  # another user may look, but not write
        path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(folder), str(folder / "new")],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for path in (folder, *folder.parents[:3]):
            path.chmod(0o755)
    first, second = done.stdout.splitlines()
    for said in (first, second):
        assert said.startswith("PermissionError")
        assert "saving a checkpoint in" in said
        assert "Permission denied; the one that was there, if any, is as it was" in said
    assert sorted(os.listdir(folder)) == before
    assert_same(checkpoint.load(folder)[0], opt)


def test_an_optimizer_of_another_kind(tmp_path):
    for work in (lambda: checkpoint.save(tmp_path, {}), lambda: checkpoint.restore(tmp_path, None)):
        with pytest.raises(
            OptionTypeError, match=r"nb_sparse_adam\.SparseAdam, an EmbeddingTable or a mapping"
        ):
            work()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_after_the_manifest_is_in_its_place_loses_nothing(saved, monkeypatch):
    folder, opt = saved
    opt.step(gradient(6))
    replace = os.replace

    def interrupted(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, opt)
    monkeypatch.undo()
    assert_same(checkpoint.load(folder)[0], opt)
    checkpoint.save(folder, opt)
    assert len(os.listdir(folder)) == 5  # what was left is gone


def test_a_place_that_cannot_be_a_folder(saved):
    folder, opt = saved
    with pytest.raises(OSError, match="saving a checkpoint in"):
        checkpoint.save(folder / "manifest.json", opt)
    with pytest.raises(OSError, match="saving a checkpoint in"):
        checkpoint.save(folder / "manifest.json" / "below", opt)
    assert_same(checkpoint.load(folder)[0], opt)


# --- several at once ----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs locks of folders")
def test_two_savers_are_kept_apart(saved):
    folder, opt = saved
    with (
        saving._only_saver(folder),
        pytest.raises(CheckpointError, match="another save into this folder"),
    ):
        checkpoint.save(folder, opt)
    checkpoint.save(folder, opt)


FORKING = """
import os, sys, time
import numpy as np
from nb_sparse_adam import SparseAdam, checkpoint
from nb_sparse_adam._src.checkpoint import saving
optimizer = SparseAdam(np.ones((10, 2)))
children = []
def fork(point):
    if not children:
        children.append(os.fork())
        if children[0] == 0:
            os.close(1)
            time.sleep(30)
            os._exit(0)
saving._reached = fork  # as another thread may, that starts workers
checkpoint.save(sys.argv[1], optimizer, 1)
checkpoint.save(sys.argv[1], optimizer, 2)
os.kill(children[0], 9)
print(checkpoint.load(sys.argv[1])[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_child_forked_during_a_save_keeps_no_lock(tmp_path):
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "2\n"


def test_what_cannot_be_deleted_is_no_failure(saved):
    folder, opt = saved
    (folder / "table-0-0123456789abcdef.safetensors").mkdir()
    checkpoint.save(folder, opt, 2)
    assert checkpoint.load(folder)[1] == 2


def test_names_that_json_cannot_hold_are_refused(tmp_path):
    opt = SparseAdam({"\ud83d\ude00": np.ones((2, 2))})
    with pytest.raises(CheckpointError, match="JSON cannot hold"):
        checkpoint.save(tmp_path, opt)


def test_a_reader_beside_a_saver_sees_one_checkpoint_or_another(tmp_path):
    opt = SparseAdam({"a": np.zeros((4, 2)), "b": np.zeros(3)}, num_threads=1, step_counts="row")
    stop = threading.Event()

    def save_once(k):
        opt.step({"a": RowGradient([0], np.ones((1, 2))), "b": RowGradient([0], np.ones(1))})
        checkpoint.save(tmp_path, opt, k)

    def save_again_and_again():
        k = 1
        while not stop.is_set():
            k += 1
            save_once(k)

    save_once(1)  # compiles

    saver = threading.Thread(target=save_again_and_again)
    saver.start()
    try:
        seen, loads = set(), 0
        while len(seen) < 20 or loads < 100:
            loads += 1
            other, k = checkpoint.load(tmp_path)
            assert other.state["a"].steps[0] == other.state["b"].steps[0] == k
            seen.add(k)
    finally:
        stop.set()
        saver.join()


# --- kill -9 ------------------------------------------------------------------------------------------------

KILLS = """
import json, os, sys
import numpy as np
import kills
from nb_sparse_adam import RowGradient, SparseAdam, checkpoint

folder, at_random = sys.argv[1], int(sys.argv[2])

def make():
    tables = {"user": np.ones((200, 8), np.float32), "item": np.ones((50, 3))}
    return SparseAdam(tables, lr=0.1, num_threads=1)

def step(opt, k):
    rng = np.random.default_rng(k)
    opt.step({name: RowGradient(rng.integers(0, len(table), 20), rng.normal(size=(20, table.shape[1])))
              for name, table in opt.tables.items()})

def bits(opt):
    return [array.tobytes() for name, state in opt.state.items()
            for array in (state.param, state.exp_avg, state.exp_avg_sq, state.steps)]

def child():
    opt, k = checkpoint.load(folder)
    opt.num_threads = 1
    while True:
        step(opt, k)
        k += 1
        checkpoint.save(folder, opt, k)

never_interrupted = make()
step(never_interrupted, 0)
checkpoint.save(folder, never_interrupted, 1)
at, plans = 1, kills.plans((1, 2, 5), at_random)
for point, hit in plans:
    kills.until_killed(child, point, hit, 0.06)
    opt, k = checkpoint.load(folder)
    assert k >= at, (k, at)
    while at < k:
        step(never_interrupted, at)
        at += 1
    assert bits(opt) == bits(never_interrupted), (point, k)
checkpoint.save(folder, opt, k)
print(json.dumps({"killed": len(plans), "steps": at, "files": len(os.listdir(folder))}))
"""


@pytest.mark.jit
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_kill_9_at_any_moment_loses_nothing(tmp_path, request):
    at_random = 200 if request.config.getoption("--long") else 25
    result = json.loads(kills.run(KILLS, tmp_path / "c", at_random))
    assert result["killed"] == 21 + at_random
    assert result["steps"] > 30
    assert result["files"] == 3  # nothing is left of the saves that died
    shutil.rmtree(tmp_path)
