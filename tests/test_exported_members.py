"""The public names, pinned: adding or losing one is a decision, and shows up here."""

import builtins
import inspect
import re

import nb_sparse_adam
from nb_sparse_adam import errors

PUBLIC = [
    "BagGradient",
    "CSRGradient",
    "RowGradient",
    "SparseAdam",
    "__version__",
    "apply_row_gradient",
    "errors",
    "warm_up",
]


def test_public_names():
    assert sorted(nb_sparse_adam.__all__) == PUBLIC
    assert all(hasattr(nb_sparse_adam, name) for name in PUBLIC)


def test_public_classes_know_their_home_and_are_documented():
    for name in ("BagGradient", "CSRGradient", "RowGradient", "SparseAdam"):
        public = getattr(nb_sparse_adam, name)
        assert public.__module__.startswith("nb_sparse_adam.")
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
        match = re.match(r"    ([│├└─ ]*)(SparseAdam\w+|\w+Error) +((?:[A-Z]\w+ )*)", line)
        if not match:
            continue
        indent, name, also = match.groups()
        path = [*path[: len(indent) // 4], getattr(errors, name)]
        drawn.add(name)
        mro = inspect.getmro(path[-1])
        assert all(parent in mro for parent in path), name
        assert all(getattr(builtins, other) in mro for other in also.split()), name
    assert drawn == set(errors.__all__)
