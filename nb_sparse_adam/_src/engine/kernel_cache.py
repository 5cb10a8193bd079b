# SPDX-License-Identifier: Apache-2.0
"""The disk cache of kernels: code that is found there is what the sources say, or it is not used.

numba's own cache sees edits of the file that a function is in, and no flags. Kernels are made of several
files, inlined into one another, and a field that has moved is memory corruption. So

* a kernel's file on disk is named after a digest of the files that all kernels are made of (`SOURCES`) and of
  its own, and after everything else that changes code: types, processor, options, what its closure holds,
  numba's flags, versions of what compiles. There is no index: processes that write at the same time cannot
  mix up entries, and runs with other flags find files of their own;
* it begins with a checksum of all that: what is cut, damaged or of something else is not even unpickled;
* whatever goes wrong with the disk, or because numba is not as this module knows it, costs compile time and
  one `SparseAdamWarning` a process.

numba's classes find the folder, take compiled functions apart and put them together again. numba-cuda has
such classes of its own; the same is done to both.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import os
import pickle
import re
import sys
import uuid
import warnings
from contextlib import suppress
from typing import Any

import llvmlite
import numba
import numpy as np

from nb_sparse_adam._src.engine.compilations import Announcement, begun, kept
from nb_sparse_adam.errors import SparseAdamWarning

# Beside this folder. Whose functions, constants or tuples are in kernels of other files, and, in __init__,
# the package's version.
SOURCES = (
    "../__init__.py", "kernels.py", "engine/apply.py", "engine/audit.py", "engine/codecs.py",
    "engine/compile.py", "engine/driver.py", "engine/entries.py", "engine/formula.py",
    "engine/grouping.py", "engine/inner.py", "engine/integers.py", "engine/intrinsics.py",
    "engine/kernel_cache.py", "engine/layout.py", "engine/parallel.py", "engine/prefetching.py",
    "engine/prepare.py", "engine/random.py", "engine/rearranging.py", "engine/records.py",
    "engine/rows.py", "engine/scanning.py", "engine/scratch.py", "engine/screening.py",
    "engine/settling.py", "engine/stages.py", "engine/step.py", "engine/sums.py", "engine/view.py",
    "cuda/checks.py", "cuda/device.py", "cuda/opening.py", "cuda/records.py", "cuda/sums.py",
    "recommender/bpr.py", "recommender/products.py", "recommender/sampling.py", "table/cells.py",
    "table/initial.py", "table/records.py",
)  # fmt: skip

# Of numba's configuration, what changes code; the processor and its features are in a key of numba's.
_FLAGS = (
    "BOUNDSCHECK", "CUDA_DEBUGINFO_DEFAULT", "DEBUGINFO_DEFAULT", "DEBUG_NRT", "DISABLE_INTEL_SVML",
    "ENABLE_CUDASIM", "EXTEND_VARIABLE_LIFETIMES", "LLVM_REFPRUNE_FLAGS", "LLVM_REFPRUNE_PASS",
    "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE", "USING_SVML",
)  # fmt: skip


def _digest(*pieces: bytes) -> bytes:
    lengths = repr([len(piece) for piece in pieces]).encode()
    return hashlib.blake2b(lengths + b"".join(pieces), digest_size=16).digest()


@functools.cache
def _source(path: str) -> bytes:
    """Digest a file, or what a zip archive holds."""
    loader: Any = __spec__.loader
    return _digest(loader.get_data(path))


def _stamp() -> str | None:
    folder = os.path.dirname(os.path.dirname(__file__))
    try:
        paths = [os.path.normpath(os.path.join(folder, *name.split("/"))) for name in SOURCES]
        return _digest(*map(_source, paths)).hex()
    except (AttributeError, OSError):  # a package without its sources
        return None


def _flags() -> list[str]:
    return [str(getattr(numba.config, name, None) or 0) for name in _FLAGS]


# Both as of the import: an upgrade, or a flag that is set, afterwards does not change the functions that this
# process has read. None: there are no sources, and nothing is kept.
STAMP = _stamp()
_FLAGS_AT_IMPORT = _flags()


def keep_on_disk(dispatcher: Any, where: str, *versions: str, announcement: Announcement) -> None:
    """Give a compiled function the disk cache, if there is a folder for it.

    Parameters
    ----------
    dispatcher : numba's dispatcher
        Of a CPU or of a GPU, without a cache so far.
    where : str
        Module and name of the class that its cache is of when numba makes it.
    *versions : str
        Of what compiles it, besides numba, llvmlite and NumPy.
    announcement : Announcement
        What is told when it has to be compiled.
    """
    try:
        numbas: Any = type(dispatcher._cache)
        dispatcher._cache = _class_without(numbas)(announcement)
        if STAMP is None:
            return
        module, _, name = where.rpartition(".")
        cache = _class_for(getattr(importlib.import_module(module), name))(
            dispatcher.py_func, dispatcher.targetoptions, versions
        )
        cache.announcement = announcement
        dispatcher._cache = cache
    except Exception as error:  # noqa: BLE001  a version of numba that is not known yet may do anything
        if "no locator available" not in str(error):  # numba's words for "there is no folder to write to"
            _warn(f"this version of numba has another disk cache than expected ({_said(error)})")


@functools.cache
def _class_for(base: Any) -> Any:
    """Make the cache class, and the classes that it looks for a folder with, of numba's."""
    locators = [type(found.__name__, (_Locator, found), {}) for found in base._impl_class._locator_classes]
    implementation = type("Implementation", (base._impl_class,), {"_locator_classes": locators})
    return type("KernelCache", (_Cache, base), {"_impl_class": implementation, "__module__": __name__})


@functools.cache
def _class_without(base: Any) -> Any:
    """Make the class of a cache that keeps nothing, of numba's."""
    return type("NoCache", (_NoCache, base), {"__module__": __name__})


def folder_of(function: Any) -> str | None:
    """Return where the kernels of a compiled function's module are kept; None: nowhere."""
    folder = getattr(getattr(function, "stats", None), "cache_path", None)
    return str(folder) if folder else None


_usable: set[str] = set()
_Numbas: Any = object  # in fact, what `_class_for` or `_class_without` says


class _NoCache(_Numbas):  # type: ignore[misc]
    """In the place of the cache of a function for which there is no folder."""

    def __init__(self, announcement: Announcement) -> None:
        super().__init__()
        self.announcement = announcement

    def load_overload(self, *_: Any) -> None:
        begun(self.announcement, None)


class _Locator(_Numbas):  # type: ignore[misc]
    """Where the files of a function are."""

    def get_cache_path(self) -> str:
        # A relative NUMBA_CACHE_DIR means a folder where the process was started, wherever it is by now.
        if not hasattr(self, "_absolute"):
            self._absolute: str = os.path.abspath(super().get_cache_path())
        return self._absolute

    def ensure_cache_path(self) -> None:
        folder = self.get_cache_path()
        if folder in _usable:  # tried once, and not by each function
            return
        try:
            super().ensure_cache_path()
        except OSError as error:
            if not _can_be_read(folder, error.errno):
                raise
        _usable.add(folder)


def _can_be_read(folder: str, why: int | None) -> bool:
    """Whether there is something to be read in a folder that cannot be written to.

    What is on a full disk can. What a user has named and filled, in an image that is read-only, can; any
    other folder that is not ours gives way to one that is.
    """
    if why in (errno.ENOSPC, errno.EDQUOT):
        return os.path.isdir(folder)
    named = numba.config.CACHE_DIR
    return (
        why in (errno.EROFS, errno.EACCES, errno.EPERM)
        and bool(named)
        and folder.startswith(os.path.join(os.path.abspath(named), ""))
        and os.path.isdir(folder)
        and any(name.endswith(".nbc") for name in os.listdir(folder))
    )


class _Cache(_Numbas):  # type: ignore[misc]
    """The cache of one function."""

    announcement: Announcement

    def __init__(self, function: Any, options: Any, versions: Any) -> None:
        super().__init__(function)
        super()._index_key  # noqa: B018  to be refused here rather than ignored later, if there is none
        self._options = _described(options)
        self._versions = (numba.__version__, llvmlite.__version__, np.__version__, *versions)
        if function.__closure__:
            function.__qualname__ = function.__name__ + uuid.uuid4().hex  # or what `_index_key` says
        base = f"{function.__module__}.{function.__name__}.{sys.implementation.cache_tag}"
        stamp = _digest(str(STAMP).encode(), _source(function.__code__.co_filename)).hex()
        dump = self._cache_file._dump
        self._cache_file: Any = _Files(self._cache_path, re.sub("[<>]", "", base), stamp, dump)

    def load_overload(self, *arguments: Any) -> Any:
        found = None
        try:
            found = super().load_overload(*arguments)
        except Exception as error:  # noqa: BLE001  disks, pickles and LLVM raise what they like
            _warn(f"what is in {self._cache_path} cannot be used ({_said(error)})")
        if found is None:
            begun(self.announcement, self._cache_path if os.access(self._cache_path, os.W_OK) else None)
        return found

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except Exception as error:  # noqa: BLE001
            _warn(f"nothing can be written to {self._cache_path} ({_said(error)})")

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, bytes]:
        made_of = _described(self._py_func)
        if self._py_func.__closure__:
            # numba makes symbols of a function's name and a number that begins at 1 in every process. Two
            # functions that a factory made, one loaded and one compiled, would have the same, and LLVM would
            # take the code of one for both.
            self._py_func.__qualname__ = self._py_func.__name__ + _digest(repr(made_of).encode()).hex()
        launch = getattr(self, "_launch_config_key", None)  # numba-cuda's
        flags = _FLAGS_AT_IMPORT, _flags(), sys.flags.optimize
        identity = repr((flags, self._versions, codegen.magic_tuple(), self._options, launch, made_of, sig))
        if " at 0x" in identity:
            raise TypeError(f"types that are different in every process: {sig}")
        return sig, identity.encode()


class _Files:
    """The files of one function, in place of numba's: one for each key, checksum first."""

    def __init__(self, folder: str, base: str, stamp: str, dump: Any) -> None:
        self._folder, self._base, self._stamp, self._dump = folder, base, stamp, dump

    def load(self, key: tuple[Any, bytes]) -> Any:
        sig, identity = key
        path = self._path(identity)
        try:
            with open(path, "rb") as file:
                checksum, payload = file.read(16), file.read()
        except FileNotFoundError:
            return None
        if checksum != self._checksum(identity, payload):
            raise OSError(f"{path} is damaged")
        found, data = pickle.loads(payload)
        return data if found == sig else None  # two types may have one name

    def save(self, key: tuple[Any, bytes], data: Any) -> None:
        sig, identity = key
        payload = self._dump((sig, data))
        path = self._path(identity)
        temporary = f"{path}.{uuid.uuid4().hex}"
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(self._checksum(identity, payload) + payload)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        kept()
        self._delete(keep=self._stamp)

    def flush(self) -> None:
        self._delete()

    def _path(self, identity: bytes) -> str:
        return os.path.join(self._folder, f"{self._base}.{self._stamp}-{_digest(identity).hex()}.nbc")

    def _checksum(self, identity: bytes, payload: bytes) -> bytes:
        return _digest(self._stamp.encode(), identity, payload)

    def _delete(self, keep: str | None = None) -> None:
        """Delete the files of this function, but for those of one stamp."""
        with suppress(OSError):
            for name in os.listdir(self._folder):
                match = re.fullmatch(re.escape(self._base) + r"\.(\w+)-\w+\.nbc.*", name)
                if match and match[1] != keep:
                    os.unlink(os.path.join(self._folder, name))


def _described(value: Any) -> Any:
    """Say what a function is made of, in words that are the same in every process.

    Raises
    ------
    TypeError
        If there are none; the function is then not kept.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, (tuple, list)):
        return [_described(each) for each in value]
    if isinstance(value, dict):
        return [(name, _described(value[name])) for name in sorted(value)]
    if isinstance(value, (np.dtype, np.generic)) or hasattr(value, "mangling_args"):  # numba's types
        return repr(value)
    function = getattr(value, "py_func", None) or getattr(value, "_defn", None) or value  # an intrinsic's
    code = getattr(function, "__code__", None)
    if code is None and hasattr(value, "__qualname__"):  # a class, or of C
        return value.__module__, value.__qualname__
    if code is None or "<" in code.co_name + code.co_filename:  # several lambdas may be in one line
        raise TypeError(f"a kernel is made of {value!r}, which looks different in every process")
    return (
        _source(code.co_filename), code.co_name, code.co_firstlineno, code.co_code,
        _described([cell.cell_contents for cell in function.__closure__ or ()]),
        _described(function.__defaults__), _described(getattr(value, "targetoptions", None)),
    )  # fmt: skip


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_warned = False


def _warn(what: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"the disk cache of kernels: {what}. They are compiled in memory instead, which changes no result; "
        "until this is mended, or NUMBA_CACHE_DIR names another folder, perhaps in every process. Said once",
        SparseAdamWarning,
        stacklevel=2,
    )
