# SPDX-License-Identifier: Apache-2.0
"""The public names, pinned: adding or losing one is a decision, and shows up here."""

import builtins
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from needs import need

import nb_sparse_adam
from nb_sparse_adam import BagGradient, CSRGradient, EmbeddingTable, Eviction, RowGradient, SparseAdam, errors

PUBLIC = [
    "BagGradient",
    "CSRGradient",
    "EmbeddingTable",
    "Eviction",
    "RowGradient",
    "SparseAdam",
    "__version__",
    "apply_row_gradient",
    "checkpoint",
    "errors",
    "parameter_server",
    "recommender",
    "torch",
    "typing",
    "warm_up",
]
MODULES = ["checkpoint", "errors", "parameter_server", "recommender", "torch", "typing"]
NOT_IN_ALL = ["checkpoint", "parameter_server", "recommender", "torch", "typing"]


def test_public_names():
    assert dir(nb_sparse_adam) == PUBLIC
    assert sorted({*nb_sparse_adam.__all__, *NOT_IN_ALL}) == PUBLIC
    assert all(hasattr(nb_sparse_adam, name) for name in nb_sparse_adam.__all__)
    assert not hasattr(nb_sparse_adam, "optimizers")


def test_an_import_of_everything_takes_no_name_of_another_package():
    assert not {"torch", "typing"} & set(nb_sparse_adam.__all__)


def in_python(program):
    out = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_public_modules_are_there_when_they_are_asked_for():
    program = (
        "import sys, nb_sparse_adam\n"
        "def loaded(): return [name for name in NAMES if f'nb_sparse_adam.{name}' in sys.modules]\n"
        "print(loaded())\n"
        "nb_sparse_adam.checkpoint.save, nb_sparse_adam.recommender.train, nb_sparse_adam.typing.Gradient\n"
        "print(loaded(), dir(nb_sparse_adam))\n"
    )
    program = program.replace("NAMES", repr(["checkpoint", "recommender"]))
    assert in_python(program).splitlines() == ["[]", f"['checkpoint', 'recommender'] {PUBLIC}"]


def test_the_module_for_pytorch_says_what_it_needs():
    """However it is asked for; what goes over all names, as inspect does, goes on."""
    program = (
        "import inspect, sys\n"
        "sys.modules['torch'] = None\n"  # as if there were none
        "import nb_sparse_adam\n"
        "assert not hasattr(nb_sparse_adam, 'torch')\n"
        "print(len(inspect.getmembers(nb_sparse_adam)))\n"
        "asks = 'nb_sparse_adam.torch', 'import nb_sparse_adam.torch', 'from nb_sparse_adam import torch'\n"
        "for ask in asks:\n"
        "    try:\n"
        "        exec(ask)\n"
        "    except (AttributeError, nb_sparse_adam.errors.MissingExtraError) as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    members, *said = in_python(program).splitlines()
    assert int(members) == len(PUBLIC) - 1
    assert [line.partition(" ")[0] for line in said] == ["AttributeError", *["MissingExtraError"] * 2]
    assert all("nb_sparse_adam.torch needs torch" in line for line in said)
    assert all('pip install "nb_sparse_adam[torch]"' in line for line in said)


def test_modules_are_public_or_private_by_name():
    package = Path(nb_sparse_adam.__file__).parent
    paths = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    found = {path.stem for path in paths}
    assert sorted(name for name in found if not name.startswith("_")) == MODULES


@pytest.mark.parametrize(
    "old",
    ["optimizer\n_rebuild", "views\n_kept", "kernels\nLentTable", "recommender.training\nBPRModel",
     "recommender.interactions\nInteractions", "recommender.ranking\nQuality"],
)  # fmt: skip
def test_pickles_of_when_modules_were_public_find_what_they_name(old):
    if old.startswith("recommender"):
        need("polars")
    found = in_python(
        f"import pickle; print(pickle.loads({f'cnb_sparse_adam.{old}{chr(10)}.'.encode()!r}).__name__)"
    )
    assert found.strip() == old.partition("\n")[2]


@pytest.mark.parametrize("module", MODULES)
def test_public_modules_show_what_they_list(module):
    if module == "torch":
        need("torch")
    module = importlib.import_module(f"nb_sparse_adam.{module}")
    assert module.__doc__
    for name in module.__all__:
        shown = getattr(module, name)
        if inspect.isclass(shown) or inspect.isfunction(shown):
            assert inspect.getdoc(shown), name


def test_public_classes_know_their_home_and_are_documented():
    for public in (BagGradient, CSRGradient, EmbeddingTable, Eviction, RowGradient, SparseAdam):
        assert public.__module__ == "nb_sparse_adam"
        assert getattr(nb_sparse_adam, public.__name__) is public
        assert inspect.getdoc(public)
        assert pickle.loads(pickle.dumps(public)) is public
    for name in ("LentTable", "RowState", "StateView", "WarmUp"):
        assert getattr(nb_sparse_adam.typing, name).__module__ == "nb_sparse_adam.typing"
    for made in (BagGradient, CSRGradient, RowGradient):
        assert typing.get_type_hints(made)
    for name in nb_sparse_adam.checkpoint.__all__:
        assert getattr(nb_sparse_adam.checkpoint, name).__module__ == "nb_sparse_adam.checkpoint"


def test_public_classes_for_pytorch_know_their_home():
    need("torch")
    for name in nb_sparse_adam.torch.__all__:
        public = getattr(nb_sparse_adam.torch, name)
        assert public.__module__ == "nb_sparse_adam.torch"
        assert inspect.getdoc(public)


def test_every_error_is_exported():
    defined = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert sorted(defined) == sorted(errors.__all__)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    """Each line of it: indentation, class, the built-in classes it also is, what it means."""
    path = []
    drawn = set()
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(SparseAdam\w+|\w+Error|\w+Timeout) +((?:[A-Z]\w+ )*)", line)
        if not match:
            continue
        indent, name, also = match.groups()
        path = [*path[: len(indent) // 4], getattr(errors, name)]
        drawn.add(name)
        mro = inspect.getmro(path[-1])
        assert all(parent in mro for parent in path), name
        assert all(getattr(builtins, other) in mro for other in also.split()), name
    assert drawn == set(errors.__all__)
