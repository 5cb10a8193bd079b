# SPDX-License-Identifier: Apache-2.0
"""Steps of tables that a parameter server has: one push for all tables of a client, maybe in the background.

There is one push in the background of a client at a time. Who waits for it first is told its error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from nb_sparse_adam._src.torch.lookups import Lookup, rows_of


class Push(threading.Thread):
    """What is pushed by a client.

    No daemon: a process that ends waits for its last push.
    """

    def __init__(self, client: Any, tables: Mapping[str, list[Lookup]], in_background: bool) -> None:
        super().__init__(name="push to a parameter server")
        self.client, self.error = client, None
        found = {name: rows_of(lookups, copy=in_background) for name, lookups in tables.items()}
        self._gradients = {name: tuple(each.numpy() for each in rows) for name, rows in found.items()}

    error: BaseException | None

    def push(self) -> None:
        """Push in this thread."""
        self.client.push(self._gradients)

    def run(self) -> None:
        """Push in the background."""
        try:
            self.push()
        except BaseException as error:  # noqa: BLE001 (raised by `wait`)
            self.error = error
        self.client, self._gradients = None, {}


_going_on: weakref.WeakKeyDictionary[Any, Push] = weakref.WeakKeyDictionary()


def push(lookups: Mapping[Any, list[Lookup]]) -> list[Push]:
    """Push what layers have met of their tables; return what is to be pushed in the background.

    A push is in the background if all its layers want it.
    """
    of_clients: dict[Any, dict[Any, list[Lookup]]] = {}
    for layer, found in lookups.items():
        of_clients.setdefault(layer._client, {})[layer] = found
    later: list[Push] = []
    now: list[Push] = []
    for client, layers in of_clients.items():
        wait(client)
        tables: dict[str, list[Lookup]] = {}
        for layer, found in layers.items():
            tables.setdefault(layer.table_name, []).extend(found)
        in_background = all(layer.background for layer in layers)
        (later if in_background else now).append(Push(client, tables, in_background))
    for each in now:
        each.push()
    return later


def begin(pushes: Iterable[Push]) -> None:
    """Begin pushes in the background."""
    for each in pushes:
        client = each.client
        _going_on[client] = each
        try:
            each.start()
        except RuntimeError:  # there can be no more threads
            del _going_on[client]
            raise


def wait(client: Any) -> None:
    """Wait for the push of a client that is going on in the background, and raise its error."""
    found = _going_on.get(client)
    if found is None:
        return
    found.join()
    if _going_on.pop(client, None) is found and found.error is not None:
        raise found.error
