# SPDX-License-Identifier: Apache-2.0
"""Batches for parameter servers, and tables in this process that take the same steps."""

import numpy as np
from table_saves import content

from nb_sparse_adam._src.parameter_server.routing import route
from nb_sparse_adam._src.parameter_server.shard import Shard
from nb_sparse_adam._src.parameter_server.spec import TableSpec, check_config

SPECS = {"user": TableSpec(8, lr=0.1, seed=3), "item": TableSpec(4, lr=0.1, step_counts="global")}


def config(tables=None, durability="log", consistency="async", workers=None, interval=1e6, timeout=60.0):
    tables = SPECS if tables is None else tables
    return check_config("test", tables, 1, durability, interval, consistency, workers, timeout, 0)


def batch(k, tables=None, n=60, of=200):
    """A batch is a function of its number: ids that repeat, and their gradients."""
    rng = np.random.default_rng(k)
    given = {}
    for name, spec in (SPECS if tables is None else tables).items():
        ids = rng.integers(-of, of, n)
        ids[:3] = rng.choice([0, -1, 2**63 - 1, -(2**63)], 3)
        given[name] = ids, rng.normal(size=(n, spec.dim)).astype(np.float32)
    return given


def payload(given, shards=1, shard=0):
    """What a client sends a shard of a batch."""
    made = {}
    for name, (ids, grads) in given.items():
        routed = route(np.asarray(ids, np.int64), shards)
        own = routed.of_shard(shard)
        made[name] = routed.ids[own], routed.times[own], routed.sum(grads)[0][own]
    return made


def step(tables, given):
    """Do in this process what a pull and a push of a batch do."""
    for name, (ids, grads) in given.items():
        tables[name].lookup(ids)
        tables[name].update(ids, grads)


def made(specs=None):
    return {name: spec.make(name, 1) for name, spec in (SPECS if specs is None else specs).items()}


def in_order_of_ids(table):
    """What is in a table, whatever the order in which ids have come."""
    ids, values = table.export()
    order = np.argsort(ids)
    state = table.state(ids[order])
    arrays = {"values": values[order], **{name: getattr(state, name) for name in state._fields}}
    return ids[order].tolist(), {name: array.tobytes() for name, array in arrays.items()}


def contents(tables):
    return {name: content(table) for name, table in tables.items()}


_SHARDS = {}  # that were opened last in a folder


def opened(folder, **options):
    """Open a shard, as if the process of the one that was opened there before had died."""
    gone(folder)
    _SHARDS[folder] = shard = Shard(folder, config(**options), 0)
    return shard


def gone(folder):
    """Have the shard hold its folder no more that was opened there."""
    before = _SHARDS.pop(folder, None)
    if before is not None:
        before.hold.let_go()
