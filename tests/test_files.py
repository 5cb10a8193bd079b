# SPDX-License-Identifier: Apache-2.0
"""What is written into folders of the user's: whole files, and nothing of theirs touched."""

import os
import stat

import pytest

from nb_sparse_adam._src import files
from nb_sparse_adam._src.recommender import report


def content_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("prepare", [files.prepare_folder, report.prepare_output])
def test_a_folder_is_tried_without_touching_what_is_in_it(prepare, tmp_path):
    for name in (".writable", f".writable.{os.getpid()}", f"..writable.{os.getpid()}"):
        (tmp_path / name).write_bytes(b"mine")
    before = content_of(tmp_path)
    assert prepare(tmp_path) == tmp_path
    assert content_of(tmp_path) == before
    assert content_of(prepare(tmp_path / "new" / "folder")) == {}


def test_a_file_is_written_beside_what_looks_like_a_temporary_one(tmp_path):
    name = f".metrics.json.{os.getpid()}"  # processes in containers have the same few ids
    (tmp_path / name).write_bytes(b"mine")
    files.write_whole(tmp_path / "metrics.json", b"1")
    files.write_whole(tmp_path / "metrics.json", b"2")
    assert content_of(tmp_path) == {name: b"mine", "metrics.json": b"2"}


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX systems")
def test_a_file_has_the_permissions_of_any_new_one(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_cannot_be_put_in_its_place_leaves_nothing(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OSError, match=r"metrics\.json"):
        files.write_whole(tmp_path / "metrics.json", b"1")
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    for path in (tmp_path / "mine", tmp_path / "mine" / "below"):
        with pytest.raises(OSError, match="mine"):
            files.prepare_folder(path)
    assert content_of(tmp_path) == {"mine": b"mine"}
