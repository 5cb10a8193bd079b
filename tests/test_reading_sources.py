# SPDX-License-Identifier: Apache-2.0
"""JSON lines; where interactions may come from; what is no list of interactions."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import INTEGERS, TEXT, lines_of, pairs_of
from needs import need

from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.errors import InteractionsError, OptionError

pl = need("polars")
zstandard = need("zstandard")

ROOT = Path(__file__).parents[1]


# --- JSON lines -------------------------------------------------------------------------------------------

JSON_LINES = {
    "names": b'{"user_id": 1, "item_id": 10}\n{"item_id": 30, "user_id": 1}\n{"user_id":2,"item_id":10}\n'
    b'{"user_id":12,"item_id":7}',
    "nested values that nobody needs": b'{"x": [{"user": 5}], "visitorid": 1, "sku": 10}\n\n'
    b'{"visitorid": 1, "sku": 30, "x": {}}\n  {"visitorid":2,"sku":10}\n{"visitorid":"12","sku":" 7 "}\n',
    "Windows": b'\xef\xbb\xbf{"user":1,"item":10}\r\n{"user":1,"item":30}\r\n{"user":2,"item":10}\r\n'
    b'{"user":12,"item":7}\r\n',
    "escapes": b'{"us\\u0065r":"\\u0031","item":10}\n{"user":1,"item":30}\n{"user":2,"item":10}\n'
    b'{"user":12,"item":7}\n',
}  # fmt: skip


@pytest.mark.parametrize("content", JSON_LINES.values(), ids=JSON_LINES.keys())
@pytest.mark.parametrize("file_format", ["auto", "json"])
def test_json_lines(content, file_format, write):
    got = read_interactions(write(content), file_format)
    assert pairs_of(got) == INTEGERS
    assert "JSON lines (users in" in got.description
    assert pairs_of(read_interactions(write(gzip.compress(content)), file_format)) == INTEGERS


GOOD = '{"user": 1, "item": 2}\n'
BAD_JSON_LINES = {
    "a missing key": ('{"user": 1}', "has no key 'item'"),
    "null": ('{"user": null, "item": 1}', "has null for key 'user'"),
    "a list": ('{"user": [1], "item": 1}', "'user' is a nested value"),
    "an object": ('{"user": 1, "item": {"id": 1}}', "'item' is a nested value"),
    "a float": ('{"user": 1.5, "item": 1}', "'user' is 1.5; expected an integer or a string"),
    "a truth": ('{"user": true, "item": 1}', "'user' is true"),
    "a blank": ('{"user": " ", "item": 1}', "'user' is"),
    "a line end": (r'{"user": "a\nb", "item": 1}', "'user' is"),
    "a NUL": (r'{"user": "a\u0000b", "item": 1}', "'user' is"),
    "half a pair": (r'{"user": "\ud800", "item": 1}', "'user' is"),
    "no object": ("[1, 2]", "expected a JSON object"),
    "a number": ("5", "expected a JSON object"),
    "no JSON": ("1,2", "is no JSON"),
    "cut off": ('{"user": 1, "it', "is no JSON"),
    "two": ('{"user": 1, "item": 2} {"user": 1, "item": 2}', "is no JSON"),
    "deep": ('{"user": ' + "[" * 200_000, "is no JSON"),
    "a long number": ('{"user": ' + "9" * 5000 + ', "item": 1}', "is no JSON"),
    "a raw control character": ('{"user": "a\tb", "item": 1}', "is no JSON"),
}


@pytest.mark.parametrize("far", [1, 100_000])
@pytest.mark.parametrize(("line", "words"), BAD_JSON_LINES.values(), ids=BAD_JSON_LINES.keys())
def test_bad_json_lines(line, words, far, write):
    path = write(GOOD * far + line + "\n" + GOOD)
    with pytest.raises(InteractionsError) as caught:
        read_interactions(path)
    assert f"{path}, line {far + 1}: {words}" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_keys_that_are_not_found_are_asked_for(write):
    path = write('{"who": "a", "what": "b"}\n')
    with pytest.raises(InteractionsError, match=r"columns 'who', 'what'; cannot tell .*--user-column"):
        read_interactions(path)
    assert pairs_of(read_interactions(path, user_column="who", item_column="what")) == [("a", "b")]
    assert pairs_of(read_interactions(path, user_column="who")) == [("a", "b")]  # there is one other


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(min_size=1, max_size=5)), min_size=1))
def test_what_json_writes_is_read(pairs):
    pairs = [(user, item.strip()) for user, item in pairs if item.isprintable() and item.strip()]
    if not pairs:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_text("".join(json.dumps({"user": user, "item": item}) + "\n" for user, item in pairs))
        got = read_interactions(path)
    assert {(user, str(item)) for user, item in pairs_of(got)} == set(pairs)


# --- where it comes from ----------------------------------------------------------------------------------


def frames(content):
    """The content in two frames, one of which says its size and one does not."""
    one = zstandard.ZstdCompressor().compress(content[: len(content) // 2])
    other = zstandard.ZstdCompressor().compressobj()
    return one + other.compress(content[len(content) // 2 :]) + other.flush()


def test_zstandard(write):
    assert pairs_of(read_interactions(write(frames(TEXT), "a.csv.zst"))) == INTEGERS
    text = lines_of((at % 1000, at % 777) for at in range(400_000)).encode()
    assert len(read_interactions(write(frames(text))).pairs) == len(read_interactions(write(text, "y")).pairs)


def test_damaged_zstandard(write):
    packed = frames(lines_of((at * 7919 % 99991, at) for at in range(3000)).encode())
    for end in (5, 100, len(packed) // 3, len(packed) - 1):
        with pytest.raises(
            InteractionsError, match=r"interactions.txt(: cannot be read: |: is empty|, line)"
        ):
            read_interactions(write(packed[:end]))
    for at in (6, len(packed) // 4):
        damaged = packed[:at] + bytes([packed[at] ^ 255]) + packed[at + 1 :]
        with pytest.raises(InteractionsError, match=r"interactions.txt(: cannot be read: |, line \d+: )"):
            read_interactions(write(damaged))
    with pytest.raises(InteractionsError, match="cannot be read"):
        read_interactions(write(frames(TEXT) + b"rubbish"))


def test_a_line_of_zstandard_without_end_is_refused(write):
    with pytest.raises(InteractionsError, match="line 2: is longer than 16,777,216 characters"):
        read_interactions(write(zstandard.compress(b"1,2\n" + b"3" * (100 << 20))))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
@pytest.mark.parametrize("kind", ["delimited", "json"])
def test_memory_follows_what_is_distinct(kind, write, tmp_path):
    line = {"delimited": "a{},b{},{}\n", "json": '{{"user":"a{}","item":"b{}","x":"{}"}}\n'}[kind]
    block = "".join(line.format(at % 100, at % 70, "x" * 5000) for at in range(700)).encode()
    write(block, "small")
    packer = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / "large", "wb") as file:
        for _ in range(30):
            file.write(packer.compress(block))  # 105 MB in all
        file.write(packer.flush())
    program = (
        "import resource; from nb_sparse_adam._src.recommender.reading import read_interactions as read; "
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; import zstandard; "
        "read('small'); before = used(); large = read('large'); "
        "print(len(large.pairs), large.repeated, used() - before)"
    )
    done = child([sys.executable, "-c", program], cwd=tmp_path)
    distinct, repeated, kilobytes = map(int, done.stdout.split())
    assert (distinct, repeated) == (700, 29 * 700)
    assert kilobytes < 50_000


def test_zstandard_without_its_package(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(frames(TEXT))
    with pytest.raises(ImportError, match=r'zstandard.*pip install "nb_sparse_adam\[train\]"'):
        read_interactions(path)
    assert pairs_of(read_interactions(write(TEXT))) == INTEGERS


PROGRAM = (
    "import sys; from nb_sparse_adam._src.recommender.reading import read_interactions; "
    "read = read_interactions(sys.argv[1:]); print(len(read.pairs), read.description)"
)


def child(arguments, **more):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(arguments, env=environment, capture_output=True, timeout=120, check=False, **more)


@pytest.mark.parametrize("kind", ["text", "gzip", "zstandard", "json", "parquet"])
def test_standard_input_is_named_by_a_hyphen(kind, tmp_path):
    if kind == "parquet":
        pl.DataFrame({"user": [1, 1, 2, 12], "item": [10, 30, 10, 7]}).write_parquet(tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
    else:
        content = {
            "text": TEXT, "gzip": gzip.compress(TEXT), "zstandard": frames(TEXT), "json": JSON_LINES["names"],
        }[kind]  # fmt: skip
    done = child([sys.executable, "-c", PROGRAM, "-"], input=content)
    assert done.stdout.startswith(b"4 standard input, "), done.stderr


def test_standard_input_and_files_together(write):
    done = child([sys.executable, "-c", PROGRAM, str(write(b"8,9\n1,10\n")), "-"], input=TEXT)
    assert done.stdout.startswith(b"5 interactions.txt, "), done.stderr
    assert b"; standard input, " in done.stdout
    done = child([sys.executable, "-c", PROGRAM + "; print(sys.stdin.buffer.read())", "-"], input=TEXT)
    assert done.stdout.endswith(b"\nb''\n"), done.stderr  # it was read, and is not closed
    for files in (["-", "-"], ["-", write(TEXT), "-"]):
        with pytest.raises(OptionError, match="can be read once"):
            read_interactions(files)
    with pytest.raises(OptionError, match="can be read once"):
        read_split("-", "-")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InteractionsError, match="standard input is closed"):
        read_interactions("-")


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="process substitution")
def test_process_substitution(write):
    path = write(gzip.compress(TEXT))
    command = f"'{sys.executable}' -c '{PROGRAM}' <(gzip -dc '{path}') <(echo 5,6) <(cat '{path}')"
    done = child(["bash", "-c", command])
    assert done.stdout.startswith(b"5 "), done.stderr


@pytest.mark.parametrize(
    "address", ["http://host/a.csv", "https://host/a", "s3://b/a.csv", "hf://x/y", "gs://b/a"]
)
def test_an_address_is_not_fetched(address):
    for one in (address, Path(address)):
        with pytest.raises(InteractionsError, match="is a URL, which is not fetched: download it first"):
            read_interactions(one)
    with pytest.raises(InteractionsError, match="is a URL: give the path alone"):
        read_interactions("file:///nowhere/a.csv")
    with pytest.raises(InteractionsError) as caught:
        read_interactions("nowhere/a.csv")
    assert "URL" not in str(caught.value)


def test_several_files_of_several_kinds(write, tmp_path):
    pl.DataFrame({"item": [7], "user": [12]}).write_parquet(tmp_path / "p")
    files = [write("user,item\n1,10\n", "a"), write(gzip.compress(b"1\t30\n1\t10\n"), "b"), tmp_path / "p",
             write('{"user":2,"item":10}\n', "c")]  # fmt: skip
    got = read_interactions(files)
    assert pairs_of(got) == INTEGERS
    assert got.repeated == 1
    assert [part.partition(",")[0] for part in got.description.split("; ") if "," in part][:1] == ["a"]
    for name in "abpc":
        assert f"{name}, " in got.description
    turned = read_interactions(tuple(reversed(files)))
    np.testing.assert_array_equal(turned.pairs.indices, got.pairs.indices)
    with pytest.raises(InteractionsError, match="b, line 2"):
        read_interactions([files[0], write("1,2\n3\n", "b")])
    with pytest.raises(OptionError, match="empty"):
        read_interactions([])


# --- what is no list of interactions ----------------------------------------------------------------------

LIBFM = [
    "1 3:1 10:1\n0 2:1 11:1\n",
    "5 3:1\n4 2:1\n",
    "1 0:3:1 1:10:0.5\n-1 0:2:1 1:11:1e-3 2:7:1\n",
    "+1 1:0.5\n-1\n",
]


@pytest.mark.parametrize("text", LIBFM)
def test_libfm_is_noticed(text, write):
    path = write(text)
    with pytest.raises(
        InteractionsError, match=r"line 1: is in the format of libfm or libsvm.*user and an item"
    ):
        read_interactions(path)
    if "\n-1\n" not in text:
        assert len(read_interactions(path, "delimited").pairs) == 2  # who says so gets it


def matrix(kind, shape=(30, 12), seed=0):
    rng = np.random.default_rng(seed)
    stars = rng.integers(1, 6, shape) * (rng.random(shape) < (1 if kind == "full" else 0.3))
    counts = rng.integers(1, 10**6, shape) * (rng.random(shape) < 0.3)
    cells = {"counts": counts, "clicks": stars > 0, "halves": stars / 2}.get(kind, stars)
    cells = cells.astype(int) if kind != "halves" else cells
    return [["" if kind == "blanks" and not cell else cell for cell in row] for row in cells.tolist()]


@pytest.mark.parametrize("kind", ["full", "zeros", "blanks", "counts", "clicks", "halves"])
@pytest.mark.parametrize("labels", ["none", "users", "users and items", "names"])
@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
def test_a_matrix_of_ratings_is_noticed(kind, labels, separator, write):
    if separator == " " and kind == "blanks":
        return  # nobody can write it so
    rows = matrix(kind)
    if labels != "none":
        rows = [[at + 1, *row] for at, row in enumerate(rows)]
    if labels == "users and items":
        rows = [["user" if separator == " " else "", *range(1, 13)], *rows]
    if labels == "names":
        rows = [["user", *(f"Film{at}" for at in range(12))], *rows]
    with pytest.raises(
        InteractionsError, match=r"looks like a matrix of ratings.*a user and an item on each line"
    ):
        read_interactions(write(lines_of(rows, separator)))


def test_what_has_many_columns_is_no_matrix(write):
    rng = np.random.default_rng(0)
    rows = [
        [at // 5, rng.integers(500), rng.integers(1, 6), 10**9 + at, *rng.integers(0, 2, 12)]
        for at in range(200)
    ]
    got = read_interactions(write(lines_of(rows)))
    assert len(got.pairs) > 190
    named = write("user,item," + ",".join(f"f{at}" for at in range(14)) + "\n" + lines_of(rows), "y")
    assert len(read_interactions(named).pairs) == len(got.pairs)
    told = read_interactions(write(lines_of(matrix("zeros"))), user_column=1, item_column=2)
    assert "users in column 1, items in column 2" in told.description


def test_matrix_market_is_noticed(write):
    with pytest.raises(InteractionsError, match=r"line 1: is a Matrix Market file.*scipy\.io\.mmread"):
        read_interactions(write("%%MatrixMarket matrix coordinate real general\n% x\n3 3 1\n1 1 5\n"))
