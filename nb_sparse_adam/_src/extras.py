# SPDX-License-Identifier: Apache-2.0
"""The optional packages: which extra brings which, and the error for one that is missing.

Nothing here is imported before it is needed, so that ``import nb_sparse_adam`` needs numba and NumPy only.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from nb_sparse_adam.errors import MissingExtraError

_TRAIN = ("matplotlib", "polars", "safetensors", "tqdm", "zstandard")

EXTRAS: dict[str, tuple[str, ...]] = {
    "scipy": ("scipy",),
    "train": _TRAIN,
    "torch": ("torch",),
    "ray": ("ray", "tomli"),
    "cuda": ("numba-cuda", "numpy"),
    "cuda12": ("numba-cuda", "numpy"),
    "test": (
        *_TRAIN,
        "basedpyright",
        "expecttest",
        "greenlet",
        "hypothesis",
        "mpmath",
        "mypy",
        "pytest",
        "ray",
        "ruamel.yaml",
        "scipy",
        "tomli",
    ),
    "bench": (*_TRAIN, "asv", "virtualenv"),
}
"""Extra -> the packages it brings. Each is imported by the name that it is installed by, but for hyphens."""


def install_command(extra: str) -> str:
    """Return the command that installs `extra`, a key of `EXTRAS`."""
    return f'pip install "nb_sparse_adam[{extra}]"'


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say what it is needed for and how to get it.

    Parameters
    ----------
    module : str
        What to import, for example ``"safetensors.numpy"``.
    extra : str
        The key of `EXTRAS` that brings it.
    purpose : str
        What needs it, as the subject of a sentence: ``"reading interactions"``.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    MissingExtraError
        If it cannot be imported. The message has the reason and the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which cannot be imported ({error}): {install_command(extra)}"
        ) from error
