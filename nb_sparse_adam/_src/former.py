# SPDX-License-Identifier: Apache-2.0
"""Where things were before they were private.

Pickles of optimizers, gradients, layers and models, and numba's caches of users' functions, name the modules
of what they hold: old ones are read on. For nothing else are these names.
"""

from __future__ import annotations

import importlib
import sys


def keep_names(package: str, *modules: str) -> None:
    """Let old pickles find modules under the names that they had.

    Parameters
    ----------
    package : str
        That they were in.
    *modules : str
        Their names there.
    """
    private = package.replace("nb_sparse_adam", "nb_sparse_adam._src", 1)
    for name in modules:
        sys.modules[f"{package}.{name}"] = importlib.import_module(f"{private}.{name}")
