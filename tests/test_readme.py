# SPDX-License-Identifier: Apache-2.0
"""The examples that readers copy, in the README and docstrings: run, and their output compared."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
from fences import fenced, run
from needs import need

import nb_sparse_adam
from nb_sparse_adam._src import tables

README = Path(__file__).resolve().parents[1] / "README.md"

EXAMPLES = [block for block in fenced(README) if block.language in ("python", "text")]


@pytest.mark.jit
def test_the_examples_print_what_the_readme_says():
    need("torch")
    assert run(EXAMPLES, README) == 2


def test_the_first_screen_has_what_someone_looks_for():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:60])
    for sought in (
        "measured/speed.png",
        "For whoever",
        "import SparseAdam  # was:",
        "RowGradient(",
        "pip install .",
    ):
        assert sought in first
    assert len([row for row in EXAMPLES[1].text.splitlines() if row.strip()]) <= 13


def test_the_two_commands_are_there():
    commands = "".join(block.text for block in fenced(README) if block.language == "sh").splitlines()
    assert 'pip install ".[train]" && nb-sparse-adam train' in commands
    assert 'pip install ".[test]" && pytest' in commands


def test_links_within_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


@pytest.mark.jit
def test_docstring_examples_with_pytorch():
    torch = need("torch")
    from nb_sparse_adam._src.torch import fused
    from nb_sparse_adam.torch import EmbeddingBag, SparseAdam, accumulate

    names = {"torch": torch, "SparseAdam": SparseAdam, "EmbeddingBag": EmbeddingBag, "accumulate": accumulate}
    for module in (nb_sparse_adam.torch, fused):
        result = doctest.testmod(module, extraglobs=names)
        assert result.attempted > 0
        assert result.failed == 0


@pytest.mark.jit
@pytest.mark.parametrize("module", [nb_sparse_adam, tables], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    names = {name: getattr(nb_sparse_adam, name) for name in nb_sparse_adam.__all__}
    result = doctest.testmod(module, extraglobs={"np": np, **names}, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
