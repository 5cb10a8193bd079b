# SPDX-License-Identifier: Apache-2.0
"""Files of interactions as people have them: names, pipes, line ends, quotes, damage, and sizes."""

import csv
import gzip
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from interaction_files import INTEGERS, TEXT, pairs_of
from needs import need

from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.errors import InteractionsError

pl = need("polars")

ROOT = Path(__file__).parents[1]


def parquet(path):
    users, items = zip(*INTEGERS, strict=True)
    pl.DataFrame({"user": users, "item": items}).write_parquet(path)
    return path.read_bytes()


# --- a name is a name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "gzip", "parquet"])
@pytest.mark.parametrize(
    "name", ["./-", "r[1].csv", "s*.csv", "s?.csv", "{1,2}.csv", "**", "~", " a b ", "%20.csv", "$HOME"]
)
def test_a_name_is_no_pattern(name, kind, tmp_path, monkeypatch):
    content = {"text": TEXT, "gzip": gzip.compress(TEXT), "parquet": parquet(tmp_path / "x")}[kind]
    for other in ("r1.csv", "s1.csv", "s2.csv", "1.csv", "2.csv"):
        (tmp_path / other).write_bytes(b"98,99\n")
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert pairs_of(read_interactions(name)) == INTEGERS
    assert pairs_of(read_interactions(tmp_path / name)) == INTEGERS


@pytest.mark.parametrize("scheme", ["hf:", "s3:", "http:", "file:"])
def test_a_name_is_no_address(scheme, tmp_path, monkeypatch):
    (tmp_path / scheme / "host").mkdir(parents=True)
    (tmp_path / scheme / "host" / "a.csv").write_bytes(TEXT)
    monkeypatch.chdir(tmp_path)
    assert pairs_of(read_interactions(f"{scheme}//host/a.csv")) == INTEGERS
    with pytest.raises(InteractionsError, match="No such file"):
        read_interactions(f"{scheme}//host/b.csv")


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take UTF-8 names only")
def test_names_that_no_terminal_can_show(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xe9\n\x1b[31m.csv"
    Path(os.fsdecode(path)).write_bytes(TEXT)
    got = read_interactions(os.fsdecode(path))
    assert pairs_of(got) == INTEGERS
    assert got.description.isprintable()
    Path(os.fsdecode(path)).write_bytes(b"1\n")
    with pytest.raises(InteractionsError, match="one column only") as caught:
        read_interactions(os.fsdecode(path))
    assert str(caught.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("kind", ["text", "gzip", "parquet"])
def test_pipes(kind, tmp_path):
    content = {"text": TEXT, "gzip": gzip.compress(TEXT), "parquet": parquet(tmp_path / "x")}[kind]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert pairs_of(read_interactions(pipe)) == INTEGERS
    writer.join()


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="/dev/stdin")
def test_standard_input():
    program = (
        "from nb_sparse_adam._src.recommender.reading import read_interactions; "
        "read = read_interactions('/dev/stdin'); print(len(read.pairs), read.description)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, input=b"1,2\n3,4\n" * 20_000, capture_output=True,
    )  # fmt: skip
    assert done.stdout == (
        b"2 stdin, delimited text (comma, no header; users in column 1, items in column 2)\n"
    ), done.stderr


# --- line ends --------------------------------------------------------------------------------------------

LINE_ENDS = {
    "of old Macs": b"1,10\r1,30\r2,10\r12,7\r",
    "of old Macs, with header": b"user,item\r1,10\r1,30\r2,10\r12,7",
    "of old Macs, quoted": b'1,"10"\r1,30\r2,10\r12,7\r',
    "of Windows": b"1,10\r\n1,30\r\n2,10\r\n12,7\r\n",
    "of Windows and Unix": b"1,10\r\n1,30\n2,10\r\n12,7",
    "of Windows, written twice": b"1,10\r\r\n1,30\r\r\n2,10\r\r\n12,7\r\r\n",
    "a carriage return in a field that nobody needs": b"1,10,x\ry\n1,30,x\n2,10,\r\n12,7,x\n",
    "the same in quotes": b'1,10,"x\ry"\n1,30,x\n2,10,"x\r"\n12,7,x\n',
}


@pytest.mark.parametrize("content", LINE_ENDS.values(), ids=LINE_ENDS.keys())
@pytest.mark.parametrize("separator", [b",", b";", b"\t", b"::", b" "])
def test_line_ends(content, separator, write):
    if b'"' in content and separator not in b",;":
        content = content.replace(b'"', b"")
    assert pairs_of(read_interactions(write(content.replace(b",", separator)))) == INTEGERS


def test_line_ends_of_adjacency_lines(write):
    for end in (b"\n", b"\r\n", b"\r"):
        assert pairs_of(read_interactions(write(b"1 10 30\n2 10\n12 7\n".replace(b"\n", end)))) == INTEGERS


@pytest.mark.parametrize(
    ("content", "file_format"),
    [
        (b"1,2\n3,4\r5,6\n7,8\n", "auto"),
        (b"1\t2\n3\t4\r5\t6\n7\t8\n", "auto"),
        (b"1 2\n3 4\r5 6\n7 8\n", "auto"),
        (b"1 2 9\n3 4\r5 6\n7 8\n", "adjacency"),
    ],
)
def test_a_line_end_within_an_id_is_refused(content, file_format, write):
    with pytest.raises(InteractionsError, match="line 2: has a line end within an id"):
        read_interactions(write(content), file_format)


def test_what_only_looks_like_a_line_end_is_none(write):
    got = pairs_of(read_interactions(write("1,a\u2028b\n2,c\x0bd\n3,e\x85f\n".encode())))
    assert got == [(1, "a\u2028b"), (2, "c\x0bd"), (3, "e\x85f")]


# --- quotes -----------------------------------------------------------------------------------------------


def lines_with(quoted, n=1000):
    """Lines of three fields, the third of which is given for some line numbers."""
    return "".join(f"{at},{at % 7},{quoted.get(at, 'x')}\n" for at in range(1, n + 1)).encode()


QUOTES_THAT_DO_NOT_MATCH = {
    "opened and never closed": (lines_with({110: '"foo'}), "line 110: .*line 1000"),
    "opened in the last line": (lines_with({1000: '"foo'}), "line 1000: "),
    "opened twice": (lines_with({110: '"foo', 990: '"foo'}), "line 110: .*line 990"),
    "opened far below": (lines_with({100_000: '"foo'}, 100_010), "line 100000: .*line 100010"),
    "closed too early": (lines_with({110: '"foo"bar'}), "line 110: .*line 110"),
    "of an id": (b'1,"2\n3,4\n5,"6\n7,8\n', "line 1: .*line 3"),
    "around the end of a line": (b'1,2\n3,"4\n5,6"\n7,8\n', "line 2: has a line end within an id"),
}


@pytest.mark.parametrize(
    ("content", "where"), QUOTES_THAT_DO_NOT_MATCH.values(), ids=QUOTES_THAT_DO_NOT_MATCH.keys()
)
def test_quotes_that_do_not_match_are_refused_where_they_open(content, where, write):
    limit = csv.field_size_limit()
    with pytest.raises(InteractionsError, match=where):
        read_interactions(write(content))
    assert csv.field_size_limit() == limit


def test_lines_that_quotes_swallow_are_counted(write):
    got = read_interactions(write(lines_with({110: '"foo', 990: 'foo"'})))  # right by the rules of quoting
    assert len(got.pairs) == 120
    assert got.description.endswith("line ends within quotes: 880 (the first in line 110)")
    reviews = b'user,item,text\n1,10,"good\nvery, very good\n\n"\n1,30,"""bad"""\n2,10,"a\r\nb"\n12,7,\n'
    got = read_interactions(write(reviews))
    assert pairs_of(got) == INTEGERS
    assert got.description.endswith("'item'), line ends within quotes: 4 (the first in line 2)")


def test_quotes_within_fields(write):
    content = b'5" disk,"a ""b"" c",x\n"""",d,4" and 5"\n6,"e, f","' + b"y" * 200_000 + b'"\n'
    assert pairs_of(read_interactions(write(content))) == [('"', "d"), ('5" disk', 'a "b" c'), ("6", "e, f")]


def test_a_field_in_quotes_may_go_over_the_blocks_that_are_read(write):
    text = ("z" * 99 + "\n") * 15_000
    content = f'1,10,"{text}"\n1,30,x\n2,10,"{text}"\n12,7,x\n'.encode()
    got = read_interactions(write(content))
    assert pairs_of(got) == INTEGERS
    assert "line ends within quotes: 30,000" in got.description


# --- what is no text, and what is damaged -----------------------------------------------------------------

FAR_BELOW = {
    "a NUL byte": (b"3,4\x005\n", "line 300001: has a NUL byte"),
    "latin-1": (b"3,\xe9\n", "line 300001: is not UTF-8"),
    "latin-1 in a field that nobody needs": (b"3,4,\xe9\n", "line 300001: is not UTF-8"),
    "latin-1 in quotes": (b'3,4,"\xe9\n"', "line 300001: is not UTF-8"),
    "a line without item": (b"3\n5,6\n", "line 300001: expected a user and an item .* got '3'"),
    "surrogates": (b"3,\xed\xa0\x80\n", "line 300001: is not UTF-8"),
}


@pytest.mark.parametrize(("line", "where"), FAR_BELOW.values(), ids=FAR_BELOW.keys())
def test_the_line_is_said_however_far_below_it_is(line, where, write):
    with pytest.raises(InteractionsError, match=where):
        read_interactions(write(b"1,2\n" * 300_000 + line + b"7,8\n"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_recognised(encoding, write):
    mark = "" if encoding == "utf-16" else "\ufeff"
    with pytest.raises(InteractionsError, match="is UTF-16; convert it"):
        read_interactions(write(f"{mark}user,item\n1,2\n".encode(encoding)))


@pytest.mark.parametrize(
    "content", [b'[{"u":"a","i":"b"},\n{"u":"c"}]\n', b"[\n  {\n", b"[[1,2],[3,4]]\n", b"[]\n"]
)
def test_json_that_is_no_json_lines_is_recognised(content, write):
    with pytest.raises(InteractionsError, match="is a JSON array; expected an object on each line"):
        read_interactions(write(content))


def test_damaged_gzip_files(write):
    packed = gzip.compress(
        b"".join(b"%d,%d\n" % (random.Random(at).randrange(9**9), at) for at in range(3000))
    )
    for at in (20, 500, len(packed) // 2, len(packed) - 6):
        damaged = packed[:at] + bytes([packed[at] ^ 255]) + packed[at + 1 :]
        with pytest.raises(InteractionsError, match=r"interactions.txt(: cannot be read: |, line \d+: )"):
            read_interactions(write(damaged))
    assert pairs_of(read_interactions(write(gzip.compress(TEXT[:10]) + gzip.compress(TEXT[10:])))) == INTEGERS


def test_damaged_parquet_files_are_errors_of_ours(tmp_path, write):
    good = parquet(tmp_path / "x")
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(4, len(good) - 4)] = rng.randrange(256)
        try:
            read_interactions(
                write(bytes(damaged[: rng.choice([len(good)] * 3 + [rng.randrange(4, len(good))])]))
            )
        except InteractionsError:
            refused += 1
    assert refused > 50


def test_a_panic_of_polars_is_an_error_of_ours(tmp_path, monkeypatch):
    def panic(*arguments, **more):
        raise pl.exceptions.PanicException("called `Option::unwrap()`")

    parquet(tmp_path / "x")
    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(InteractionsError, match="x: polars cannot read it: called"):
        read_interactions(tmp_path / "x")


# --- sizes ------------------------------------------------------------------------------------------------


def test_a_line_without_end_is_refused(write):
    with pytest.raises(InteractionsError, match="line 3: is longer than 16,777,216 characters, got '5,xxx"):
        read_interactions(write(gzip.compress(b"1,2\n3,4\n5," + b"x" * (20 << 20), 1)))


def test_long_lines_are_read(write):
    items = " ".join(map(str, range(400_000))).encode()
    got = read_interactions(write(b"1 " + items + b"\n2 3\n"))
    assert "adjacency" in got.description
    assert got.pairs.counts().tolist() == [400_000, 1]
    wide = b"1,10," + b"x" * 3_000_000 + b"\n1,30\n2,10\n12,7\n"
    assert pairs_of(read_interactions(write(wide))) == INTEGERS


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
def test_memory_follows_what_is_distinct_not_the_size_of_the_file(tmp_path):
    with gzip.open(tmp_path / "large.gz", "wb", 1) as file:
        block = b"".join(b"%d,%d,%s\n" % (at % 100, at % 70, b"x" * 5000) for at in range(700))
        for _ in range(30):
            file.write(block)  # 105 MB in all
    (tmp_path / "small").write_bytes(block)
    program = (
        "import resource, sys; "
        "from nb_sparse_adam._src.recommender.reading import read_interactions as read; "
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "n, before = len(read('small').pairs), used(); large = read('large.gz'); "
        "print(n, len(large.pairs), large.repeated, used() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    n, distinct, repeated, kilobytes = map(int, done.stdout.split())
    assert n == distinct == 700
    assert repeated == 29 * 700
    assert kilobytes < 50_000


# --- the rest ---------------------------------------------------------------------------------------------

ODD_FILES = {
    "comments of SNAP": (b"# users: 3\n# user item\n1 10\n1 30\n2 10\n12 7\n", INTEGERS),
    "comments of KONECT": (b"% bip unweighted\n% 4 3 3\n1 10 1\n1 30 1\n2 10 1\n12 7 1\n", INTEGERS),
    "comments above tabs": (b"# user\titem\n1\t10\n1\t30\n2\t10\n12\t7\n", INTEGERS),
    "a header that begins like a comment": (
        b"# n,item_id,user_id\n4,10,1\n5,30,1\n6,10,2\n7,7,12\n",
        INTEGERS,
    ),
    "an id that begins like a comment": (b"1 10\n# 3\n", [("#", 3), ("1", 10)]),
    "tags": (b"#a,1\n#b,2\n", [("#a", 1), ("#b", 2)]),
    "rows without anything above": (b",,\n1,10,x\n1,30,x\n,,\n2,10,x\n12,7,x\n", INTEGERS),
    "the largest integers": (
        b"-9223372036854775808,9223372036854775807\n0,1\n",
        [(-(2**63), 2**63 - 1), (0, 1)],
    ),
    "integers that are too large": (
        b"9223372036854775808,1\n10,1\n",
        [("10", 1), ("9223372036854775808", 1)],
    ),
    "digits of another script": ("١,2\n3,4\n".encode(), [("3", 4), ("١", 2)]),
    "odd numbers in other columns": (
        b"userId,movieId,rating,time\n1,2,-inf,99999999999999999999\n2,3,nan,-1\n",
        [(1, 2), (2, 3)],
    ),
    "a header in quotes with a separator": (b'"user, the",item\n1,2\n', [(1, 2)]),
    "the same name twice": (b"user_id,user_id,item_id,item_id\n1,2,3,4\n", [(1, 3)]),
    "a mark and quotes": (b'\xef\xbb\xbf"user_id","item_id"\n1,2\n', [(1, 2)]),
    "a control character": (b"1 2\x01\n3 4\n", [(1, "2\x01"), (3, "4")]),
}


@pytest.mark.parametrize(("content", "expected"), ODD_FILES.values(), ids=ODD_FILES.keys())
def test_odd_files(content, expected, write):
    assert pairs_of(read_interactions(write(content))) == expected


def test_comments_are_counted_and_a_header_may_be_long(write):
    got = read_interactions(write(ODD_FILES["comments of SNAP"][0]))
    assert got.description.endswith(", comments above: 2 lines")
    long = read_interactions(write(b'"user\nid","item ' + b"x" * 2_000_000 + b'"\n1,"2"\n3,4,"x\ny"\n'))
    assert pairs_of(long) == [(1, 2), (3, 4)]
    assert long.description.endswith("xxx...'), line ends within quotes: 1 (the first in line 4)")
    with pytest.raises(InteractionsError, match="has no interactions"):
        read_interactions(write(b"# only\n# comments\n"))


def test_the_files_of_a_split_may_be_of_different_kinds(tmp_path):
    pl.DataFrame({"user": [1, 2], "item": [2**62, 3]}).write_parquet(tmp_path / "train")
    (tmp_path / "test").write_bytes(b"user,item\r1,3\r2,4611686018427387904\r9,9\r")
    split = read_split(tmp_path / "train", tmp_path / "test")
    assert split.user_ids.dtype == split.item_ids.dtype == np.int64
    assert split.user_ids.tolist() == [1, 2, 9]
    assert split.item_ids.tolist() == [3, 9, 2**62]
    assert len(split.train) == len(split.test) == 2
