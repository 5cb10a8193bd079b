# SPDX-License-Identifier: Apache-2.0
"""What messages call the types of what users pass: told by names alone, nothing is imported for it."""

from __future__ import annotations

import sys
from types import GeneratorType

# Classes that their users never see under the name that they have.
_KNOWN_AS = {
    ("jaxlib", "ArrayImpl"): "jax.Array",
    ("jax", "ArrayImpl"): "jax.Array",
    ("tensorflow", "EagerTensor"): "tensorflow.Tensor",
    ("tensorflow", "ResourceVariable"): "tensorflow.Variable",
}


def type_name(value: object) -> str:
    """Name the type of something as those who use it do: ``list``, ``torch.nn.Parameter``, ``jax.Array``.

    A class is named with the first package on the way to its module that shows it.
    """
    kind = type(value)
    module, name = str(kind.__module__), kind.__qualname__
    package = _root(module)
    if package in ("builtins", "nb_sparse_adam"):
        return name
    if (package, name) in _KNOWN_AS:
        return _KNOWN_AS[package, name]
    parts = module.split(".")
    homes = [".".join(parts[: n + 1]) for n in range(len(parts))]
    shown = (home for home in homes if getattr(sys.modules.get(home), "__dict__", {}).get(name) is kind)
    return f"{next(shown, module)}.{name}"


def is_of(package: str, value: object) -> bool:
    """Whether something, or a class that it is derived from, is of a package, or a generator of its code."""
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        return frame is not None and _root(frame.f_globals.get("__name__")) == package
    return any(_root(kind.__module__) == package for kind in type(value).__mro__)


def _root(module: object) -> str:
    return str(module).partition(".")[0]
