# SPDX-License-Identifier: Apache-2.0
"""Write what pages show of the results in measured/: tables between marks, and pictures.

    python -m benchmarks.pages [--check]

A page says where a table goes, and everything between the marks is replaced:

    <!-- measured: others -->
    <!-- end -->

Run it after a result in measured/ was replaced. With ``--check`` nothing is written, and the exit status is 1
if a page or a picture is not what the results say. Pictures need matplotlib: ``pip install -e ".[bench]"``.

The folder has no ``__init__.py``: asv imports all modules of ``benchmarks`` with the package of whatever
commit it measures, which may lack what these need.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import largest_table
from benchmarks.pages import gpu_tables, recommender_tables, server_tables, speed, tables
from benchmarks.pages.gpu_tables import OnGPU
from benchmarks.pages.tables import Machine
from nb_sparse_adam._src.bench import chart, curves

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "measured"
PAGES = (
    "README.md", "docs/performance.md", "docs/gpu.md", "docs/parameter-server.md", "docs/recommender.md",
    "benchmarks/measured/README.md",
)  # fmt: skip

EPYC, XEON = "epyc-2core", "cpu-xeon-emeraldrapids-2core"
RECOMMENDERS = "recommender-epyc-2core"
LARGEST_TABLE = "largest-table-xeon-2core"
SERVER = "parameter-server-xeon-2core"
PROCESSORS = {
    EPYC: ("AMD EPYC (Zen 4)", "EPYC"),
    XEON: ("Intel Xeon (Emerald Rapids)", "Xeon"),
}
_MARKED = re.compile(r"(<!-- measured: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


@functools.cache
def load(name: str) -> dict[str, Any]:
    """Read a result."""
    result: dict[str, Any] = json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))
    return result


def machines() -> list[Machine]:
    """Return the processors that `nb-sparse-adam bench` was run on."""
    return [Machine(*names, load(name)) for name, names in PROCESSORS.items()]


def on_gpu() -> OnGPU:
    """Return what was found on a GPU."""
    return OnGPU(*(load(f"gpu-h200-{what}") for what in ("checks", "times", "more")))


def _claim(all_machines: list[Machine]) -> str:
    """The picture of the README; and in words what it shows, and the other processor."""
    shown = [speed.bars(machine.result) for machine in all_machines]
    each = "; ".join(
        f"{speed.span(bars)} times faster on two cores of an {machine.name}, {tables.when(machine.result)}"
        for bars, machine in zip(shown, all_machines, strict=True)
    )
    return (
        f"![Sparse Adam on a CPU: {speed.claim(shown[0])}](benchmarks/measured/speed.png)\n\n"
        f"A step on a large batch, in PyTorch's place: {each}.\n"
    )


_OF_MACHINES: dict[str, Callable[[list[Machine]], str]] = {
    "claim": _claim,
    "machines": tables.machines_table,
    "others": tables.others_table,
    "in torch": tables.in_torch_table,
    "limits": tables.limits_table,
    "small steps": tables.section_table("Small steps"),
    "growing": tables.section_table("As things grow"),
    "starting": tables.section_table("Starting"),
    "missed": tables.missed_table,
}
_OF_GPU: dict[str, Callable[[OnGPU], str]] = {
    "gpu machine": gpu_tables.machine_table,
    "gpu updates": gpu_tables.updates_table,
    "gpu torch": gpu_tables.torch_table,
    "gpu host": gpu_tables.host_table,
    "gpu checks": gpu_tables.checks_table,
    "gpu more": gpu_tables.more_table,
}


def content(name: str) -> str:
    """Write what goes between the marks of a name.

    Raises
    ------
    ValueError
        If there is no such table.
    """
    if name in _OF_MACHINES:
        return _OF_MACHINES[name](machines())
    if name in _OF_GPU:
        return _OF_GPU[name](on_gpu())
    if name in server_tables.TABLES:
        return server_tables.TABLES[name](load(SERVER))
    if name == "files":
        return files()
    if name == "recommenders":
        return recommenders()
    known = ", ".join([*_OF_MACHINES, *_OF_GPU, *server_tables.TABLES, "files", "recommenders"])
    raise ValueError(f"a page asks for measured: {name}, expected one of {known}")


def is_measured(name: str) -> bool:
    """Say whether there is a result of a name."""
    return (MEASURED / f"{name}.json").exists()


def recommenders() -> str:
    """Write who was trained beside whom, with the curves."""
    if not is_measured(RECOMMENDERS):
        return "Not measured yet: `bench` has had this line only since.\n"
    return recommender_tables.page(load(RECOMMENDERS))


def files() -> str:
    """List the results: machine, date and commit of each."""
    rows = []
    for path in sorted(MEASURED.glob("*.json")):
        result = load(path.stem)
        machine = result.get("machine", {})
        date = result.get("date") or machine["date"]
        on = result.get("gpu") or machine.get("gpu") or machine["processor"]
        rows.append([f"[{path.name}]({path.name})", on, date[:10], tables.at(result)])
    return tables.table(["file", "measured on", "date", "commit"], rows) + tables.note(
        *(load(path.stem) for path in MEASURED.glob("*.json"))
    )


def rendered(text: str) -> str:
    """Return a page with what its marks ask for."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{content(match[2])}\n{match[3]}", text)


PICTURES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "speed.png": (EPYC, lambda result: speed.draw(result, f"2 cores of an {PROCESSORS[EPYC][0]}")),
    **{f"{name}.png": (name, chart.draw) for name in PROCESSORS},
    "largest-table.png": (LARGEST_TABLE, largest_table.draw),
    **({recommender_tables.PICTURE: (RECOMMENDERS, curves.draw)} if is_measured(RECOMMENDERS) else {}),
}
"""Name of a picture in measured/ -> the result that it shows, and who draws it."""


def is_current(picture: Path, name: str) -> bool:
    """Say whether a picture was drawn from the result as it is now: it holds its checksum."""
    return picture.exists() and chart.checksum(load(name)).encode() in picture.read_bytes()


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what would change")
    check = parser.parse_args(argv).check
    changed = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if rendered(text) != text:
            changed.append(page)
            if not check:
                path.write_text(rendered(text), encoding="utf-8")
    for picture, (name, draw) in PICTURES.items():
        path = MEASURED / picture
        if check and is_current(path, name):
            continue
        if not check:
            path.write_bytes(chart.png(draw(load(name)), load(name)))
        changed.append(str(path.relative_to(ROOT)))
    for path_written in changed:
        print(f"{'differs' if check else 'written'}: {path_written}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
