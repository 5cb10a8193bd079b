"""Row steps against torch.optim.SparseAdam in the same run, and what starting costs.

    python -m benchmarks.row_vs_torch [--repeats N] [--threads N] [--json FILE]

The medians are the figures; where other programs use the cores, the fastest steps tell more. torch gets its
gradients coalesced (ids unique and in order), which is what it is fastest with; ours is timed on the same
gradients and, below, on shuffled ones that neither side has grouped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import numba
import numpy as np

import nb_sparse_adam

from .cases import CASES
from .contenders import Contender, Ours, TorchRows, import_torch
from .timing import alternate, first_step_seconds, import_seconds

STEP_COUNTS = ("element", "row", "global")


def _race(case_name: str, *, coalesced: bool, threads: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of torch, and of ours with each kind of step counts.

    The last contender does what torch does: it does not look for NaN and infinity.
    """
    case = CASES[case_name]
    contenders: dict[str, Contender] = {"torch": TorchRows(case, threads=threads, coalesced=coalesced)}
    for step_counts in STEP_COUNTS:
        contenders[step_counts] = Ours(case, step_counts=step_counts, threads=threads)
    contenders["global, propagate"] = Ours(
        case, step_counts="global", threads=threads, on_nonfinite="propagate"
    )
    return alternate(contenders, repeats)


def _print_race(title: str, seconds: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':<28}   median           fastest", flush=True)
    for name, times in seconds.items():
        label = "torch.optim.SparseAdam" if name == "torch" else f"ours, {name}"
        row = f"  {label:<26}"
        for statistic in (statistics.median, min):
            took = statistic(times)
            row += f"{took * 1e3:8.2f} ms{statistic(seconds['torch']) / took:5.1f} x"
        print(row, flush=True)


def main() -> int:
    """Measure, print, and write a JSON file if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contender (default 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    try:
        torch = import_torch(args.threads)
    except NotImplementedError as error:
        print(f'{error}\nThis comparison needs it: pip install ".[torch]"', file=sys.stderr)
        return 1

    print(
        f"nb_sparse_adam {nb_sparse_adam.__version__}, numba {numba.__version__}, NumPy {np.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"{os.cpu_count()} cores, {args.threads} threads; {args.repeats} steps each, taken in turn"
    )
    figures: dict[str, object] = {}
    for key, title, case_name, coalesced in [
        ("coalesced", "2M x 64 float32, 100k unique rows in order (coalesced)", "rows-2Mx64", True),
        (
            "shuffled",
            "2M x 64 float32, 100k unique rows shuffled (uncoalesced)",
            "rows-2Mx64-shuffled",
            False,
        ),
    ]:
        times = _race(case_name, coalesced=coalesced, threads=args.threads, repeats=args.repeats)
        _print_race(title, times)
        figures[key] = times

    seconds = import_seconds()
    print(f"\nimport nb_sparse_adam, beyond numba: {seconds:.3f} s")
    figures["import"] = seconds
    print("\nfirst step of a process        uncached   cached")
    for form in ("rows", "bag", "csr"):
        for step_counts in STEP_COUNTS:
            uncached, cached = first_step_seconds(form, step_counts)
            print(f"  {form:<6}{step_counts!r:<22}{uncached:8.2f} s{cached:8.3f} s", flush=True)
            figures[f"first step, {form}, {step_counts}"] = {"uncached": uncached, "cached": cached}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
