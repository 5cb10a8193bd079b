# SPDX-License-Identifier: Apache-2.0
"""The project's own files: what they say of each other, and the tools of CI that tests can hold."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from needs import need
from project import ROOT, pyproject, python_files

import nb_sparse_adam

PROJECT = pyproject()["project"]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


# --- what files say -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def citation():
    return need("ruamel.yaml").YAML(typ="safe", pure=True).load(text("CITATION.cff"))


def test_the_citation_has_what_the_format_asks_for(citation):
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert {"message", "title", "authors", "version", "abstract"} <= citation.keys()


def test_the_citation_says_what_the_package_says(citation):
    assert citation["version"] == nb_sparse_adam.__version__
    assert citation["title"] == nb_sparse_adam.__name__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["keywords"] == PROJECT["keywords"]


def test_a_version_that_is_not_released_has_no_date_of_release(citation):
    version = re.escape(nb_sparse_adam.__version__)
    (heading,) = re.findall(rf"^## {version} \((.*)\)$", text("CHANGELOG.md"), re.M)
    assert citation.get("date-released") == (None if heading == "not released yet" else heading)


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text(page))
    assert [target for target in targets if not (ROOT / target).exists()] == []


def record():
    """The rows of CONTRIBUTING.md's record, each a dict."""
    lines = text("CONTRIBUTING.md").partition("### What tests were run with")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names, _, *rows = cells
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_tests_were_run_on_every_python_that_is_named():
    named = [re.fullmatch(r".*:: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    recorded = {re.match(r"3\.\d+", row["Python"])[0] for row in record() if row["failed"] == "0"}
    assert {match[1] for match in named if match} == recorded


def pins():
    return dict(re.findall(r"^([\w.-]+)==([\d.]+)", text(".ci/minimum.txt"), re.M))


def test_the_oldest_set_is_the_minimum_of_every_requirement():
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    for line in [
        *PROJECT["dependencies"],
        *extras["ray"],
        *extras["scipy"],
        *extras["train"],
        *extras["test"],
    ]:
        name, _, minimum = line.partition(">=")
        if minimum:
            assert re.fullmatch(rf"{re.escape(minimum)}(\.0)*", pinned.pop(name)), line
    assert set(pinned) == {"pyparsing"}  # of matplotlib's


def test_tests_were_run_on_the_oldest_set():
    pinned = pins()
    oldest = [row for row in record() if row["Python"].startswith("3.10")]
    assert any(all(row[name] == pinned[name] for name in ("numba", "numpy", "scipy")) for row in oldest)


# --- the distributions --------------------------------------------------------------------------------------


def test_the_source_distribution_has_what_a_reader_looks_for():
    patterns = pyproject()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    included = {pattern.lstrip("/") for pattern in patterns}
    assert [name for name in included if not (ROOT / name).exists()] == []
    pages = {path.name for path in ROOT.glob("*.md")} | {"CITATION.cff", "LICENSE"}
    assert pages | {"docs", "tests", "examples", "benchmarks", ".ci"} <= included


PACKAGE = {"nb_sparse_adam/__init__.py", "nb_sparse_adam/py.typed"}
TRACKED = {*PACKAGE, "tests/test_a.py", "README.md"}
METADATA = {"METADATA", "entry_points.txt", "licenses/LICENSE"}


def wheel(folder, files):
    path = folder / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.writestr(name, "")
    return path


def sdist(folder, files):
    path = folder / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in files:
            archive.addfile(tarfile.TarInfo(f"a-1/{name}"), io.BytesIO())
    return path


def test_what_distributions_lack_and_should_not_have_is_found(tmp_path, tools):
    import contents

    metadata = {f"a-1.dist-info/{name}" for name in METADATA}
    right = sdist(tmp_path, {*TRACKED, "PKG-INFO"})
    assert contents.faults(wheel(tmp_path, PACKAGE | metadata), right, TRACKED) == []
    wrong = wheel(tmp_path, {"nb_sparse_adam/__init__.py", "tests/test_a.py", "a-1.dist-info/METADATA"})
    assert contents.faults(wrong, sdist(tmp_path, {"README.md", "notes.txt"}), TRACKED) == [
        "the wheel lacks nb_sparse_adam/py.typed",
        "the wheel has tests/test_a.py",
        "the source distribution lacks nb_sparse_adam/__init__.py",
        "the source distribution lacks nb_sparse_adam/py.typed",
        "the source distribution lacks tests/test_a.py",
        "the source distribution has notes.txt",
        "the wheel's metadata lacks entry_points.txt",
        "the wheel's metadata lacks licenses/LICENSE",
    ]


# --- lanes --------------------------------------------------------------------------------------------------

MARKED = """
import pytest

def test_plain(): pass

@pytest.mark.browser
def test_browser(): pass

@pytest.mark.peers
def test_peers(): pass
"""


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", ["plain"]),
        ("not gpu", ["plain"]),
        ("peers", ["peers"]),
        ("browser or peers", ["browser", "peers"]),
    ],
)
def test_what_most_machines_lack_is_left_out_unless_it_is_named(tmp_path, expression, expected):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_marked.py").write_text(MARKED, encoding="utf-8")
    markers = "\n  ".join(pyproject()["tool"]["pytest"]["ini_options"]["markers"])
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n  {markers}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--strict-markers", "-m", expression]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    out = subprocess.run(command, cwd=tmp_path, env=env, check=True, text=True, stdout=subprocess.PIPE).stdout
    assert re.findall(r"::test_(\w+)", out) == expected
    assert f"{len(expected)}/3 tests collected ({3 - len(expected)} deselected)" in out


def test_a_skip_names_the_command_that_installs_what_is_missing(monkeypatch):
    for module in ("torch", "scipy", "numba_cuda", "fbgemm_gpu", "jax"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(pytest.skip.Exception, match=rf"^needs {module}: pip install \S+"):
            need(module)


def test_packages_are_asked_for_in_one_way():
    """`need`, whose skips name a command; `test_package.py` has pytest's own as a text."""
    for path in (ROOT / "tests").glob("*.py"):
        if path.name not in ("needs.py", "test_package.py", Path(__file__).name):
            assert "importorskip" not in path.read_text(encoding="utf-8"), path


def test_a_lane_that_there_is_not_is_refused():
    out = subprocess.run(["bash", ROOT / ".ci/extra", "3.9"], text=True, stderr=subprocess.PIPE)
    assert out.returncode == 2
    assert "no lane 3.9, expected some of citation browser peers hosts oldest" in out.stderr


def test_a_row_of_the_record_adds_up_what_runs_say(tools):
    import record as recording

    logs = [
        "...\n== 3 failed, 10 passed, 2 skipped, 7 deselected in 4.2s ==\n",
        "== 1 passed, 1 error in 1s ==\n",
    ]
    row = recording.row("all", logs)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(record()[0])
    assert cells[3] == recording.version("numba")
    assert cells[-4:] == ["all", "11", "4", "2"]
    with pytest.raises(ValueError, match="did not come to its closing line, the last one is 'Killed'"):
        recording.counts(["3 passed in 1s", "collected\nKilled\n"])


def test_every_file_of_python_names_its_licence():
    line = f"# SPDX-License-Identifier: {PROJECT['license']}"
    files = python_files()
    assert len(files) > 200
    for path in files:
        assert path.read_text(encoding="utf-8").partition("\n")[0] == line, path


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_nothing_of_the_library_can_open_a_connection():
    networks = {
        "socket",
        "ssl",
        "http",
        "urllib",
        "ftplib",
        "smtplib",
        "xmlrpc",
        "requests",
        "httpx",
        "aiohttp",
    }
    files = list((ROOT / "nb_sparse_adam").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        assert not networks & {name.partition(".")[0] for name in imported_by(path)}, path
