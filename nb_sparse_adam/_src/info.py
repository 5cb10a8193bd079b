# SPDX-License-Identifier: Apache-2.0
"""What the library runs on here: versions, cores, threading layer, cache, and which extras work."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import llvmlite
import numba
import numpy as np

from nb_sparse_adam._src.engine import cpu_limits, threads
from nb_sparse_adam._src.engine.kernel_cache import folder_of
from nb_sparse_adam._src.engine.rearranging import take_rows
from nb_sparse_adam._src.extras import EXTRAS, install_command, require
from nb_sparse_adam.errors import MissingExtraError


def versions() -> dict[str, str]:
    """Return the versions of Python, of this library and of what it computes with, by name."""
    try:
        own = importlib.metadata.version("nb_sparse_adam")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed, run from its source"
    return {
        "nb_sparse_adam": own,
        "python": platform.python_version(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
    }


def threading_layer() -> str:
    """Return the layer that numba's threads run on here: ``"omp"``, ``"tbb"`` or ``"workqueue"``.

    Numba chooses it when its threads are started, so they are.
    """
    if numba.config.DISABLE_JIT:
        return "none: NUMBA_DISABLE_JIT is set"
    try:
        return threads.threading_layer()
    except ValueError as error:  # NUMBA_THREADING_LAYER asks for one that cannot be loaded
        return f"none: {error}".partition("\n")[0]


def layers() -> dict[str, str | None]:
    """Return numba's threading layers, each with the reason why it cannot be loaded, None if it can."""
    reasons: dict[str, str | None] = {}
    for name, module in {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}.items():
        try:
            importlib.import_module(f"numba.np.ufunc.{module}")
            reasons[name] = None
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def gpus() -> str:
    """Say which GPUs numba-cuda finds, or why it finds none."""
    reasons = unusable("cuda")
    if reasons:
        return f"none that is looked for: {install_command('cuda')}"
    if numba.config.ENABLE_CUDASIM:
        return "simulated: NUMBA_ENABLE_CUDASIM is set"
    from numba import cuda

    if not cuda.is_available():
        return "none: " + (" ".join(str(cuda.cuda_error() or "").split()) or "no GPU that may be used")
    names = [device.name for device in cuda.list_devices()]
    return ", ".join(name.decode() if isinstance(name, bytes) else name for name in names)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> str | None:
    """Return where kernels are kept; None if no folder can be written to."""
    return folder_of(take_rows)


def unusable(extra: str) -> list[str]:
    """Import every package of an extra; return one reason for each that does not work.

    Parameters
    ----------
    extra : str
        A key of `extras.EXTRAS`.
    """
    reasons = []
    for package in EXTRAS[extra]:
        try:
            require(package.replace("-", "_"), extra, extra)
        except MissingExtraError as error:
            reasons.append(f"{package}: {error.__cause__}")
        except Exception as error:  # noqa: BLE001  whatever a broken package does when it is imported
            reasons.append(f"{package}: {type(error).__name__}: {error}")
    return reasons


def report_lines() -> Iterator[str]:
    """Yield the lines of ``nb-sparse-adam info``."""
    for name, version in versions().items():
        yield f"{name:16} {version}"
    yield f"{'platform':16} {platform.platform()}"
    quota = cpu_limits.cpu_quota()
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    yield f"{'cores':16} {os.cpu_count()}, of which this process may use {usable_cores()}; {limit}"
    yield f"{'numba threads':16} {numba.get_num_threads()} of at most {numba.config.NUMBA_NUM_THREADS}"
    yield f"{'step threads':16} {threads.usable_threads(None)} at most, with num_threads=None"
    yield f"{'threading layer':16} {threading_layer()}"
    found = layers()
    yield f"{'layers':16} {', '.join(name for name, reason in found.items() if reason is None)}"
    for name, reason in found.items():
        if reason is not None:
            # pip puts TBB's library where the system's loader does not look.
            remedy = f" (pip install tbb, and set LD_LIBRARY_PATH={os.path.join(sys.prefix, 'lib')})"
            yield f"{'':16} {name} cannot be loaded: {reason}{remedy if name == 'tbb' else ''}"
    yield f"{'GPUs':16} {gpus()}"
    nowhere = "none: kernels are compiled in every process (set NUMBA_CACHE_DIR)"
    yield f"{'kernel cache':16} {cache_folder() or nowhere}"
    for extra in EXTRAS:
        reasons = unusable(extra)
        yield f"{'extra ' + extra:16} {'usable' if not reasons else 'NOT usable: ' + install_command(extra)}"
        for reason in reasons:
            yield f"{'':16} {reason}"
