# SPDX-License-Identifier: Apache-2.0
"""A server of 2 shards, whose processes have been killed, goes on as one of 3; with Ray."""

import numpy as np
import pytest
from needs import need
from servers import SPECS, batch

from nb_sparse_adam import parameter_server
from nb_sparse_adam._src.parameter_server import holding
from nb_sparse_adam.errors import LogError, ServerError

ray = need("ray")

pytestmark = [pytest.mark.jit, pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        num_cpus=2, namespace="nb_sparse_adam", include_dashboard=False, log_to_driver=False,
        object_store_memory=100 << 20,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def pull(client, rows):
    return client.pull({name: ids for name, (ids, _) in rows.items()}, train=False)


def test_two_shards_go_on_as_three(tmp_path, monkeypatch):
    server = parameter_server.ParameterServer.create(
        "two", SPECS, checkpoint_dir=tmp_path / "two", shards=2, durability="log"
    )
    client = server.client()
    for k in range(1, 4):
        client.push(batch(k))
    rows = {name: server.export(name) for name in SPECS}
    monkeypatch.setattr(holding, "PATIENCE", 0.1)
    with pytest.raises(LogError, match="is held by another process"):
        server.restore("three", tmp_path / "two", checkpoint_dir=tmp_path / "three", shards=3)
    with pytest.raises(ServerError, match="there is a server 'two' already"):
        server.restore("two", tmp_path / "two", checkpoint_dir=tmp_path / "three", shards=3)
    monkeypatch.undo()
    for handle in (*server._shards, server._coordinator):
        ray.kill(handle)  # no snapshot: all is in the log
    three = server.restore("three", tmp_path / "two", checkpoint_dir=tmp_path / "three", shards=3)
    assert [each["shard"] for each in three.stats()["shards"]] == [0, 1, 2]
    assert "durability='log'" in repr(three)
    for name, (ids, values) in rows.items():
        found = three.export(name)
        assert found[0].tolist() == ids.tolist()
        assert found[1].tobytes() == values.tobytes()
    again = three.client()
    assert again.incarnation > client.incarnation
    again.push(batch(4))
    vectors = pull(again, rows)
    assert all((vectors[name] != values).any() for name, (_, values) in rows.items())
    assert np.isfinite(vectors["user"]).all()
    three.shutdown()
