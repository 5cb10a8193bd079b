# SPDX-License-Identifier: Apache-2.0
"""What a coordinator that starts again knows of the one before it."""

from threading import Thread

from servers import config

from nb_sparse_adam._src.parameter_server.coordinator import Coordinator, last_note


def test_a_decision_that_was_not_told_is_told_by_the_next_coordinator(tmp_path):
    """One worker may know of it: the others must learn the same, or they take it for given up."""
    options = config(consistency="sync", workers=2)
    first = Coordinator(tmp_path, options)
    clients = {rank: first.join(rank)["client"] for rank in range(2)}
    told = []
    one = Thread(target=lambda: told.append(first.arrive(0, clients[0], 1)))
    one.start()
    told.append(first.arrive(1, clients[1], 1))
    one.join()
    again = Coordinator(tmp_path, options)
    assert again.arrive(0, clients[0], 1)["parts"] == clients == told[0]["parts"]
    assert again.join(0)["step"] == 2
    noted = last_note(tmp_path)
    assert (noted.starts, noted.committed, dict(noted.parts)) == (2, 1, clients)
    assert clients[1] <= noted.highest < Coordinator(tmp_path, options).join(1)["client"]
