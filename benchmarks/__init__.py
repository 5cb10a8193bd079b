# SPDX-License-Identifier: Apache-2.0
"""The asv suite, made of the parts of `nb_sparse_adam._src.bench`. See README.md beside this file.

asv takes these files from the working tree, and the package from the environment, built at the commit that it
measures. What is imported of `nb_sparse_adam._src.bench` here comes from the working tree, too: so that all
commits are measured by the same code. What that imports of the package is the commit's.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["need_memory"]

if "asv_runner" in sys.modules:  # not in the process of tests, whose children would have one core each
    # Threads that have rested are sometimes woken up on one core together, step after step.
    os.environ.setdefault("OMP_PROC_BIND", "true")

NOW, BEFORE = "nb_sparse_adam._src", "nb_sparse_adam"
BENCH = f"{NOW}.bench"


class _Older(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds private modules where older commits have them: beside the public ones."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if (name != NOW and not name.startswith(NOW + ".")) or name.startswith(BENCH):
            return None
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec: Any) -> ModuleType:
        return importlib.import_module(spec.name.replace(NOW, BEFORE, 1))

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it has been imported."""


def _take_bench_from_here() -> None:
    if importlib.util.find_spec(NOW) is None:
        sys.meta_path.insert(0, _Older())
    path = Path(__file__).resolve().parents[1].joinpath(*BENCH.split("."), "__init__.py")
    spec = importlib.util.spec_from_file_location(BENCH, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[BENCH] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if BENCH not in sys.modules and importlib.util.find_spec(BEFORE) is not None:
    _take_bench_from_here()


def need_memory(gigabytes: float) -> None:
    """Raise what asv shows as n/a, with the reason, where less memory is free."""
    from nb_sparse_adam._src.bench.machine import memory

    free = memory("MemAvailable")
    if free is not None and free < gigabytes:
        raise NotImplementedError(f"needs {gigabytes:g} GB of free memory, there are {free:g}")
