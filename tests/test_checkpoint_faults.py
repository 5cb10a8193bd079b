# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are not as they should be: odd files, odd manifests, changes in the middle, limits."""

import hashlib
import json
import os
import pickle
import random
import socket
import sys
import threading

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from needs import need

from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam._src.checkpoint import manifest, saving, tensor_files
from nb_sparse_adam.errors import CheckpointError, OptionError, OptionTypeError, StateError

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs files of POSIX systems")


def make(step_counts="row", seed=0, **options):
    rng = np.random.default_rng(seed)
    tables = {"a": rng.normal(size=(5, 3)).astype(np.float32), "b": rng.normal(size=4)}
    opt = SparseAdam(tables, step_counts=step_counts, num_threads=1, **options)
    step(opt, seed)
    return opt


def step(opt, seed=0):
    rng = np.random.default_rng(seed)
    opt.step({"a": RowGradient([1, 4], rng.normal(size=(2, 3))), "b": RowGradient([0], rng.normal(size=1))})


def bits_of(opt):
    return state_bits(opt, dict(opt.tables))


@pytest.fixture
def saved(tmp_path):
    opt = make()
    checkpoint.save(tmp_path / "c", opt, {"k": 1})
    return tmp_path / "c", opt


def content_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def in_time(work):
    """What waits for ever is a failure, and not a test run that never ends."""
    got = []

    def run():
        try:
            work()
        except CheckpointError as error:
            got.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    (error,) = got
    return str(error)


# --- what is no file ----------------------------------------------------------------------------------------


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(path.parent)  # the paths of sockets are short
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


NO_FILES = {
    "a pipe": (os.mkfifo if os.name == "posix" else None, "is a pipe, expected a regular file"),
    "a socket": (put_socket, "cannot be read"),
    "a folder": (os.mkdir, "is a folder, expected a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a regular file"),
    "a loop": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "is missing"),
}


@POSIX
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("of", ["manifest", "table"])
def test_what_is_no_file_is_refused_by_name_without_waiting(of, kind, saved):
    folder, opt = saved
    path = folder / "manifest.json" if of == "manifest" else sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    put, message = NO_FILES[kind]
    put(path)
    before = bits_of(opt)
    for work in (
        lambda: checkpoint.load(folder),
        lambda: checkpoint.load(folder, mmap=True),
        lambda: checkpoint.restore(folder, opt),
    ):
        said = in_time(work)
        assert str(path) in said
        assert message in said
    assert_same_bits(bits_of(opt), before)


@POSIX
def test_links_to_files_are_followed(saved, tmp_path):
    folder, opt = saved
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert_same_bits(bits_of(checkpoint.load(tmp_path / "links")[0]), bits_of(opt))


def test_a_path_that_is_no_folder(saved, tmp_path):
    folder, opt = saved
    for path in (folder / "manifest.json", tmp_path / "nothing", tmp_path / ("long" * 1000)):
        for work in (lambda at=path: checkpoint.load(at), lambda at=path: checkpoint.restore(at, opt)):
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                work()
    for path, error in ((3, OptionTypeError), (None, OptionTypeError), ("a\0b", OptionError)):
        for work in (
            lambda at=path: checkpoint.load(at),
            lambda at=path: checkpoint.restore(at, opt),
            lambda at=path: checkpoint.save(at, opt),
        ):
            with pytest.raises(error, match="path is"):
                work()


# --- more tables than files may be open ---------------------------------------------------------------------


@POSIX
def test_four_hundred_tables_where_256_files_may_be_open(tmp_path, monkeypatch):
    """As 1,500 where 1,024 may."""
    import resource  # not on Windows

    monkeypatch.setattr(os, "fsync", lambda _: None)
    opt = SparseAdam({f"t{i}": np.full((2, 1), float(i)) for i in range(400)})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        checkpoint.save(tmp_path, opt)
        loaded, _ = checkpoint.load(tmp_path)
        with pytest.raises(CheckpointError, match=r"mmap=True keeps the file of every table open.*ulimit -n"):
            checkpoint.load(tmp_path, mmap=True)
        other = SparseAdam({f"t{i}": np.zeros((2, 1)) for i in range(400)})
        checkpoint.restore(tmp_path, other)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, before[1]))
        checkpoint.restore(tmp_path, loaded)  # a process that has few left
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for each in (loaded, other):
        assert_same_bits(bits_of(each), bits_of(opt))


def many(value):
    return SparseAdam({f"t{i}": np.full((2, 1), value) for i in range(150)})


def test_many_files_of_which_a_save_deletes_some_meanwhile_are_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    checkpoint.save(tmp_path, many(1.0), "old")
    saves = []

    def save_once():
        if not saves:
            saves.append(checkpoint.save(tmp_path, many(2.0), "new"))

    def made(*given, **options):
        monkeypatch.setattr(saving, "SparseAdam", SparseAdam)
        save_once()
        return SparseAdam(*given, **options)

    monkeypatch.setattr(saving, "SparseAdam", made)
    loaded, extra = checkpoint.load(tmp_path)
    assert extra == "new"
    assert_same_bits(bits_of(loaded), bits_of(many(2.0)))

    checkpoint.save(tmp_path, many(1.0), "old")
    other = many(0.0)
    saves.clear()
    monkeypatch.setattr(saving, "_reached", lambda point: save_once() if point == "verified" else None)
    assert checkpoint.restore(tmp_path, other) == "new"
    assert_same_bits(bits_of(other), bits_of(many(2.0)))


# --- changes between the two readings of `restore` ----------------------------------------------------------


def flip(path, at, keep_time=False):
    status = path.stat()
    with open(path, "r+b") as opened:
        opened.seek(at, os.SEEK_END)
        (byte,) = opened.read(1)
        opened.seek(at, os.SEEK_END)
        opened.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns if keep_time else status.st_mtime_ns + 1))


def other_inode(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.with_name("other").write_bytes(content)
    os.replace(path.with_name("other"), path)


CHANGES = {
    "a bit": (lambda path: flip(path, -1), "has been changed while it was read"),
    "its length": (lambda path: os.truncate(path, 100), "has been changed while it was read"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_it_was_verified_changes_nothing(change, saved, monkeypatch):
    folder, _ = saved
    other = make(seed=1)
    path = sorted(folder.glob("*.safetensors"))[-1]  # the last: others would have been restored already
    changing, message = CHANGES[change]
    monkeypatch.setattr(saving, "_reached", lambda point: changing(path) if point == "verified" else None)
    with refused(CheckpointError, ValueError, str(path), message, opt=other, tables=dict(other.tables)):
        checkpoint.restore(folder, other)
    step(other)  # goes on


@POSIX
@pytest.mark.parametrize("change", [other_inode, os.unlink])
def test_a_file_that_is_replaced_meanwhile_is_read_to_its_end(change, saved, monkeypatch):
    folder, opt = saved
    other = make(seed=1)
    path = sorted(folder.glob("*.safetensors"))[-1]
    monkeypatch.setattr(saving, "_reached", lambda point: change(path) if point == "verified" else None)
    checkpoint.restore(folder, other)
    assert_same_bits(bits_of(other), bits_of(opt))


@pytest.fixture
def restored_in_part(saved, monkeypatch):
    """A change that nobody can see but by reading it again, and therefore in the middle."""
    folder, opt = saved
    other = make(seed=1)
    before = bits_of(other)
    path = sorted(folder.glob("table-1-*"))[0]
    content = path.read_bytes()
    monkeypatch.setattr(
        saving, "_reached", lambda point: flip(path, -1, True) if point == "verified" else None
    )
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 8)
    with pytest.raises(CheckpointError, match="has been changed since it was verified") as caught:
        checkpoint.restore(folder, other)
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert "Restore it again" in str(caught.value)
    path.write_bytes(content)
    return folder, opt, other, before


def test_nothing_is_copied_but_what_was_verified(restored_in_part):
    _, opt, other, before = restored_in_part
    after, new = bits_of(other), bits_of(opt)
    for key in after:  # the flipped bit is in the last count of "b"
        for old_bit, bit, new_bit in zip(*(x[key].reshape(-1) for x in (before, after, new)), strict=True):
            assert bit in (old_bit, new_bit, 0)  # counts of other width begin with zeros
    assert (after["a", "param"] == new["a", "param"]).all()


def test_an_optimizer_that_is_restored_in_part_goes_nowhere_but_to_restore(restored_in_part):
    folder, opt, other, _ = restored_in_part
    before = content_of(folder)
    for work in (
        lambda: step(other),
        lambda: other.step({}),
        lambda: other.state_dict(),
        lambda: pickle.dumps(other),
        lambda: checkpoint.save(folder, other),
        lambda: checkpoint.save(folder / "new", other),
        lambda: other.kernel_table("a").__enter__(),
    ):
        other.on_nonfinite = "skip"
        with refused(
            StateError, ValueError, str(folder), "Restore it again", opt=other, tables=dict(other.tables)
        ):
            work()
    assert content_of(folder) == before
    assert not (folder / "new").exists()
    checkpoint.restore(folder, other)
    step(other)
    step(opt)
    assert_same_bits(bits_of(other), bits_of(opt))


def test_wider_counts_are_allocated_for_all_tables_before_one_has_them(tmp_path, monkeypatch):
    """The second table's do not fit: the first one keeps its own, and no file is left."""
    wide = make()
    state = wide.state_dict()
    for name in ("a", "b"):
        state["tables"][name]["steps"] = np.full(len(wide.tables[name]), 2**40)
    wide.load_state_dict(state)
    checkpoint.save(tmp_path / "c", wide)
    other = make(seed=1, state_dir=tmp_path / "state")
    before, memmap, made = content_of(tmp_path / "state"), np.memmap, []

    def full(*given, **options):
        made.append(given)
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        return memmap(*given, **options)

    monkeypatch.setattr(np, "memmap", full)
    with refused(OSError, OSError, "No space left", opt=other, tables=dict(other.tables)):
        checkpoint.restore(tmp_path / "c", other)
    assert content_of(tmp_path / "state") == before
    monkeypatch.undo()
    checkpoint.restore(tmp_path / "c", other)
    assert_same_bits(bits_of(other), bits_of(wide))


# --- odd manifests ------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """A manifest that somebody has edited, checksum included."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["sha256"]
    change(content)
    content["sha256"] = manifest.digest(content)
    file.write_text(json.dumps(content), encoding="utf-8")


ODD_SHAPES = [[], [2, 2, 2], [0, 2**62], [2**62, 0], [0, 2**60], [2**40, 2**40], [10**4000], [True, 3]]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(tables=[]),
        lambda m: m.update(tables={}),
        lambda m: m.update(tables="ab"),
        lambda m: m.update(tables=None),
        lambda m: m["tables"].append(["name", "file", "size"]),
        lambda m: m.update(options=[]),
        lambda m: m["options"].update(lr=10**400),
        lambda m: m["options"].update(betas=[0.9]),
        lambda m: m["options"].update(on_nonfinite=["raise"]),
        lambda m: m["tables"][0].update(size=10**4000),
        *(lambda m, shape=shape: m["tables"][0].update(shape=shape) for shape in ODD_SHAPES),
    ],
)
def test_a_manifest_that_says_odd_things(change, saved):
    folder, opt = saved
    rewrite(folder, change)
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match=str(folder)):
            checkpoint.load(folder, mmap=mmap)
    with refused(CheckpointError, ValueError, str(folder), opt=opt, tables=dict(opt.tables)):
        checkpoint.restore(folder, opt)


ODD_TEXTS = {
    "nothing": b"",
    "zeros": bytes(1000),
    "no JSON": b"manifest",
    "no UTF-8": b'{"format": "\xff\xfe"}',
    "half a character": b'{"format": "\xc3',
    "deep lists": b"[" * 100_000,
    "deep dicts": b'{"a":' * 100_000,
    "deep, but valid": b'{"format": "nb_sparse_adam checkpoint", "extra": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a key twice": b'{"format": "nb_sparse_adam checkpoint", "format": "nb_sparse_adam checkpoint"}',
    "a long integer": b'{"format": "nb_sparse_adam checkpoint", "version": ' + b"1" * 5000 + b"}",
    "a number": b"1",
    "a string": b'"nb_sparse_adam checkpoint"',
    "null": b"null",
}


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_manifest_of_odd_text(text, saved):
    folder, opt = saved
    (folder / "manifest.json").write_bytes(ODD_TEXTS[text])
    for work in (lambda: checkpoint.load(folder), lambda: checkpoint.restore(folder, opt)):
        with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
            work()
        assert str(folder) in str(caught.value)


def test_a_key_that_is_there_twice_is_refused_with_the_right_checksum_too(saved):
    folder, _ = saved
    file = folder / "manifest.json"
    text = file.read_text(encoding="utf-8").replace('"options": {', '"options": {\n  "lr": 5.0,', 1)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="a key is there twice"):
        checkpoint.load(folder)


def test_arrays_that_are_not_aligned_are_read_but_not_mapped(saved):
    folder, opt = saved
    path = sorted(folder.glob("table-1-*"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little") + 3
    content = length.to_bytes(8, "little") + content[8 : length + 5] + b"   " + content[length + 5 :]
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(folder, lambda m: m["tables"][1].update(size=len(content), sha256=digest))
    assert_same_bits(bits_of(checkpoint.load(folder)[0]), bits_of(opt))
    with pytest.raises(CheckpointError, match=r"not aligned; pass mmap=False"):
        checkpoint.load(folder, mmap=True)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("shape", [(0, 2**40), (0, 2**57), (0,), (3, 0)])
def test_tables_without_elements_that_numpy_can_have(shape, step_counts, tmp_path):
    opt = SparseAdam(np.zeros(shape, np.float32), step_counts=step_counts)
    checkpoint.save(tmp_path, opt)
    loaded, _ = checkpoint.load(tmp_path)
    assert loaded.tables["table"].shape == shape
    checkpoint.restore(tmp_path, opt)


ODD_VALUES = [None, True, 0, 1, -1, 2**31, 2**62, 2**64, 10**400, -1.5, 1e308, float("nan")]
ODD_VALUES += ["", "x", "\ud800", "float32", "int64", "I64", [], [[]], {}, {"a": 1}]
ODD_VALUES += [[0], [0, 2**62], [2**59, 0], [2, 2, 2], [5, 3]]


def places(value):
    """Every container in it, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutate(value, rng):
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            return
        container, key = rng.choice(found)
        if rng.random() < 0.2:
            del container[key]
        elif rng.random() < 0.1 and isinstance(container, dict):
            container["more"] = 1
        else:
            container[key] = rng.choice(ODD_VALUES)


def test_manifests_and_headers_that_are_changed_at_random(saved, request):
    """With the right checksums: whatever is read either is a checkpoint or is refused as none."""
    folder, opt = saved
    good = content_of(folder)
    rng, said = random.Random(0), []
    for _ in range(3000 if request.config.getoption("--long") else 150):
        for name, content in good.items():
            (folder / name).write_bytes(content)
        whole = json.loads(good["manifest.json"])
        del whole["sha256"]
        if rng.random() < 0.5:
            record = rng.choice(whole["tables"])
            content = good[record["file"]]
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            mutate(header, rng)
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text + content[8 + length :]
            (folder / record["file"]).write_bytes(content)
            record.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        else:
            mutate(whole, rng)
        whole["sha256"] = manifest.digest(whole)
        (folder / "manifest.json").write_text(json.dumps(whole), encoding="utf-8")
        for work in (
            lambda: checkpoint.load(folder),
            lambda: checkpoint.load(folder, mmap=True),
            lambda: checkpoint.restore(folder, opt),
        ):
            try:
                work()
            except CheckpointError as error:
                said.append(str(error))
    assert all(str(folder) in message for message in said)
    assert len(said) > 300
    step(opt)


# --- what a caller adds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (float("nan"), "extra is nan, expected a finite number"),
        ({"best": [1.0, {"loss": float("inf")}]}, r"extra\['best'\]\[1\]\['loss'\] is inf"),
        ((1, -np.float64("inf")), r"extra\[1\] is .*inf"),
        ({"a": {None: 1}}, r"extra\['a'\] has the key None, expected str"),
        ({"a": {(1, 2): 1}}, r"has the key \(1, 2\), expected str"),
        ({"x": ["\ud83d\ude00"]}, r"extra\['x'\]\[0\] is .*surrogates"),
        ({"\ud83d\ude00": 1}, "extra has the key .*surrogates"),
        (b"bytes", "extra is a bytes"),
        ({1, 2}, "extra is a set"),
        (np.float32(1), "extra is a float32"),
        pytest.param(10**5000, "extra cannot be kept as JSON", id="a long integer"),
    ],
)
def test_extra_that_would_not_come_back_is_refused(extra, message, saved):
    folder, opt = saved
    before = content_of(folder)
    for path in (folder, folder / "new"):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(path, opt, extra)
    assert content_of(folder) == before
    assert not (folder / "new").exists()


def test_extra_that_is_too_deep_is_refused_before_anything_is_written(saved):
    folder, opt = saved
    before, extra = content_of(folder), []
    for _ in range(sys.getrecursionlimit()):
        extra = [extra]
    with pytest.raises(CheckpointError, match="extra cannot be kept as JSON"):
        checkpoint.save(folder, opt, extra)
    assert content_of(folder) == before


def test_extra_is_what_every_reader_of_json_understands(saved):
    folder, opt = saved
    extra = {"t": (1, (2.5, None)), "ü": "\ud800", "f": np.float64(0.1), "big": 2**80, "e": {}}
    checkpoint.save(folder, opt, extra)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((folder / "manifest.json").read_bytes(), parse_constant=refuse)
    back = checkpoint.load(folder)[1]
    assert back == {**extra, "t": [1, [2.5, None]]}
    assert type(back["f"]) is float


def test_a_checkpoint_with_nan_in_its_extra_that_was_saved_before_is_still_read(saved):
    folder, opt = saved
    rewrite(folder, lambda m: m.update(extra={"loss": float("nan")}))
    assert np.isnan(checkpoint.load(folder)[1]["loss"])
    assert np.isnan(checkpoint.restore(folder, opt)["loss"])


# --- what is not ours ---------------------------------------------------------------------------------------

FOREIGN = {
    "of an app": b'{"name": "my app", "icons": []}',
    "of another version of the same idea": b'{"format": "some other checkpoint", "version": 1}',
    "that speaks of us": b'{"files": [{"format": "nb_sparse_adam checkpoint"}]}',
    "a list": b'["nb_sparse_adam checkpoint"]',
    "text": b"what is in this folder",
    "binary": b"\x00\x01\x02",
    "damaged, of an app": b'{"name": "my app", ',
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_manifest_is_not_replaced(kind, tmp_path):
    (tmp_path / "manifest.json").write_bytes(FOREIGN[kind])
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    before = content_of(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"manifest\.json is not of a checkpoint.*save into another"
    ) as e:
        checkpoint.save(tmp_path, make())
    assert str(tmp_path) in str(e.value)
    assert content_of(tmp_path) == before


@POSIX
@pytest.mark.parametrize("kind", NO_FILES)
def test_neither_is_what_is_no_file(kind, tmp_path):
    NO_FILES[kind][0](tmp_path / "manifest.json")
    said = in_time(lambda: checkpoint.save(tmp_path, make()))
    assert "manifest.json" in said
    assert "not replaced: save into another folder, or move it out of the way" in said
    assert os.listdir(tmp_path) == ["manifest.json"]


OURS_DAMAGED = {
    "a bit": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "its end": lambda content: content[:-1],
    "most of it": lambda content: content[:60],
    "all of it": lambda _: b"",
    "zeros, as after a crash": lambda content: bytes(len(content)),
    "of the future": lambda content: content.replace(b'"version": 1', b'"version": 2'),
    "no UTF-8": lambda content: content[:300] + b"\xff" + content[301:],
}


@pytest.mark.parametrize("damage", OURS_DAMAGED)
def test_a_damaged_manifest_of_ours_is_replaced(damage, saved):
    folder, opt = saved
    file = folder / "manifest.json"
    file.write_bytes(OURS_DAMAGED[damage](file.read_bytes()))
    with pytest.raises(CheckpointError):
        checkpoint.load(folder)
    checkpoint.save(folder, opt)
    assert_same_bits(bits_of(checkpoint.load(folder)[0]), bits_of(opt))
    assert len(os.listdir(folder)) == 3  # what the damaged one named is gone


def test_only_what_a_save_has_written_is_deleted(saved):
    folder, opt = saved
    token = "0123456789abcdef"
    safetensors = need("safetensors.numpy")
    mine = {
        f"table-7-{token}.safetensors": b"my notes about table 7",
        f"table-8-{token}.safetensors": safetensors.save({"weights": np.ones(3)}),
        f".manifest-{token}.json": b'{"mine": true}',
        ".writable": b"mine",
        f"table-0-{token}.safetensors.bak": b"mine",
    }
    left = sorted(folder.glob("table-0-*"))[0].read_bytes()
    ours = {
        f"table-1-{token}.safetensors": left,
        f"table-2-{token}.safetensors": left[:-100],  # saves that did not come to their end
        f"table-3-{token}.safetensors": b"",
        ".manifest-fedcba9876543210.json": (folder / "manifest.json").read_bytes()[:-5],
    }
    for name, content in {**mine, **ours}.items():
        (folder / name).write_bytes(content)
    checkpoint.save(folder, opt)
    after = content_of(folder)
    assert {name: after.get(name) for name in mine} == mine
    assert not ours.keys() & after.keys()
    assert len(after) == len(mine) + 3


@POSIX
def test_links_and_pipes_called_as_ours_are_left_alone(saved, tmp_path):
    folder, opt = saved
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    names = [f"table-{i}-0123456789abcdef.safetensors" for i in range(3)]
    (folder / names[0]).symlink_to(tmp_path / "mine")
    (folder / names[1]).symlink_to("nothing")
    os.mkfifo(folder / names[2])
    thread = threading.Thread(target=checkpoint.save, args=(folder, opt), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert set(names) < set(os.listdir(folder))
