"""The asv suite, made of the parts of `nb_sparse_adam.bench`. See README.md beside this file.

asv takes these files from the working tree, and the package from the environment, built at the commit that it
measures. What is imported of `nb_sparse_adam.bench` here comes from the working tree, too: so that all
commits are measured by the same code.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["need_memory"]

# Threads that have rested are sometimes woken up on one core together, step after step.
os.environ.setdefault("OMP_PROC_BIND", "true")


def _take_bench_from_here() -> None:
    name = "nb_sparse_adam.bench"
    path = Path(__file__).resolve().parents[1].joinpath(*name.split("."), "__init__.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if "nb_sparse_adam.bench" not in sys.modules:
    _take_bench_from_here()


def need_memory(gigabytes: float) -> None:
    """Raise what asv shows as n/a, with the reason, where less memory is free."""
    from nb_sparse_adam.bench.machine import memory

    free = memory("MemAvailable")
    if free is not None and free < gigabytes:
        raise NotImplementedError(f"needs {gigabytes:g} GB of free memory, there are {free:g}")
