# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown of what `python -m benchmarks.gpu`, and a look beside it, found on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.pages.tables import at, note, table
from nb_sparse_adam._src.bench.cases import compact

SMALL, TABLES = "32 rows x 16 in 100k x 16", "26 tables x 2048 x 4 ids x 32, whole training step"


class OnGPU(NamedTuple):
    """What was found on one GPU.

    Attributes
    ----------
    checks, times : dict
        Sections of ``gpu.json``.
    more : dict
        Wall times and checks of other programs.
    """

    checks: dict[str, Any]
    times: dict[str, Any]
    more: dict[str, Any]

    @property
    def results(self) -> tuple[dict[str, Any], ...]:
        """All of them."""
        return self.checks, self.times, self.more


def machine_table(gpu: OnGPU) -> str:
    """What was measured on, and with."""
    machine = gpu.times["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("numba-cuda", "numba", "torch", "numpy"))
    row = [machine["gpu"], at(gpu.times), machine["date"][:10], f"CUDA {machine['runtime']}, {versions}"]
    return table(["GPU", "at commit", "on", "with"], [row]) + note(*gpu.results)


def updates_table(gpu: OnGPU) -> str:
    """The update alone, between events on the GPU, as a share of what a copy of memory reaches."""
    copied = gpu.times["copy"]["copy_gb_per_s"]
    rows = [["a copy of memory", "", f"{copied:.0f}", "1"]]
    for counts in ("global", "element", "row"):
        found = gpu.times["rows"][counts]
        rows.append(
            [
                f'`"{counts}"`',
                f"{found['update_ms']:.2f}",
                f"{found['update_gb_per_s']:.0f}",
                f"{found['share_of_copy']:.2f}",
            ]
        )
    return table([f"update of {_rows(gpu)}", "ms", "GB/s", "share of a copy"], rows) + note(*gpu.results)


def torch_table(gpu: OnGPU) -> str:
    """Steps beside torch's, the host and the wait for the last of them included."""
    sizes, (small, tables) = (
        gpu.times["machine"]["sizes"],
        (gpu.more["wall_ms"][name] for name in (SMALL, TABLES)),
    )
    bags = f"{compact(sizes['bags'])} bags of {sizes['lookups']}"
    shape = f"{compact(sizes['rows'])} x {sizes['dim']}"
    timed = {
        f"{bags}, Zipf(1.2) ids in {shape}": gpu.times["bags"]["zipf"],
        f"{bags}, uniform ids in {shape}": gpu.times["bags"]["uniform"],
        _rows(gpu): gpu.times["torch_rows"],
    }
    rows = [
        _beside(what, here["torch_wall_ms"], here["ours_wall_ms"], here["drop_in_wall_ms"])
        for what, here in timed.items()
    ]
    by_torch = "torch.optim.SparseAdam"
    rows += [
        _beside(f"{SMALL}, sorted", small[f"{by_torch}, coalesced"], small["device_checks off"], None),
        _beside(
            f"{SMALL}, not sorted", small[f"{by_torch}, not coalesced"], None, small["drop-in, deferred"]
        ),
        _beside(f"{TABLES}: optimizer", tables["torch"], None, tables["drop-in, deferred"]),
        _beside(f"{TABLES}: fused layers", tables["torch"], None, tables["fused, deferred"]),
    ]
    head = ["a step on", "torch, ms", "`SparseAdam`, ms", "", "`nb_sparse_adam.torch`, ms", ""]
    return table(head, rows) + note(*gpu.results)


def _beside(what: str, torch: float, ours: float | None, in_torch: float | None) -> list[str]:
    cells = [what, f"{torch:.3g}"]
    for ms in (ours, in_torch):
        cells += ["", ""] if ms is None else [f"{ms:.3g}", f"{torch / ms:.2g}×"]
    return cells


def host_table(gpu: OnGPU) -> str:
    """What the GPU does, and what the host takes to have it done."""
    rows = []
    for counts in ("global", "element", "row"):
        found = gpu.times["rows"][counts]
        times = [found[name] for name in ("step_on_gpu_ms", "step_on_host_ms", "step_wall_ms")]
        rows.append([f'`"{counts}"`', *(f"{ms:.2f}" for ms in times)])
    head = [f"a step of {_rows(gpu)}", "on the GPU, ms", "on the host, ms", "a step, many in flight, ms"]
    return f"{table(head, rows)}{note(*gpu.results)}\nNoted with it: {gpu.more['host_per_launch']}.\n"


def checks_table(gpu: OnGPU) -> str:
    """How often bits were compared, and how often they were equal."""
    ids = gpu.checks["machine"]["sizes"]["large_ids"]
    found = {
        "with a CPU's: each form, count rule and dtype; what is refused, what is skipped": gpu.checks[
            "checks"
        ],
        f"with a CPU's at {compact(ids)} ids, again, and on another stream": gpu.checks["large_checks"],
    }
    rows = [[what, str(here["cases"]), str(here["equal"])] for what, here in found.items()]
    sums = (sum(here[name] for here in found.values()) for name in ("cases", "equal"))
    rows.append(["all", *(f"**{number}**" for number in sums)])
    return table(["bits compared", "comparisons", "equal"], rows) + note(*gpu.results)


def more_table(gpu: OnGPU) -> str:
    """What else was run there."""
    sanitizer = gpu.more["compute-sanitizer"]
    found = {
        f"compute-sanitizer, over `{sanitizer['over'].replace(', ', '`, ')}": ", ".join(
            f"{what}: {number}" for what, number in sanitizer.items() if what != "over"
        ),
        "`pytest -m gpu`": gpu.more["pytest -m gpu"],
        "CuPy's arrays": gpu.more["cupy"],
        "torch's mixed precision": gpu.more["amp"],
    }
    return table(["also run", "found"], found.items()) + note(*gpu.results)


def _rows(gpu: OnGPU) -> str:
    sizes = gpu.times["machine"]["sizes"]
    return f"{compact(sizes['ids'])} sorted rows of {compact(sizes['rows'])} x {sizes['dim']}"
