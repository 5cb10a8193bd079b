# SPDX-License-Identifier: Apache-2.0
"""`RemoteEmbeddingBag` over a parameter server in processes of its own."""

import numpy as np
import pytest
from needs import need

torch = need("torch")
ray = need("ray")

from remote_layers import SPECS, in_order_of_ids, layer_of, twin_of  # noqa: E402

from nb_sparse_adam.parameter_server import ParameterServer  # noqa: E402

pytestmark = [
    pytest.mark.jit,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning"),  # Ray's own
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    made = None
    try:
        made = ParameterServer.create(
            "layers", SPECS, shards=2, checkpoint_dir=tmp_path_factory.mktemp("server"), cpus_per_shard=0.5
        )
        yield made
    finally:
        if made is not None:
            made.shutdown()
        ray.shutdown()


def test_training_has_the_bits_of_tables_here(server):
    client = server.client()
    layers = [layer_of(client, mode="mean", background=True), layer_of(client, "item", background=True)]
    twins, rng = [twin_of(layer) for layer in layers], np.random.default_rng(1)
    batches = [torch.from_numpy(rng.integers(0, 40, (16, 3))) for _ in range(6)]
    for step, ids in enumerate(batches):
        for pair in (layers, twins):
            outs = [layer(ids + k) for k, layer in enumerate(pair)]
            sum(out.sin().sum() for out in outs).backward()
        if step % 2:
            for k, layer in enumerate(layers):
                layer.wait()
                layer.prefetch(batches[(step + 1) % 6] + k)
    for layer, twin in zip(layers, twins, strict=True):
        layer.wait()
        ids, rows = in_order_of_ids(twin.table)
        found = client.pull({layer.table_name: np.asarray(ids)}, train=False)[layer.table_name]
        assert found.tobytes() == rows[0]
        assert layer.stats() == {"pulls": 4, "prefetched": 2, "unused": 0, "failed": 0}
        assert torch.equal(layer.eval()(batches[0]), twin.eval()(batches[0]))
    assert [each["pushes"] for each in server.stats()["shards"]] == [6, 6]
