# SPDX-License-Identifier: Apache-2.0
"""The command line: ``nb-sparse-adam train``, ``serve``, ``bench``, ``warm-up`` and ``info``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba

from nb_sparse_adam import __version__
from nb_sparse_adam._src import info
from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.parameter_server.commands import add_server
from nb_sparse_adam._src.recommender.commands import add_commands
from nb_sparse_adam._src.recommender.training_command import INTERRUPTED, add_train
from nb_sparse_adam._src.warming import DTYPES, GRADIENTS, warm_up
from nb_sparse_adam.errors import NonFiniteGradientError, OptionError, SparseAdamError

__all__ = ["main"]

_BENCH_FOLDER = "nb-sparse-adam-bench"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the name of the program; those of the process if None.

    Returns
    -------
    int
        Exit code: 0; 1 for an error; 130 after Ctrl-C. Wrong arguments exit with 2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    with _any_text(sys.stdout):
        return _run(arguments)


@contextmanager
def _any_text(stream: Any) -> Iterator[None]:
    """Make a stream escape characters that its encoding lacks: such a name must not end the run."""
    if getattr(stream, "errors", None) != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")


def _run(arguments: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = arguments.parser
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted before there were results: nothing was saved", file=sys.stderr)
        return INTERRUPTED
    except OptionError as error:
        parser.error(str(error))
    except NonFiniteGradientError as error:
        message = f"the training diverged ({error}); try a smaller --lr or --init-std"
    except MemoryError as error:
        hint = "; a smaller --dim takes less" if arguments.command == "train" else ""
        message = f"there is not enough memory: {error}{hint}"
    except BrokenPipeError:  # who reads what is printed, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SparseAdamError, OSError) as error:
        message = str(error)
    except ValueError as error:
        if "threading layer" not in str(error).lower():
            raise
        message = f"{error}; unset NUMBA_THREADING_LAYER, or install the layer that it names"
    print(f"error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nb-sparse-adam", description="Sparse Adam in Numba, on CPUs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_commands(commands)
    add_server(commands)
    _add_bench(commands)
    _add_warm_up(commands)
    text = "show versions, threads, the kernel cache, and which extras work"
    info_parser = commands.add_parser("info", help=text)
    info_parser.set_defaults(run=_info, parser=info_parser)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed on this machine, beside other libraries",
        description="Time steps beside kernels that only move the same bytes, and beside other libraries, "
        "taking turns in one run; print a table, and write bench.json, and bench.png if matplotlib is there. "
        "Without --quick it takes about ten minutes and up to 8 GB of memory (19 for one of the lines).",
    )
    bench.add_argument(
        "--peers",
        metavar="NAMES",
        help="some of torch, fbgemm, paddle, implicit and lightfm, separated by commas, or none (default: "
        "those that are installed)",
    )
    bench.add_argument(
        "--quick",
        action="store_true",
        help="small tables and few repeats: to see that it works, in about a minute",
    )
    bench.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only the lines whose names in bench.json begin so, for example bag or rows-64; a wrong name is "
        "answered with all of them. Only a run that names it has the line recommender (a quarter of an hour)",
    )
    bench.add_argument(
        "--interactions",
        metavar="FILE",
        help="interactions, as train reads them, for the line recommender-file",
    )
    bench.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: as many as numba would use)"
    )
    bench.add_argument(
        "--json",
        metavar="FILE",
        help="write what bench.json holds into this file instead of a folder; - for stdout: the table then "
        "goes to stderr",
    )
    bench.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for bench.json and its pictures (default: {_BENCH_FOLDER}, none with --json)",
    )
    bench.set_defaults(run=_bench, parser=bench)


def _add_warm_up(commands: Any) -> None:
    warm = commands.add_parser(
        "warm-up",
        help="compile kernels ahead of the first step",
        description="Compile what steps need and keep it on disk, so that no first step waits for it: when "
        "an image is built, or before a server starts. It is kept in the folder that `nb-sparse-adam info` "
        "names; NUMBA_CACHE_DIR names another one. Code is for the type of processor that compiles it: on "
        "another type it is compiled again. A dtype with a count takes some 5 seconds, the first 10 more.",
    )
    for flag, allowed, default, text in (
        ("--dtype", DTYPES, DTYPES[:1], "of the tables"),
        ("--step-counts", STEP_COUNTS, STEP_COUNTS, "what steps count"),
        ("--gradients", GRADIENTS, GRADIENTS, "forms of gradients (csr is all of scipy.sparse)"),
    ):
        warm.add_argument(
            flag,
            nargs="+",
            choices=allowed,
            default=default,
            metavar="NAME",
            help=f"{text}: some of {', '.join(allowed)} (default: {' '.join(default)})",
        )
    warm.set_defaults(run=_warm_up, parser=warm)


def _info(_: argparse.Namespace) -> int:
    for line in info.report_lines():
        print(line)
    return 0


def _warm_up(arguments: argparse.Namespace) -> int:
    if numba.config.DISABLE_JIT:
        print("NUMBA_DISABLE_JIT is set: there is nothing to compile")
        return 0
    folder = info.cache_folder()
    if folder is None:
        print(
            "error: no folder can be written to, so that what is compiled here would be of no use to other "
            "processes: set NUMBA_CACHE_DIR to a folder that can",
            file=sys.stderr,
        )
        return 1
    lost = 0
    for dtype in arguments.dtype:
        for counts in arguments.step_counts:
            done = warm_up(dtype, counts, arguments.gradients)
            what = f"{done.compiled} kernels compiled" if done.compiled else "all found on disk"
            print(f"{dtype}, {counts} counts: {what}, {done.seconds:.1f} s", flush=True)
            lost += done.compiled - done.kept
    if lost:
        print(f"error: {lost} kernels were compiled, but not written to {folder}", file=sys.stderr)
        return 1
    print(f"kept in {folder}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from nb_sparse_adam._src.bench.command import bench  # the other commands need none of it

    out = arguments.out
    if out is None and arguments.json is None:
        out = Path(_BENCH_FOLDER)
    complete = bench(
        peers=arguments.peers,
        threads=arguments.threads,
        quick=arguments.quick,
        only=arguments.only,
        out=out,
        json_file=arguments.json,
        interactions=arguments.interactions,
    )
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
