"""The examples that readers copy, in the README, docs/ and docstrings: run, and their output compared."""

import contextlib
import doctest
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

import nb_sparse_adam
from nb_sparse_adam import gradients, optimizer
from nb_sparse_adam.bench import chart

README = Path(__file__).resolve().parents[1] / "README.md"


DOCS = README.parent / "docs"

APART = ("With PyTorch", "On a GPU")  # sections that need something more


def fenced(path):
    """(line, language, text, section) of every fenced block of a page."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        sections = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2], sections[-1] if sections else None


def blocks(of=None):
    """(line, language, text) of the blocks of a section of the README that stands apart, or of all others."""
    for *block, section in fenced(README):
        if of == (section if section in APART else None):
            yield tuple(block)


def run(blocks, path=README):
    """Run blocks in order in one namespace, and count them. A "text" block is what the one before prints."""
    namespace = {"__name__": "__main__"}
    output, ran = "", 0
    for line, language, text in blocks:
        if language == "python":
            assert output == "", f"{path.name}, before line {line}: output that it does not show"
            stdout = io.StringIO()
            with contextlib.redirect_stdout(stdout):
                # Newlines in front, so that a traceback shows the page's line.
                exec(compile("\n" * line + text, str(path), "exec"), namespace)
            output, ran = stdout.getvalue(), ran + 1
        elif language == "text":
            assert output == text, f"{path.name}, line {line}"
            output = ""
    assert output == ""
    return ran


@pytest.mark.jit
def test_the_examples_print_what_the_readme_says():
    assert run(blocks()) >= 5


@pytest.mark.jit
def test_so_do_those_with_pytorch():
    pytest.importorskip("torch")
    assert run(blocks("With PyTorch")) >= 1


@pytest.mark.jit
def test_each_recipe_runs_by_itself():
    page = DOCS / "recipes" / "rearranging-rows.md"
    recipes = []
    for *block, _ in fenced(page):
        if block[1] == "python":
            recipes.append([])
        recipes[-1].append(tuple(block))
    assert len(recipes) >= 7
    for recipe in recipes:
        assert run(recipe, page) == 1


@pytest.mark.gpu
@pytest.mark.jit
def test_so_do_those_on_a_gpu():
    pytest.importorskip("numba_cuda")
    assert run(blocks("On a GPU")) >= 1


def test_the_first_example_is_on_the_first_screen_and_short():
    line, _, text = next(block for block in blocks() if block[1] == "python")
    assert line < 20
    assert len([row for row in text.splitlines() if row.strip()]) <= 13


def test_the_two_commands_are_there():
    commands = "".join(text for _, language, text in blocks() if language == "sh").splitlines()
    assert 'pip install ".[train]" && nb-sparse-adam train' in commands
    assert 'pip install ".[test]" && pytest' in commands


def test_the_figures_are_those_of_the_committed_result():
    path = README.parent / "benchmarks" / "measured" / "epyc-2core.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert not result["quick"]
    others, in_torch, _ = chart.markdown(result).split("\n\n")
    text = README.read_text(encoding="utf-8")
    assert others in text
    assert in_torch in text


def test_links_within_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


@pytest.mark.jit
def test_docstring_examples_with_pytorch():
    torch = pytest.importorskip("torch")
    from nb_sparse_adam.torch import EmbeddingBag, SparseAdam, accumulate, layers, optimizer

    names = {"torch": torch, "SparseAdam": SparseAdam, "EmbeddingBag": EmbeddingBag, "accumulate": accumulate}
    for module in (optimizer, layers):
        result = doctest.testmod(module, extraglobs=names)
        assert result.attempted > 0
        assert result.failed == 0


@pytest.mark.jit
@pytest.mark.parametrize("module", [gradients, optimizer], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    names = {name: getattr(nb_sparse_adam, name) for name in nb_sparse_adam.__all__}
    result = doctest.testmod(module, extraglobs={"np": np, **names}, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
