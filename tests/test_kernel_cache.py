# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels are kept on disk where a folder can be written, and compiled anew where none can.

What runs is what the sources say, whatever is on the disk; and trouble with the disk costs compile time and a
warning, nothing else.
"""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from needs import need

import nb_sparse_adam
from nb_sparse_adam._src.engine.kernel_cache import SOURCES

pytestmark = pytest.mark.jit

# A step of each form that is asked for; what compiled functions say about the disk cache, the modules that
# each of them takes tuples of, and the table.
STEPS = """
import gc, json, os, sys, numpy as np
from numba.core.dispatcher import Dispatcher
import nb_sparse_adam
from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam

def modules_of(types):
    for type in types:
        if hasattr(type, "instance_class"):
            yield type.instance_class.__module__
        if hasattr(type, "types"):
            yield from modules_of(type.types)

table = np.zeros((6, 2), dtype=np.float32)
optimizer = SparseAdam(table, lr=0.5)
ones = np.ones((2, 2), dtype=np.float32)
gradients = {
    "rows": RowGradient(np.array([1, 4]), ones),
    "bag": BagGradient(np.array([5, 1, 5]), np.array([0, 2, 3]), ones),
    "csr": CSRGradient(np.array([0, 1, 1, 1, 1, 1, 2]), np.array([0, 1]), ones[0]),
}
for form in sys.argv[1:]:
    optimizer.step(gradients[form])

dispatchers = [
    found
    for found in gc.get_objects()
    if isinstance(found, Dispatcher) and found.overloads
    if found.py_func.__module__.startswith("nb_sparse_adam")
    if not found.targetoptions.get("no_cpython_wrapper")  # what compiled code alone calls is not kept
]
stats = [dispatcher.stats for dispatcher in dispatchers]
print(json.dumps({
    "file": nb_sparse_adam.__file__,
    "hits": sum(sum(s.cache_hits.values()) for s in stats),
    "misses": sum(sum(s.cache_misses.values()) for s in stats),
    "folders": sorted({str(s.cache_path) for s in stats}),
    "beside": sorted({os.path.dirname(d.py_func.__code__.co_filename) + "/__pycache__" for d in dispatchers}),
    "table": table.tolist(),
    "tuples": sorted({
        module
        for dispatcher in dispatchers
        for types in dispatcher.overloads
        for module in modules_of(types)
        if module != dispatcher.py_func.__module__
    }),
}))
"""


def run_steps(folder, *forms, **env):
    """Take the steps in an interpreter that finds the package in `folder` only."""
    drop = {"NUMBA_CACHE_DIR", "PYTHONPATH", "XDG_CACHE_HOME"}
    env = {
        **{name: value for name, value in os.environ.items() if name not in drop},
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        **env,
    }
    command = [sys.executable, "-W", "error", "-c", STEPS, *(forms or ["rows"])]
    out = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    result = json.loads(out.stdout)
    assert Path(result["file"]).parent == folder / "nb_sparse_adam"
    return result


def copy_package(folder):
    """Install a copy of the package without anything compiled into `folder`."""
    source = Path(nb_sparse_adam.__file__).parent
    shutil.copytree(source, folder / "nb_sparse_adam", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def install(tmp_path):
    folder = copy_package(tmp_path.resolve() / "install")
    (folder / "small.py").write_text(SMALL, encoding="utf-8")
    return folder


# Kernels that compile in no time, and what tells where a call got its code from.
SMALL = """
import numba
import numpy as np
from nb_sparse_adam._src.engine.compile import jit

@jit(entry=True)
def take(x, i):
    return x[i]

@jit(entry=True, announced="what adds")
def add(x, y):
    return x + y

def make(k):
    @jit
    def times(x):
        return x * k

    @jit(parallel=True)
    def fill(x, out):
        for i in numba.prange(len(out)):
            out[i] = times(x)

    @jit(entry=True, allocates=True)
    def filled(x):  # what is parallel is not inlined, but linked by its name
        out = np.empty(2)
        fill(x, out)
        return out[1]

    return filled

def called(function, *args):
    value = function(*args)
    return [value, "found" if sum(function.stats.cache_hits.values()) else "compiled"]

numba.set_num_threads(1)  # starts them: numba 0.59 forgets to for a function that was found and calls `fill`

copies = [jit(entry=True)(take.py_func) for _ in range(4)]

def taken(i=1, values=(5, 7)):
    # Each by a function of its own: nothing of the call before is in its memory.
    return called(copies.pop(), np.array(values), i)
"""


# Importing numba and teaching it its types takes most of a second: it is done once, and each program runs in
# a child of that process, with the configuration that it asks for.
SERVER = """
import json, multiprocessing, os, sys, traceback
# Python 3.14's default reports semaphores of numba's as leaks, where a child ends by os._exit.
multiprocessing.set_start_method("fork")
import numba, numpy as np

numba.njit(lambda x, i: x[i])(np.ones(2), 1)
for line in sys.stdin:
    program, folder, env = json.loads(line)
    out, into = os.pipe()
    if os.fork() == 0:
        status = 1
        try:
            os.dup2(into, 1)
            os.dup2(into, 2)
            os.chdir(folder)
            os.environ.update(env)
            numba.config.reload_config()
            sys.path.insert(0, folder)
            exec(program, {"__name__": "program"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(into)
    with open(out) as file:
        said = file.read()
    print(json.dumps([os.wait()[1], said]), flush=True)
"""


def environment():
    drop = {"NUMBA_CACHE_DIR", "NUMBA_BOUNDSCHECK", "PYTHONPATH", "XDG_CACHE_HOME"}
    env = {name: value for name, value in os.environ.items() if name not in drop}
    return env | {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(
        command, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def run(program, folder, env):
        print(json.dumps([program, str(folder), env]), file=process.stdin, flush=True)
        status, said = json.loads(process.stdout.readline())
        assert status == 0, said
        return json.loads(said)

    with process:
        yield run
        process.stdin.close()


@pytest.fixture
def small(server, install):
    """Run code with the package and `SMALL` in a process of its own; return ``out``, and what was warned.

    With ``fork=False`` it is a new process, whose addresses are others.
    """

    def run(code="out = taken()", before="", fork=True, **env):
        program = f"""
import json, os, sys, warnings
from unittest import mock
import numpy as np
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    {before}
    from small import *
{textwrap.indent(textwrap.dedent(code), "    ")}
print(json.dumps([out, [f"{{w.category.__name__}}: {{w.message}}" for w in said]]))
"""
        if fork:
            return server(program, install, env)
        command, env = [sys.executable, "-c", program], {**environment(), "PYTHONPATH": str(install), **env}
        done = subprocess.run(command, cwd=install, env=env, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    return run


def files_of(folder, name="take"):
    return sorted(path for path in folder.rglob("*.nbc") if f".{name}." in path.name)


@pytest.fixture
def read_only(install):
    """An install in which no ``__pycache__`` can be made, even by root, who may write anywhere."""
    for folder in {path.parent for path in install.rglob("*.py")}:
        (folder / "__pycache__").write_text("a file, where a folder cannot be made")
    return install


def test_kernels_are_read_from_disk_until_they_are_edited(install):
    forms = ["rows", "bag", "csr"]
    first = run_steps(install, *forms)
    assert first["folders"] == first["beside"]
    assert first["misses"] > 0

    second = run_steps(install, *forms)
    assert second["misses"] == 0
    assert second["hits"] > 0
    assert second["table"] == first["table"]

    # Whose order of fields is in the code of other modules.
    assert {"/".join(name.split(".")[2:]) + ".py" for name in first["tuples"]} <= set(SOURCES)

    before = run_steps(install)
    # In a file that is only inlined: every gradient is read with the other sign.
    memory = install / "nb_sparse_adam" / "_src" / "engine" / "intrinsics.py"
    edit(
        memory,
        "            _say_where(builder, value, scope)\n",
        "            _say_where(builder, value, scope)\n"
        "            value = builder.fneg(value) if scope == 'gradient' else value\n",
    )
    after = run_steps(install)
    assert after["misses"] > 0
    assert after["table"] == [[-x for x in row] for row in before["table"]]


def test_a_read_only_install_keeps_its_kernels_in_the_users_cache_folder(small, read_only, tmp_path):
    home = tmp_path.resolve() / "home"
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    assert small(**env) == [[7, "compiled"], []]
    assert small(**env) == [[7, "found"], []]
    assert len(files_of(home)) == 1
    assert files_of(read_only) == []


def test_a_read_only_install_without_a_home_compiles_in_memory(small, read_only):
    nowhere = os.devnull + "/nowhere"
    for _ in range(2):
        assert small(HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR=nowhere) == [[7, "compiled"], []]
    assert files_of(read_only) == []


# --- what runs is what the sources say --------------------------------------------------------------------


def test_an_edit_in_any_file_that_kernels_are_made_of_is_seen(small, install, request):
    assert small() == [[7, "compiled"], []]
    sources = SOURCES if request.config.getoption("--long") else SOURCES[::5]  # they are hashed in one loop
    for name in (*sources, "../../small.py"):
        with open(install / "nb_sparse_adam" / "_src" / name, "a", encoding="utf-8") as file:
            file.write("# edited\n")
        assert small() == [[7, "compiled"], []], name
        assert len(files_of(install)) == 1  # those of sources that are no more are deleted
    assert small() == [[7, "found"], []]

    # The same content, installed again: other times, another inode.
    content = {path: path.read_bytes() for path in install.rglob("*.py")}
    for path, data in content.items():
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (1e9, 1e9))
    assert small() == [[7, "found"], []]


def test_sources_are_those_that_the_process_has_read(small, install):
    """An upgrade while a process runs: what it compiles from then on is of the old sources."""
    code = """
    with open("nb_sparse_adam/_src/engine/intrinsics.py", "a") as file:
        file.write("# upgraded")
    out = taken()
    """
    assert small(code) == [[7, "compiled"], []]
    assert small() == [[7, "compiled"], []]


def test_every_file_that_compiled_functions_take_something_from_is_covered():
    """Names that are used in a function that is compiled, and imported from another file."""
    package = Path(nb_sparse_adam.__file__).parent / "_src"
    found = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nb_sparse_adam")
            for alias in node.names
        }
        compiles = {"jit", "kernel", "device_function"} & imported.keys()
        for node in ast.walk(tree):
            roots = [node.func, node] if isinstance(node, ast.Call) else getattr(node, "decorator_list", [])
            if not any(
                isinstance(name, ast.Name) and name.id in compiles
                for root in roots
                for name in ast.walk(root)
            ):
                continue
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and name.id in imported:
                    module = imported[name.id]
                    # A module, or what is in one.
                    file = package.parents[1] / f"{module.replace('.', '/')}.py"
                    file = file if file.exists() else file.parent.with_suffix(".py")
                    found.add(str(file.relative_to(package)))
    assert len(found) > 3
    assert found <= set(SOURCES)


def test_flags_that_change_code_have_files_of_their_own(small, install):
    code = """
    try:
        out = called(take, np.arange(4)[:2], 2)  # out of bounds, but harmless
    except IndexError:
        out = "checked"
    """
    flags = {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_DEBUGINFO": "1"}, {"NUMBA_OPT": "1"}
    assert small(code, NUMBA_BOUNDSCHECK="1") == ["checked", []]
    assert small(code) == [[2, "compiled"], []]
    assert small(code, NUMBA_BOUNDSCHECK="1") == ["checked", []]
    for flag in flags[1:]:
        assert small(code, **flag) == [[2, "compiled"], []]
    assert small(code) == [[2, "found"], []]
    for flag in flags:
        assert small(**flag) == [[7, "found"], []]


def test_closures_of_a_factory_are_found_by_what_they_hold(small, install):
    """Without a name of its own for each, LLVM links the code of one in the place of another's.

    In new processes: numba names what it makes of a `prange` loop by an address, and processes that are
    forked from one have the same ones. The package has one function with such a loop, without variants.
    """
    code = "out = [called(make(k), 1.0) for k in {}]"
    assert small(code.format([2]), fork=False)[0] == [[2, "compiled"]]
    assert small(code.format([3]), fork=False)[0] == [[3, "compiled"]]
    assert small(code.format([3, 2, 5, 2]), fork=False) == [
        [[3, "found"], [2, "found"], [5, "compiled"], [2, "found"]],
        [],
    ]
    code = "out = [called(make(k), 1.0) for k in [2, 2.5, np.float32(2), True, 1]]"
    assert [value for value, _ in small(code)[0]] == [2, 2.5, 2, 1, 1]


def test_what_cannot_be_described_is_not_kept(small, install):
    code = """
    out = [called(f, 1) for f in (*lambdas, jit(entry=True)(holding(np.array([2.0]))))]
    """
    with open(install / "small.py", "a", encoding="utf-8") as file:
        file.write("lambdas = [jit(entry=True)(lambda x: x + 1), jit(entry=True)(lambda x: x + 3)]\n")
        file.write("def holding(k):\n    def f(x): return x * k[0]\n    return f\n")
    for _ in range(2):
        out, said = small(code)
        assert out == [[2, "compiled"], [4, "compiled"], [2, "compiled"]]
        assert len(said) == 1
        assert "looks different in every process" in said[0]


def test_processes_that_compile_at_the_same_time(small, install):
    code = "import numpy as np; from small import called, take; import sys; out = 0\n"
    code += "for d in ('i4', 'i8', 'f4', 'f8')[int(sys.argv[1]):]: print(called(take, np.ones(2, d), 1)[0])"
    env = {**os.environ, "PYTHONPATH": str(install), "NUMBA_CACHE_DIR": str(install / "cache")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(first)], cwd=install, env=env, stdout=subprocess.PIPE, text=True
        )
        for first in (0, 0, 1, 2)
    ]
    for one, calls in zip(running, (4, 4, 3, 2), strict=True):
        assert one.communicate()[0].split() == ["1", "1", "1.0", "1.0"][4 - calls :]
    code = (
        "out = [called(jit(entry=True)(take.py_func), np.ones(2, d), 1)[1] for d in ('i4', 'i8', 'f4', 'f8')]"
    )
    assert small(code, NUMBA_CACHE_DIR=env["NUMBA_CACHE_DIR"]) == [["found"] * 4, []]
    assert [path for path in (install / "cache").rglob("*") if path.is_file() and path.suffix != ".nbc"] == []


# A user's program, whose function numba keeps on disk by itself.
USER = """
import json, numpy as np
from numba import njit
from nb_sparse_adam import SparseAdam, apply_row_gradient

@njit(cache=True)
def pull(table, row, gradient):
    apply_row_gradient(table, row, gradient)
    return table.param[row, 0]

optimizer = SparseAdam(np.zeros((2, 1), np.float32), lr=0.5, on_nonfinite="skip")
with optimizer.kernel_table() as table:
    assert isinstance(table, tuple) and table[0] is table.param and table.param.shape == (2, 1)
    value = pull(table, 1, np.ones(1, np.float32))
print(json.dumps([value, sum(pull.stats.cache_hits.values())]))
"""


def test_a_users_cached_function_is_compiled_anew_after_an_upgrade(tmp_path):
    installs = [copy_package(tmp_path.resolve() / name) for name in ("old", "new")]
    edit(
        installs[1] / "nb_sparse_adam" / "_src" / "engine" / "formula.py",
        "return p - product(step_size,",
        "return p + product(step_size,",
    )
    program = tmp_path / "program.py"
    program.write_text(USER, encoding="utf-8")

    def run(folder):
        env = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-W", "error", program], env=env, check=True, capture_output=True
        )
        return json.loads(done.stdout)

    old, new = installs
    assert run(old) == [pytest.approx(-0.5), 0]
    assert run(new) == [pytest.approx(0.5), 0]
    assert run(old) == [pytest.approx(-0.5), 1]
    assert run(new) == [pytest.approx(0.5), 1]


# Of a GPU's kernels: what is kept on disk stands for what a driver would give, for there is none here.
ON_A_GPU = """
import json, numba, numba.cuda.dispatcher, numpy as np
from numba.cuda.dispatcher import CUDACache
from nb_sparse_adam._src.cuda import checks, kernels
from nb_sparse_adam._src.engine.codecs import PLAIN

class Compiled:
    def magic_tuple(self):
        return (13, 0), (9, 0)
    def refresh(self):
        pass
    def _reduce_states(self):
        return {"number": self.number}
    def codegen(self):
        return self

CUDACache._impl_class.rebuild = lambda self, context, payload: payload["number"]

found = []
made = [
    kernels.kernels_for(kernels.Variant(np.dtype(dtype), PLAIN, np.dtype("i4"), 0, 1, True, False))[3]
    for dtype in ("f4", "f8")
]
for number, kernel in enumerate([checks.check_ids, checks.settle, *made]):
    cache, kind = kernel._cache, Compiled()
    assert isinstance(cache, CUDACache)
    found.append(cache.load_overload((numba.types.int64,), kind))
    kind.number, kind.codegen = number, kind
    cache.save_overload((numba.types.int64,), kind)
print(json.dumps(found))
"""


def test_kernels_of_a_gpu_are_kept_in_the_same_way(install):
    need("numba_cuda")

    def run():
        env = {
            **os.environ,
            "PYTHONPATH": str(install),
            "NUMBA_ENABLE_CUDASIM": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        env.pop("NUMBA_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", ON_A_GPU], cwd=install, env=env, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert run() == [None] * 4
    assert run() == [0, 1, 2, 3]
    with open(install / "nb_sparse_adam" / "_src" / "cuda" / "records.py", "a", encoding="utf-8") as file:
        file.write("# edited")
    assert run() == [None] * 4


# --- that something is compiled is told ---------------------------------------------------------------------

LISTEN = """
import logging, numba
class Handler(logging.Handler):
    def emit(self, record):
        told.append([record.levelname, record.getMessage(), len(add.overloads)])
        {more}
told = []
logging.getLogger("nb_sparse_adam").addHandler(Handler())
logging.getLogger("nb_sparse_adam").setLevel(logging.INFO)
out = [take(np.ones(1), 0), add(1, 2), add(1.5, 2), told]
"""


def test_a_long_compilation_is_told_before_it_begins_once_a_process(small, install):
    (taken, *sums, told), said = small(LISTEN.format(more=""))
    assert (taken, sums, said) == (1, [3, 3.5], [])
    ((level, message, compiled),) = told
    assert (level, compiled) == ("INFO", 0)
    assert message.startswith("compiling what adds, once on this machine, for it is kept in ")
    assert str(install / "__pycache__") in message
    assert "warm_up()" in message
    assert "nb-sparse-adam warm-up" in message
    assert small(LISTEN.format(more=""))[0][-1] == []  # all of it is on the disk


@pytest.mark.parametrize("more", ["raise RuntimeError", "told.append(add(1, 2)); told.append(add(0.5, 1))"])
def test_what_a_handler_does_is_its_own_affair(small, more):
    (_, *sums, told), said = small(LISTEN.format(more=more))
    assert (sums, said) == ([3, 3.5], [])
    assert told[0][0] == "INFO"
    assert told[1:] in ([], [3, 1.5])


def test_where_nothing_can_be_kept_it_is_told_of_every_process(small, read_only):
    nowhere = os.devnull + "/nowhere"
    env = dict.fromkeys(["HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"], nowhere)
    for _ in range(2):
        (_, *sums, told), said = small(LISTEN.format(more=""), **env)
        assert (sums, said) == ([3, 3.5], [])
        assert "compiling what adds, in every process" in told[0][1]
        assert "NUMBA_CACHE_DIR" in told[0][1]


def test_nobody_is_told_who_does_not_listen(small):
    code = """
    import logging
    logging.basicConfig()
    out = [add(1, 2)]
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().handlers[0].emit = lambda record: out.append(record.name)
    out.append(add(1.5, 2))
    """
    assert small(code) == [[3, "nb_sparse_adam", 3.5], []]


# --- trouble ----------------------------------------------------------------------------------------------


def one_warning(said, *words):
    assert len(said) == 1
    assert said[0].startswith("SparseAdamWarning: ")
    for word in ("disk cache", "compiled in memory", "NUMBA_CACHE_DIR", *words):
        assert word in said[0]


def test_damaged_files_are_compiled_anew_and_replaced(small, install):
    code = "out = [taken(), taken()]"
    assert small(code) == [[[7, "compiled"], [7, "found"]], []]
    assert small("out = called(make(2), 1.0)")[0] == [2, "compiled"]
    (file,) = files_of(install)
    whole = file.read_bytes()
    at = whole.index(b"\x7fELF") if b"\x7fELF" in whole else len(whole) // 2  # in the machine code
    flipped = [whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1 :] for i in (0, at, len(whole) - 1)]
    other = files_of(install, "fill")[0].read_bytes()
    damages = [b"", whole[:10], whole[:-1], whole + b"x", bytes(len(whole)), other, *flipped]
    for damaged in damages:
        file.write_bytes(damaged)
        out, said = small(code)
        assert out == [[7, "compiled"], [7, "found"]]
        one_warning(said, file.name, "damaged")

    file.unlink()
    file.mkdir()  # what cannot be replaced
    (file / "x").touch()
    out, said = small(code)
    assert out == [[7, "compiled"], [7, "compiled"]]
    one_warning(said, "IsADirectoryError")


def test_what_numba_left_behind_is_not_read(small, install):
    cache = install / "__pycache__"
    cache.mkdir()
    for name in (f"small.take-6.py{sys.version_info[0]}{sys.version_info[1]}", "small.take"):
        for ending in ("nbi", "1.nbc"):
            (cache / f"{name}.{ending}").write_bytes(b"")
    assert small("out = [taken(), taken()]") == [[[7, "compiled"], [7, "found"]], []]


FULL = """
os.replace = full
out = [taken(), taken(i=np.int32(1), values=(0.5, 1.5)), taken(values=(1j,), i=0)[1]]
"""


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_read_from(small, install, error):
    assert small() == [[7, "compiled"], []]
    before = files_of(install)
    before_import = f"import tempfile; full = mock.Mock(side_effect=OSError({getattr(errno, error)}, 'full'))"
    out, said = small(FULL, f"{before_import}; tempfile.TemporaryFile = full")
    assert out == [[7, "found"], [1.5, "compiled"], "compiled"]
    one_warning(said, "full")
    assert files_of(install) == before
    assert small() == [[7, "found"], []]


@pytest.mark.skipif(os.name != "posix", reason="needs limits of processes")
def test_a_file_that_is_cut_off_while_it_is_written(small, install):
    code = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    out = [taken(), taken()]
    """
    out, said = small(code)
    assert out == [[7, "compiled"], [7, "compiled"]]
    one_warning(said, "File too large")
    assert [path.name for path in (install / "__pycache__").iterdir()] == []


READ_ONLY = """
folder = os.environ["NUMBA_CACHE_DIR"]
real = tempfile.TemporaryFile
def refused(*a, dir=None, **k):  # as by the system: root may write anywhere
    if dir.startswith(folder):
        raise OSError({error}, "read-only")
    return real(*a, dir=dir, **k)
tempfile.TemporaryFile = refused
"""


@pytest.mark.parametrize("error", ["EROFS", "EACCES"])
def test_a_folder_that_is_named_and_filled_may_be_read_only(small, install, error):
    before = f"import tempfile; exec({READ_ONLY.format(error=getattr(errno, error))!r})"
    cache = install / "cache"
    env = {"NUMBA_CACHE_DIR": str(cache)}
    assert small(before=before, **env) == [[7, "compiled"], []]  # nothing to be read there: kept elsewhere
    assert len(files_of(install / "__pycache__")) == 1
    assert small(**env) == [[7, "compiled"], []]
    assert small(before=before, **env) == [[7, "found"], []]
    assert len(files_of(cache)) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs users")
def test_files_of_another_user(small, install):
    cache = install / "cache"
    env = {"NUMBA_CACHE_DIR": str(cache)}
    assert small(**env) == [[7, "compiled"], []]
    (file,) = files_of(cache)
    file.chmod(0)
    reads = """
    if os.geteuid() == 0:  # may do anything
        os.setgid(65534)
        os.setuid(65534)
    out = [taken(), taken()]
    """
    for path in (cache, file.parent, *install.parents[:3]):
        path.chmod(0o755)
    if os.geteuid() == 0:
        out, said = small(reads, **env)
        assert out == [[7, "compiled"], [7, "compiled"]]
        one_warning(said, "PermissionError")
    file.parent.chmod(0o777)  # where everybody may replace it
    out, said = small(reads, **env)
    assert out == [[7, "compiled"], [7, "found"]]
    one_warning(said, "PermissionError")


def test_a_folder_that_goes_away(small, install):
    cache = install / "cache"
    env = {"NUMBA_CACHE_DIR": str(cache)}
    code = """
    import shutil
    shutil.rmtree("cache")
    {}
    out = [taken(), taken()]
    """
    assert small(code.format(""), **env) == [[[7, "compiled"], [7, "found"]], []]
    out, said = small(code.format("open('cache', 'w').close()"), **env)
    assert out == [[7, "compiled"], [7, "compiled"]]
    one_warning(said, str(cache))


def test_a_relative_folder_stays_where_it_was(small, install, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = f"os.chdir({str(elsewhere)!r})\nout = taken()"
    assert small(code, NUMBA_CACHE_DIR="cache") == [[7, "compiled"], []]
    assert small(code, NUMBA_CACHE_DIR="cache") == [[7, "found"], []]
    assert list(elsewhere.iterdir()) == []
    assert len(files_of(install / "cache")) == 1


@pytest.mark.parametrize(
    "unknown",
    [
        "del caching.FunctionCache",
        "del caching.Cache._index_key",
        "caching.CompileResultCacheImpl._locator_classes = None",
        "caching.FunctionCache.__init__ = lambda self, function, more: None",
        "caching.Cache.load_overload = lambda self, sig: None",
        "caching.Cache._load_overload = lambda self, sig: None",
        "caching.CompileResultCacheImpl.rebuild = None",
    ],
)
def test_a_numba_that_is_not_known(small, unknown):
    assert small() == [[7, "compiled"], []]
    out, said = small("out = [taken(), taken()]", f"from numba.core import caching; {unknown}")
    assert out == [[7, "compiled"], [7, "compiled"]]
    one_warning(said)
