# SPDX-License-Identifier: Apache-2.0
"""The project's own files, as tests read them."""

import functools
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

__all__ = ["ROOT", "pyproject", "python_files"]

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def pyproject():
    """Return what pyproject.toml holds."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python_files():
    """Return every file of Python in the folders that the source distribution has, sorted."""
    folders = ("nb_sparse_adam", "tests", "benchmarks", "docs", "examples", ".ci")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
