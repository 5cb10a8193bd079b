# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/: each block of Python runs by itself and prints what is shown; commands are known."""

import ast
import importlib
import re
import shlex
import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from fences import commands, fenced, run
from needs import need

import nb_sparse_adam
from nb_sparse_adam import __main__

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALWAYS_THERE = {"numba", "numpy", "nb_sparse_adam", *sys.stdlib_module_names}
PEERS = {"fbgemm_gpu", "jax", "optax", "paddle", "tensorflow"}

names_of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))


def imports(text):
    """Full names of the modules that a program imports, and of what it imports from them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(text):
    """Packages that a program needs and that may be missing."""
    found = {name.partition(".")[0] for name in imports(text)}
    if any(name.startswith("nb_sparse_adam.torch") for name in imports(text)):
        found.add("torch")
    return found - ALWAYS_THERE


def examples():
    """Each block of Python, with the output below it."""
    for page in PAGES:
        blocks = list(fenced(page))
        for i, block in enumerate(blocks):
            if block.language != "python":
                continue
            marks = [pytest.mark.jit]
            if {"numba.cuda", "cupy"} & set(imports(block.text)):
                marks.append(pytest.mark.gpu)
            if packages(block.text) & PEERS:
                marks.append(pytest.mark.peers)
            example = [block, *(after for after in blocks[i + 1 : i + 2] if after.language == "text")]
            name = f"{page.relative_to(DOCS)}:{block.line}"
            yield pytest.param(page, example, marks=marks, id=name)


@pytest.mark.parametrize(("page", "example"), list(examples()))
def test_each_example_runs_by_itself(page, example, tmp_path, monkeypatch):
    for package in packages(example[0].text):
        need(package)
    monkeypatch.chdir(tmp_path)
    assert run(example, page) == 1


# --- commands ---------------------------------------------------------------------------------------------

PROGRAMS = {"asv", "bash", "cd", "export", "git", "pytest", "ray", "sphinx-build"}
"""Programs of others: how they are called is not looked at."""


@cache
def extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def check_command(command):
    """Fail if a command that a page shows is none of ours, or is not understood."""
    words = shlex.split(command)
    while "=" in words[0]:  # a variable
        words = words[1:]
    if words[:3] == ["python", "-m", "pip"]:
        words = words[2:]
    if words[:3] == ["python", "-m", "nb_sparse_adam"]:
        words = ["nb-sparse-adam", *words[3:]]
    if words[0] == "nb-sparse-adam":
        __main__._parser().parse_args(words[1:])
    elif words[:2] == ["pip", "install"]:
        for asked in re.findall(r"(?:^|\s)(?:\.|nb[-_]sparse[-_]adam)\[(.*?)\]", " ".join(words)):
            assert set(asked.split(",")) <= extras(), command
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None, command
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), command
    else:
        assert words[0] in PROGRAMS, command


@names_of_pages
def test_commands_are_understood(page):
    for line, command in commands(fenced(page)):
        try:
            check_command(command)
        except SystemExit:
            pytest.fail(f"{page.name}, line {line}: {command} is not understood")


def test_a_command_that_is_none_is_noticed():
    for wrong in (
        "nb-sparse-adam trian",
        "nb-sparse-adam train --dimension 3",
        'pip install ".[no_such_extra]"',
        "python -m no_such_module",
        "python examples/no_such_file.py",
        "no-such-program",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(wrong)


# --- the rest ---------------------------------------------------------------------------------------------


@names_of_pages
def test_links_within_the_repository_lead_somewhere(page):
    for label, target in re.findall(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"[{label}]({target})"


def test_the_tree_of_errors_is_that_of_the_docstring():
    tree = nb_sparse_adam.errors.__doc__.split("::\n")[1].partition("\nA class inherits")[0]
    shown = textwrap.dedent(tree).replace("``", "`").strip()
    assert shown in (DOCS / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["nb_sparse_adam", "checkpoint", "errors", "parameter_server", "recommender", "torch", "typing"],
)
def test_the_reference_has_the_public_names_and_no_other(name):
    """By name, or because all of a module is shown."""
    if name == "torch":
        need("torch")
    module = nb_sparse_adam
    if name != "nb_sparse_adam":
        module = importlib.import_module(f"nb_sparse_adam.{name}")
    public = {each for each in module.__all__ if not each.startswith("__")}
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.rst"))
    shown = set()
    for part in re.split(r"^\.\. currentmodule:: ", text, flags=re.MULTILINE)[1:]:
        if part.splitlines()[0] == module.__name__:
            shown.update(re.findall(r"^\.\. (?:auto(?!module)\w+|py:data):: (\w+)$", part, re.MULTILINE))
    assert shown <= public
    whole = re.search(rf"^\.\. automodule:: {module.__name__}\n((?:   :.*\n)*)", text, re.MULTILINE)
    if whole is None:
        assert shown == public
    else:
        assert ":members:" in whole[1]
        left_out = re.search(r":exclude-members: (.*)", whole[1])
        assert (set(left_out[1].split(", ")) if left_out else set()) == shown
