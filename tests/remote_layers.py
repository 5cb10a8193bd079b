# SPDX-License-Identifier: Apache-2.0
"""A client of no server, whose tables are in this process; and layers that it is given to."""

import threading

import numpy as np
from needs import need

from nb_sparse_adam._src.parameter_server.client import Client
from nb_sparse_adam._src.parameter_server.routing import route
from nb_sparse_adam._src.parameter_server.spec import TableSpec

torch = need("torch")

from nb_sparse_adam.torch import DynamicEmbeddingBag, RemoteEmbeddingBag  # noqa: E402

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "seed": 3}
SPECS = {"user": TableSpec(4, **OPTIONS), "item": TableSpec(3, **OPTIONS)}


class LocalClient:
    """The part of a `Client` that layers use.

    ``may_answer`` and ``may_push`` hold pulls and pushes up until they are set. ``calls`` is what was done,
    in that order.
    """

    server = "local"

    def __init__(self, tables=None):
        self.tables = dict(SPECS if tables is None else tables)
        self.here = {name: spec.make(name) for name, spec in self.tables.items()}
        self.calls, self.pushed = [], []
        self.may_answer, self.may_push = threading.Event(), threading.Event()
        self.may_answer.set()
        self.may_push.set()
        self.error = None

    def __reduce__(self):
        return LocalClient, (self.tables,)

    def pull(self, ids, train=True):
        return self.begin_pull(ids, train).result()

    def begin_pull(self, ids, train=True):
        self.calls.append(("begin_pull", *ids))
        return Pulling(self, {name: self.here[name]._peek(each, train) for name, each in ids.items()})

    def push(self, gradients):
        self.calls.append(("push", *gradients))
        assert self.may_push.wait(20)
        if self.error is not None:
            raise self.error
        self.pushed.append({name: (ids.copy(), grads.copy()) for name, (ids, grads) in gradients.items()})
        for name, (ids, grads) in gradients.items():
            routed = route(np.asarray(ids), 1)
            self.here[name].lookup(np.asarray(ids))
            self.here[name].update(routed.ids, routed.sum(np.asarray(grads))[0])
        self.calls.append(("pushed", *gradients))


class Pulling:
    """What was there when the pull was begun."""

    def __init__(self, client, found):
        self._client, self._found = client, found

    def result(self):
        assert self._client.may_answer.wait(20)
        self._client.calls.append(("result", *self._found))
        return self._found


def layer_of(client, table="user", **options):
    return RemoteEmbeddingBag(client, table, **{"mode": "sum", **options})


def twin_of(layer):
    """The same layer, over a table of its own."""
    spec = layer.client.tables[layer.table_name]
    return DynamicEmbeddingBag.from_table(
        spec.make("twin"), mode=layer.mode, include_last_offset=layer.include_last_offset
    )


def in_order_of_ids(table):
    ids = np.sort(table.ids())
    state = table.state(ids)
    arrays = (table.lookup(ids, train=False), *(getattr(state, name) for name in state._fields))
    return ids.tolist(), [np.ascontiguousarray(array).tobytes() for array in arrays]


assert all(hasattr(Client, name) for name in ("server", "tables", "pull", "begin_pull", "push"))
