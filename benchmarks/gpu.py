"""Check and time everything that runs on a GPU, in one command and within ten minutes; write one JSON file.

    python -m benchmarks.gpu                  # on a machine with a GPU; writes gpu.json
    python -m benchmarks.gpu --quick          # tiny tables: to see that it works, on numba's simulator, too

A section that fails says so in the file, and the others go on. The exit status is 0 if all went well and
every result was right, whether or not it was fast; 1 if not; 2 where there is no GPU.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time
import traceback

import numpy as np
from numba import config, cuda

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam.bench.cases import zipf_ids
from nb_sparse_adam.errors import GradientIndexError

SEED = 20260101
SIMULATED = bool(config.ENABLE_CUDASIM)
TRIES = 15


class Sizes:
    """How large everything is."""

    def __init__(self, quick):
        self.quick = quick
        self.rows, self.dim = (60, 8) if quick else (10_000_000, 64)
        self.unique, self.ids = (12, 20) if quick else (1_000_000, 1_000_000)
        self.bags, self.per_bag = (4, 3) if quick else (1 << 16, 20)
        self.copied = 1 << 10 if quick else 1 << 29  # elements
        self.tries = 2 if quick else TRIES


# --- time -----------------------------------------------------------------------------------------------


def on_gpu_ms(call, tries):
    """Milliseconds that the GPU takes for what a call launches: a median, after two that warm up."""
    for _ in range(2):
        call()
    cuda.synchronize()
    took = []
    for _ in range(tries):
        start, end = cuda.event(), cuda.event()
        start.record()
        call()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end))
    return abs(statistics.median(took))


def wall_ms(call, tries, in_flight=20):
    """Milliseconds a call takes where many follow each other, and the host waits for the last one."""
    call()
    cuda.synchronize()
    took = []
    for _ in range(max(tries // 3, 1)):
        start = time.perf_counter()
        for _ in range(in_flight if tries > 2 else 1):
            call()
        cuda.synchronize()
        took.append((time.perf_counter() - start) * 1e3 / (in_flight if tries > 2 else 1))
    return statistics.median(took)


def zeros(shape, dtype=np.float32):
    """Return a device array of zeros; nothing of that size is made on the host."""
    array = cuda.device_array(int(np.prod(shape)), dtype)
    size = 1 << 24
    nothing = cuda.to_device(np.zeros(min(size, array.shape[0]), dtype))
    for first in range(0, array.shape[0], size):
        piece = array[first : first + size]
        piece.copy_to_device(nothing[: piece.shape[0]])
    return array.reshape(*shape)


# --- sections -------------------------------------------------------------------------------------------


def machine(sizes, report):
    """Say what it runs on."""
    found = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    found |= {"platform": platform.platform(), "python": platform.python_version(), "quick": sizes.quick}
    for package in ("nb_sparse_adam", "numba", "numba-cuda", "numpy", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if SIMULATED:
        return found | {"gpu": "simulator", "times": "mean nothing here"}
    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    free, total = cuda.current_context().get_memory_info()
    return found | {
        "gpu": name,
        "compute_capability": ".".join(map(str, device.compute_capability)),
        "processors": device.MULTIPROCESSOR_COUNT,
        "memory_gb": total / 1e9,
        "free_memory_gb": free / 1e9,
        "cuda_runtime": ".".join(map(str, cuda.runtime.get_version())),
    }


def gradients(rng, rows, dim, dtype, n):
    """One of each form, on the host."""
    values = rng.normal(size=(n, dim)).astype(dtype)
    ids = rng.integers(0, rows, n)
    hot = np.where(rng.random(n) < 0.5, 1, ids)
    cuts = np.sort(rng.integers(0, n + 1, 9))
    offsets = np.concatenate([[0], cuts, [n]])
    weights = rng.normal(size=n).astype(dtype)
    counts = rng.integers(0, 3, rows)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    columns = rng.integers(0, dim, indptr[-1])
    data = rng.normal(size=indptr[-1]).astype(dtype)
    bags = len(offsets) - 1
    return {
        "sorted rows": (RowGradient, np.sort(rng.choice(rows, min(n, rows) // 2, replace=False)), None),
        "rows": (RowGradient, ids, values),
        "a hot row": (RowGradient, hot, values),
        "bags": (BagGradient, ids, offsets, values[:bags]),
        "means": (BagGradient, ids, offsets, values[:bags], None, "mean"),
        "weighted bags": (BagGradient, ids, offsets, values[:bags], weights),
        "csr": (CSRGradient, indptr, columns, data),
    }, values


def made(form, values):
    """Two gradients of the same content: on the host, and on the GPU."""
    kind, *arrays = form
    if kind is RowGradient and arrays[1] is None:
        arrays[1] = values[: len(arrays[0])]
    there = [cuda.to_device(array) if isinstance(array, np.ndarray) else array for array in arrays]
    return kind(*arrays), kind(*there)


def state_of(optimizer, table):
    """Parameters, moments and counts, on the host."""
    state = optimizer.state_dict()["tables"]["table"]
    param = table if isinstance(table, np.ndarray) else table.copy_to_host()
    return [param, state["exp_avg"], state["exp_avg_sq"], state["steps"]]


def checks(sizes, report):
    """Hold the GPU's bits to those of the CPU."""
    rng = np.random.default_rng(SEED)
    cases = [("element", np.float32, 5), ("row", np.float64, 8), ("global", np.float32, 8)]
    rows, n = 40, 30
    if not sizes.quick:
        cases = list(itertools.product(("element", "row", "global"), (np.float32, np.float64), (5, 64)))
        rows, n = 3000, 20_000
    found = {"equal": 0, "unequal": []}
    for step_counts, dtype, dim in cases:
        forms, values = gradients(rng, rows, dim, dtype, n)
        for name, form in forms.items():
            _compare(found, (name, step_counts, np.dtype(dtype).name, dim), form, values, rows, dim, dtype)
    if not sizes.quick:
        forms, values = gradients(rng, 200_000, 64, np.float32, 1_000_000)
        for name in ("rows", "a hot row", "bags"):
            _compare(found, (name, "row", "large"), forms[name], values, 200_000, 64, np.float32)
    found["run_to_run"] = _is_the_same_again(rows, n)
    found["refused"] = _is_refused()
    found["right"] = not found["unequal"] and found["run_to_run"] and found["refused"]
    return found


def _compare(found, name, form, values, rows, dim, dtype):
    step_counts = name[1]
    start = np.random.default_rng(1).normal(size=(rows, dim)).astype(dtype)
    here, there = start.copy(), cuda.to_device(start)
    on_cpu = SparseAdam(here, lr=0.1, step_counts=step_counts)
    on_gpu = SparseAdam(there, lr=0.1, step_counts=step_counts)
    for _ in range(1 if SIMULATED else 3):
        one, other = made(form, values)
        on_cpu.step(one)
        on_gpu.step(other)
    pairs = list(zip(state_of(on_cpu, here), state_of(on_gpu, there), strict=True))
    if all(a.tobytes() == b.tobytes() for a, b in pairs):
        found["equal"] += 1
    else:
        worst = max(float(np.max(np.abs(a.astype(float) - b), initial=0)) for a, b in pairs)
        found["unequal"].append({"case": list(map(str, name)), "largest_difference": worst})


def _is_the_same_again(rows, n):
    rng = np.random.default_rng(SEED)
    forms, values = gradients(rng, rows, 8, np.float32, n)
    results = []
    for stream in (None, None if SIMULATED else cuda.stream()):
        table = zeros((rows, 8))
        optimizer = SparseAdam(table, lr=0.1, step_counts="row")
        optimizer.step(made(forms["rows"], values)[1], stream=stream)
        optimizer.step(made(forms["bags"], values)[1], stream=stream)
        results.append([array.tobytes() for array in state_of(optimizer, table)])
    return results[0] == results[1]


def _is_refused():
    """Whether a wild id changes nothing, at once and deferred."""
    seen = []
    for device_checks in ("immediate", "deferred"):
        table = zeros((50, 8))
        optimizer = SparseAdam(table, step_counts="row", device_checks=device_checks)
        wild = RowGradient(cuda.to_device(np.array([3, 10**12])), cuda.to_device(np.ones((2, 8), np.float32)))
        try:
            optimizer.step(wild)
            optimizer.synchronize()
        except GradientIndexError:
            seen.append(not table.copy_to_host().any())
    return seen == [True, True]


def copy(sizes, report):
    """The bandwidth of a copy on the GPU, bytes read and bytes written."""
    a, b = zeros((sizes.copied,)), zeros((sizes.copied,))
    ms = on_gpu_ms(lambda: b.copy_to_device(a), sizes.tries)
    moved = 2 * a.nbytes
    return {"bytes": moved, "ms": ms, "gb_per_s": moved / ms / 1e6}


def _share(report, figures, target=None):
    known = report.get("copy", {}).get("gb_per_s")
    if known and not SIMULATED:
        figures["of_copy"] = figures["gb_per_s"] / known
        if target is not None:
            figures |= {"target_of_copy": target, "reached": figures["of_copy"] >= target}
    return figures


def sorted_rows(rng, sizes):
    """Sorted unique rows with their gradients, on the GPU."""
    rows = np.unique(rng.integers(0, sizes.rows, 2 * sizes.unique))
    rows = np.sort(rng.permutation(rows)[: sizes.unique])
    values = rng.normal(size=(len(rows), sizes.dim)).astype(np.float32)
    return cuda.to_device(rows), cuda.to_device(values)


def rows(sizes, report):
    """A step of sorted unique rows: its kernel, its parts, the whole."""
    from nb_sparse_adam.cuda import steps

    rng = np.random.default_rng(SEED)
    ids, values = sorted_rows(rng, sizes)
    found = {"rows": int(ids.shape[0]), "of": sizes.rows, "dim": sizes.dim}
    for step_counts in ("row", "global", "element"):
        optimizer = SparseAdam(
            zeros((sizes.rows, sizes.dim)),
            step_counts=step_counts,
            on_nonfinite="propagate",
            device_checks="off",
        )
        gradient = RowGradient(ids, values)
        optimizer.step(gradient)
        (part,) = optimizer._parts(gradient)
        (run,) = steps.prepare([part], waits=False)
        prepared = run.prepared

        def update(prepared=prepared):
            prepared.goal += 1  # a kernel does nothing for a step that has been done
            prepared.update()

        update_ms = on_gpu_ms(update, sizes.tries)
        parts = {}
        for stage in ("check", "group"):
            parts[f"{stage}_ms"] = on_gpu_ms(getattr(prepared, stage), sizes.tries)
        prepared.table.launched = prepared.goal
        elements = int(values.shape[0]) * sizes.dim
        counts = {"row": int(ids.shape[0]) * 8, "global": 0, "element": elements * 8}[step_counts]
        moved = (
            elements * 4 * 7 + int(ids.shape[0]) * 8 + counts
        )  # gradient; parameters, moments: read, written
        figures = {"update_ms": update_ms, **parts, "bytes": moved, "gb_per_s": moved / update_ms / 1e6}
        figures["step_ms"] = wall_ms(lambda o=optimizer, g=gradient: o.step(g), sizes.tries)
        found[step_counts] = _share(report, figures, target=0.85)
        del optimizer, part, run, prepared, update
    return found


def rows_in_torch(sizes, report):
    """The same gradient through torch's optimizer, and through ours in its place."""
    torch = _torch()
    if isinstance(torch, str):
        return {"left_out": torch}
    from nb_sparse_adam.torch import SparseAdam as DropIn

    rng = np.random.default_rng(SEED)
    ids, values = (torch.as_tensor(array, device="cuda") for array in sorted_rows(rng, sizes))
    found = {}
    for name, kind, options in (
        ("torch", torch.optim.SparseAdam, {}),
        ("drop_in", DropIn, {"device_checks": "deferred"}),
    ):
        weight = torch.nn.Parameter(torch.zeros(sizes.rows, sizes.dim, device="cuda"))
        optimizer = kind([weight], **options)

        def step(weight=weight, optimizer=optimizer):
            weight.grad = torch.sparse_coo_tensor(ids[None], values, weight.shape)
            optimizer.step()

        found[f"{name}_ms"] = wall_ms(step, sizes.tries)
        del weight, optimizer, step
        torch.cuda.empty_cache()
    ours = report["rows"]["global"]["step_ms"]
    found |= {"ours_ms": ours, "times_faster": found["torch_ms"] / ours, "target_times_faster": 5}
    return found | {"reached": found["times_faster"] >= 5}


def _torch():
    """Return torch, or why it is of no use here."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    return torch if torch.cuda.is_available() and not SIMULATED else "torch has no CUDA"


def bags(sizes, report):
    """Backward pass and update of pooled lookups, Zipf ids and uniform ones."""
    torch = _torch()
    rng = np.random.default_rng(SEED)
    n = sizes.bags * sizes.per_bag
    found = {"bags": sizes.bags, "ids_a_bag": sizes.per_bag, "of": sizes.rows, "dim": sizes.dim}
    for name in ("zipf", "uniform"):
        ids = zipf_ids(rng, n, sizes.rows) if name == "zipf" else rng.integers(0, sizes.rows, n)
        offsets = np.arange(sizes.bags + 1) * sizes.per_bag
        grad_output = rng.normal(size=(sizes.bags, sizes.dim)).astype(np.float32)
        gradient = BagGradient(*map(cuda.to_device, (ids, offsets, grad_output)))
        figures = {"distinct_rows": len(np.unique(ids))}
        for device_checks in ("deferred", "immediate"):
            optimizer = SparseAdam(
                zeros((sizes.rows, sizes.dim)), step_counts="global", device_checks=device_checks
            )
            call = lambda o=optimizer, g=gradient: o.step(g)  # noqa: E731
            figures[f"{device_checks}_ms"] = wall_ms(call, sizes.tries)
            del optimizer, call
        if isinstance(torch, str):
            figures["left_out"] = torch
        else:
            figures["torch_ms"] = _bags_in_torch(torch, sizes, ids, offsets, grad_output)
            figures["times_faster"] = figures["torch_ms"] / figures["deferred_ms"]
            if name == "zipf":
                figures |= {"target_times_faster": 8, "reached": figures["times_faster"] >= 8}
        found[name] = figures
    return found


def _bags_in_torch(torch, sizes, ids, offsets, grad_output):
    """Backward pass and step; the forward pass, timed by itself, is taken off."""
    layer = torch.nn.EmbeddingBag(sizes.rows, sizes.dim, mode="sum", sparse=True, device="cuda")
    optimizer = torch.optim.SparseAdam(layer.parameters())
    ids, offsets, grad = (torch.as_tensor(a, device="cuda") for a in (ids, offsets[:-1], grad_output))

    def forward():
        return layer(ids, offsets)

    def whole():
        optimizer.zero_grad()
        forward().backward(grad)
        optimizer.step()

    took = wall_ms(whole, sizes.tries) - wall_ms(forward, sizes.tries)
    torch.cuda.empty_cache()
    return took


def other_steps(sizes, report):
    """Unsorted rows, compressed rows, and small steps, with checks of every kind."""
    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, sizes.rows, sizes.ids)
    values = rng.normal(size=(sizes.ids, sizes.dim)).astype(np.float32)
    counts = np.zeros(sizes.rows, np.int64)
    np.add.at(counts, ids, 1)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    columns = rng.integers(0, sizes.dim, sizes.ids)
    forms = {
        "unsorted_rows": RowGradient(*map(cuda.to_device, (ids, values))),
        "csr": CSRGradient(*map(cuda.to_device, (indptr, columns, values[:, 0].copy()))),
        "small": RowGradient(*map(cuda.to_device, (ids[:32], values[:32].copy()))),
    }
    found = {}
    optimizer = SparseAdam(zeros((sizes.rows, sizes.dim)), step_counts="row", on_nonfinite="propagate")
    for name, gradient in forms.items():
        found[name] = {}
        for device_checks in ("immediate", "deferred", "off"):
            optimizer.device_checks = device_checks
            call = lambda g=gradient: optimizer.step(g)  # noqa: E731
            found[name][f"{device_checks}_ms"] = wall_ms(call, sizes.tries)
    start = time.perf_counter()
    for _ in range(sizes.tries):
        optimizer.step(forms["small"])
    found["small"]["host_ms"] = (time.perf_counter() - start) * 1e3 / sizes.tries
    cuda.synchronize()
    return found


SECTIONS = {
    "machine": machine,
    "checks": checks,
    "copy": copy,
    "rows": rows,
    "rows_in_torch": rows_in_torch,
    "bags": bags,
    "other_steps": other_steps,
}


def table(report, prefix=""):
    """Yield a line for every figure."""
    for key, value in report.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from table(value, f"{name} / ")
        else:
            yield f"{name:44} {value:.4g}" if isinstance(value, float) else f"{name:44} {value}"


def main(arguments=None):
    """Run all sections."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="gpu.json", metavar="FILE", help="the file to write")
    parser.add_argument("--quick", action="store_true", help="tiny tables: to see that it works")
    options = parser.parse_args(arguments)
    if not cuda.is_available():
        print(
            "benchmarks.gpu: there is no GPU here that CUDA can use; nothing was measured.", file=sys.stderr
        )
        return 2
    if SIMULATED and not options.quick:
        print("benchmarks.gpu: the simulator is too slow for this; pass --quick.", file=sys.stderr)
        return 2
    sizes, report, failed = Sizes(options.quick), {}, False
    for name, section in SECTIONS.items():
        start = time.perf_counter()
        try:
            report[name] = section(sizes, report)
        except Exception as error:  # noqa: BLE001 (whatever it is: the other sections go on)
            report[name] = {"error": repr(error), "traceback": traceback.format_exc()[-4000:]}
        failed |= "error" in report[name] or report[name].get("right") is False
        report[name]["took_s"] = time.perf_counter() - start
        with open(options.out, "w", encoding="utf-8") as file:  # a run that is killed leaves what it had
            json.dump(report, file, indent=1)
        print("\n".join(table({name: report[name]})), flush=True)
    print(f"written to {options.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
