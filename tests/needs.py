# SPDX-License-Identifier: Apache-2.0
"""Packages that only some tests need: the module, or a skip that names the command that brings it."""

import pytest

from nb_sparse_adam._src.bench.peers import PEERS
from nb_sparse_adam._src.extras import EXTRAS
from nb_sparse_adam._src.recommender.index import KINDS

__all__ = ["COMMANDS", "missing", "need"]

COMMANDS = {
    # From a clone. `test` has what the other extras have, but for torch and a GPU's.
    **dict.fromkeys(EXTRAS["test"], 'pip install ".[test]"'),
    **dict.fromkeys(["numba_cuda", "cuda"], 'pip install ".[cuda]"'),
    **{peer.module: peer.install for peer in PEERS.values()},
    **{kind.module.partition(".")[0]: kind.install for kind in KINDS.values()},
    "jax": "pip install jax",
    "selenium": "pip install selenium",
    "sphinx": 'pip install ".[docs]"',
    "tensorflow": "pip install tensorflow-cpu",
}
"""Module -> the command that installs it, and what is in it."""


def missing(module):
    """Return what a skipped test says of a module that is not there."""
    package = module if module in COMMANDS else module.partition(".")[0]
    return f"needs {package}: {COMMANDS[package]}"


def need(module):
    """Import a module, or skip the test that calls, or the file of tests.

    Tests that run only where ``-m`` names them call it themselves, or their fixtures do: a file that is
    skipped while it is collected is skipped in the main lane of CI, too, where nothing may be.
    """
    return pytest.importorskip(module, reason=missing(module))
