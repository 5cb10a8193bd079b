# SPDX-License-Identifier: Apache-2.0
"""Tables of ids that tests save, and what their checkpoints hold."""

import json

import numpy as np
from checks import bits
from hypothesis import strategies as st

from nb_sparse_adam import EmbeddingTable, checkpoint

DIM = 3
EDGES = [0, -1, 2**63 - 1, -(2**63)]

# What is done to a table, and to which ids, or how often: for `do`.
IDS = st.lists(st.sampled_from([*range(-9, 9), *EDGES]), min_size=1, max_size=8)
CHANGES = (
    st.tuples(st.just("lookup"), IDS),
    st.tuples(st.just("update"), IDS),
    st.tuples(st.just("load"), st.lists(st.integers(-9, 9), min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("evict"), st.integers(0, 6)),
    st.tuples(st.just("let go of"), st.integers(0, 3)),
)


def make(**options):
    return EmbeddingTable(DIM, **{"lr": 0.1, "seed": 5, "num_threads": 1, **options})


def step(table, k):
    """A batch is a function of its number."""
    rng = np.random.default_rng(k)
    ids = rng.integers(-15, 15, 12)
    ids[:2] = rng.choice(EDGES, 2)
    table.lookup(ids)
    table.update(ids, rng.normal(size=(12, DIM)).astype(np.float32))


def trained(steps=4, **options):
    table = make(**options)
    for k in range(steps):
        step(table, k)
    return table


def do(table, operation, given):
    """Do one of `CHANGES`."""
    if operation == "lookup":
        table.lookup(given)
    elif operation == "update":
        grads = np.random.default_rng(given[0] % 2**32).normal(size=(len(given), DIM))
        if table.on_nonfinite == "skip":
            grads[0, 0] = np.nan
        table.update(given, grads)
    elif operation == "load":
        table.load(given, np.full((len(given), DIM), given[0], np.float32))
    elif operation == "evict":
        table.evict(down_to=given)
    else:
        table.evict(older_than_steps=given, seen_fewer_than=3)


def content(table):
    """Everything that training goes on with, but for times of the day."""
    ids, values = table.export()
    state = table.state(ids)
    options = {name: getattr(table, name) for name in ("lr", "betas", "eps", "eps_hat", "maximize")}
    return {
        "ids": ids.tolist(),
        "values": bits(values).tolist(),
        **{name: bits(getattr(state, name)).tolist() for name in state._fields},
        "dtypes": [values.dtype, state.steps.dtype],
        "unknown": bits(table.lookup([10**12, 10**13], train=False)).tolist(),
        **{key: value for key, value in table.stats().items() if key[:6] != "bytes_"},
        **options,
        "more": (table.name, table.capacity, table.step_counts, table.on_nonfinite, repr(table)),
        "counters": table._admission.counters.tolist(),
        "draws": table._admission.draws,
    }


def files_in(folder):
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def without_names(folder):
    """A manifest, but for what is drawn for each save."""
    manifest = manifest_of(folder)
    del manifest["id"], manifest["sha256"]
    for record in manifest["tables"]:
        del record["file"]
    return manifest


def chain_in(tmp_path):
    """A full save and three increments."""
    table = trained()
    folders = [tmp_path / name for name in ("full", "first", "second", "third")]
    for k, folder in enumerate(folders):
        step(table, 10 + k)
        table.evict(down_to=10)
        checkpoint.save(folder, table, base=folders[k - 1] if k else None)
    return table, folders
