# SPDX-License-Identifier: Apache-2.0
"""`RemoteEmbeddingBag` over tables in this process: bits, when it pushes, prefetched vectors, refusals."""

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")

from remote_layers import LocalClient, in_order_of_ids, layer_of, twin_of  # noqa: E402

from nb_sparse_adam.torch import DynamicEmbedding, RemoteEmbeddingBag, accumulate  # noqa: E402

IDS = torch.tensor([[1, 2], [2, 2**62]])
OTHERS = torch.tensor([[5, 1], [7, 7]])


def assert_same(layer, twin):
    assert in_order_of_ids(layer.client.here[layer.table_name]) == in_order_of_ids(twin.table)


def value(layer, ids=IDS):
    return layer.client.here[layer.table_name].lookup(ids.numpy().reshape(-1), train=False)


def steps(client):
    return sum(call[0] == "pushed" for call in client.calls)


# --- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted", "trained weights"])
def test_the_bits_of_a_dynamic_embedding_bag(mode, last):
    weighted = "weight" in mode
    layer = layer_of(LocalClient(), mode="sum" if weighted else mode, include_last_offset=last)
    twin, rng = twin_of(layer), np.random.default_rng(2)
    for step in range(6):
        n = 24
        ids, offsets = torch.from_numpy(rng.integers(0, 12, n)), None
        if step % 2:
            ids = ids.reshape(8, 3)
        else:
            offsets = torch.from_numpy(np.sort(np.append(rng.integers(0, n, 7), [0, n])))
            offsets = offsets if last else offsets[:-1]
        heads = torch.from_numpy(rng.normal(size=(8, 4))).float()
        outs, grads = [], []
        for each in (layer, twin):
            weights = torch.linspace(-1, 2, n).reshape(ids.shape) if weighted else None
            if mode == "trained weights":
                weights.requires_grad_()
            out = each(ids, offsets, weights)
            (out.sin() * heads).sum().backward()
            outs.append(out)
            grads.append(weights.grad if mode == "trained weights" else torch.zeros(1))
        assert torch.equal(*outs)
        assert torch.equal(*grads)
    assert_same(layer, twin)


def test_an_id_that_is_there_very_often_and_a_wide_table():
    client = LocalClient()
    client.tables["user"] = type(client.tables["user"])(4, dtype=np.float64, lr=0.1)
    client.here["user"] = client.tables["user"].make("user")
    layer = layer_of(client, mode="mean")
    twin = twin_of(layer)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (300, 5)))
    for each in (layer, twin):
        out = each(ids)
        assert out.dtype == torch.float64
        out.square().sum().backward()
    assert_same(layer, twin)


def test_a_layer_that_is_used_twice_in_a_pass_makes_one_push_with_the_sum():
    layer = layer_of(LocalClient())
    twin = twin_of(layer)
    for each in (layer, twin):
        (each(IDS).sum() + (each(OTHERS) * 2).sum()).backward()
    assert steps(layer.client) == 1
    assert_same(layer, twin)
    ((ids, grads),) = layer.client.pushed[0].values()
    assert sorted(ids.tolist()) == sorted([*IDS.reshape(-1).tolist(), *OTHERS.reshape(-1).tolist()])
    assert grads.shape == (8, 4)


def test_layers_of_one_client_push_together_and_those_of_another_by_themselves():
    client, other = LocalClient(), LocalClient()
    user, item, mean = layer_of(client), layer_of(client, "item"), layer_of(client, mode="mean")
    far = layer_of(other)
    (user(IDS).sum() + item(OTHERS).sum() + mean(OTHERS).sum() + far(IDS).sum()).backward()
    assert [call[1:] for call in client.calls if call[0] == "push"] in (
        [("user", "item")],
        [("item", "user")],
    )
    assert len(client.pushed[0]["user"][0]) == 8
    assert steps(other) == 1


# --- when it pushes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no_grad", "eval", "frozen"])
def test_nothing_is_pushed_without_training(how):
    layer = layer_of(LocalClient())
    model = torch.nn.Sequential(layer)
    ids = torch.tensor([[1, 2]])
    model(ids).sum().backward()
    if how == "no_grad":
        with torch.no_grad():
            out = model(torch.tensor([[1, 99]]))
    else:
        model.eval() if how == "eval" else model.requires_grad_(False)
        out = model(torch.tensor([[1, 99]]))
    assert not out.requires_grad
    assert torch.equal(out[0], torch.from_numpy(value(layer, torch.tensor([1])))[0])  # 99 gives zeros
    assert steps(layer.client) == 1


def test_only_what_a_pass_asks_for():
    layer, other = layer_of(LocalClient()), torch.ones(4, requires_grad=True)
    loss = (layer(IDS) * other).sum()
    torch.autograd.grad(loss, [other], retain_graph=True)
    assert steps(layer.client) == 0
    loss.backward(retain_graph=True)
    loss.backward()
    assert steps(layer.client) == 2
    with pytest.raises(errors.GradientError, match="was asked for, and is never made"):
        torch.autograd.grad(layer(IDS).sum(), [layer.weight])
    with pytest.raises(errors.GradientError, match="create_graph=True"):
        layer(IDS).square().sum().backward(create_graph=True)
    assert steps(layer.client) == 2


def test_accumulate_and_a_grad_scaler():
    layer = layer_of(LocalClient())
    twin, ids = twin_of(layer), torch.zeros(2, 2, dtype=torch.long)
    for each in (layer, twin):
        with accumulate(torch.nn.Sequential(each)):
            for k in range(3):
                ids.copy_(OTHERS + k)  # a buffer that is used again
                each(ids).sum().backward()
    assert steps(layer.client) == 1
    assert_same(layer, twin)
    scaler = layer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(layer(IDS).sum()).backward()
    twin(IDS).sum().backward()
    assert_same(layer, twin)
    scaler.scale(layer(IDS).sum() * float("inf")).backward()
    assert steps(layer.client) == 2
    layer.grad_scaler = None
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(errors.OptionError, match="grad_scaler"):
        layer(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(IDS).sum().backward()
    assert steps(layer.client) == 3


def test_a_push_that_is_refused_fails_the_pass_and_tables_here_take_no_step():
    client = LocalClient()
    layer, here = layer_of(client), DynamicEmbedding(4)
    client.error = errors.ServerTimeout("no answer")
    with pytest.raises(errors.ServerTimeout, match="no answer"):
        (layer(IDS).sum() + here(IDS).sum()).backward()
    assert here.table.stats()["steps"] == 0
    client.error = None
    (layer(IDS).sum() + here(IDS).sum()).backward()
    assert here.table.stats()["steps"] == steps(client) == 1
    with pytest.raises(errors.NonFiniteGradientError):
        (layer(IDS).sum() * float("nan")).backward()


# --- in the background ------------------------------------------------------------------------------------


def test_a_push_in_the_background_is_waited_for_by_the_next_lookup():
    client = LocalClient()
    layers = [layer_of(client, background=True), layer_of(client, "item", background=True)]
    twin, grad = twin_of(layers[0]), torch.ones(2, 4)
    ids = IDS.clone()
    client.may_push.clear()
    torch.autograd.backward([layers[0](ids), layers[1](OTHERS).sum()], [grad, None])
    assert steps(client) == 0
    grad.fill_(7)  # nobody else's any more
    ids.fill_(3)
    client.may_push.set()
    layers[1](OTHERS)
    assert [call[0] for call in client.calls[-3:]] == ["pushed", "begin_pull", "result"]
    twin(IDS).sum().backward()
    assert_same(layers[0], twin)


def test_an_error_in_the_background_is_raised_once_and_the_next_push_waits():
    client = LocalClient()
    layer = layer_of(client, background=True)
    loss = layer(IDS).sum()
    client.error = errors.StepTimeout("late")
    loss.backward(retain_graph=True)
    with pytest.raises(errors.StepTimeout, match="late"):
        layer.wait()
    layer.wait()
    loss.backward(retain_graph=True)
    with pytest.raises(errors.StepTimeout, match="late"):
        layer(IDS)
    loss.backward(retain_graph=True)
    with pytest.raises(errors.StepTimeout, match="late"):
        loss.backward(retain_graph=True)
    client.error = None
    client.may_push.clear()
    loss.backward(retain_graph=True)
    client.may_push.set()
    loss.backward()
    layer.wait()
    assert [call[0] for call in client.calls[-4:]] == ["push", "pushed"] * 2


def test_a_push_in_the_background_comes_after_the_steps_here():
    client = LocalClient()
    layer, here = layer_of(client, background=True), DynamicEmbedding(4)
    with pytest.raises(errors.NonFiniteGradientError, match="grad_output"):
        (layer(IDS).sum() + here(IDS).sum() * float("nan")).backward()
    layer.wait()
    assert not client.pushed
    (layer(IDS).sum() + layer_of(client, "item")(IDS).sum()).backward()  # one does not want it
    assert steps(client) == 1


# --- prefetched -------------------------------------------------------------------------------------------


def test_a_prefetch_is_begun_before_the_work_it_overlaps_with_and_waits_for_nothing():
    client = LocalClient()
    layer = layer_of(client)
    loss = layer(IDS).sum()
    client.may_answer.clear()  # the network takes its time
    client.calls.clear()
    layer.prefetch(OTHERS)
    loss.backward()
    client.calls.append(("work",))
    client.may_answer.set()
    layer(OTHERS)
    assert [call[0] for call in client.calls] == ["begin_pull", "push", "pushed", "work", "result"]
    assert layer.stats() == {"pulls": 1, "prefetched": 1, "unused": 0, "failed": 0}


def test_a_prefetched_vector_lacks_the_pushes_since():
    layer, fresh = layer_of(LocalClient()), layer_of(LocalClient())
    for each in (layer, fresh):
        loss = each(IDS).sum()
        before = each(IDS).detach()
        if each is layer:
            each.prefetch(IDS)
        loss.backward()
    assert torch.equal(layer(IDS), before)
    assert not torch.equal(fresh(IDS), before)
    assert torch.equal(layer(IDS), fresh(IDS))  # a prefetch is used once
    layer(IDS).sum().backward()
    layer.prefetch(IDS)
    fresh(IDS).sum().backward()
    assert torch.equal(layer(IDS), fresh(IDS))


def test_lookups_that_do_not_come_as_prefetched():
    layer = layer_of(LocalClient())
    buffer = IDS.clone()
    layer.prefetch(buffer)
    buffer.fill_(0)
    layer.prefetch(OTHERS.reshape(-1))
    layer(OTHERS)
    assert layer.stats() == {"pulls": 0, "prefetched": 1, "unused": 1, "failed": 0}
    layer.prefetch(IDS)
    with torch.no_grad():
        layer.prefetch(OTHERS)
        layer(OTHERS)
    layer(IDS)  # an evaluation between the two does not matter
    assert layer.stats() == {"pulls": 0, "prefetched": 3, "unused": 1, "failed": 0}
    layer.prefetch(IDS)
    layer(IDS[:1])
    layer(IDS)
    assert layer.stats() == {"pulls": 2, "prefetched": 3, "unused": 2, "failed": 0}
    for _ in range(9):
        layer.prefetch(IDS)
    assert layer.stats()["unused"] == 3


def test_a_prefetch_whose_time_is_over_is_asked_for_again(monkeypatch):
    layer = layer_of(LocalClient())

    class Late:
        def result(self):
            raise errors.ServerTimeout("late")

    with monkeypatch.context() as patched:
        patched.setattr(layer.client, "begin_pull", lambda ids, train: Late())
        layer.prefetch(IDS)
    layer(IDS)
    assert layer.stats() == {"pulls": 1, "prefetched": 0, "unused": 0, "failed": 1}


# --- what torch does to modules ---------------------------------------------------------------------------


def test_the_state_dict_says_where_the_rows_are():
    layer = layer_of(LocalClient())
    model = torch.nn.Sequential(layer, torch.nn.Linear(4, 1))
    saved = model.state_dict()
    assert sorted(saved) == ["0._extra_state", "1.bias", "1.weight"]
    said = json.loads(bytes(saved["0._extra_state"].numpy()))
    assert (said["server"], said["table"], said["dim"]) == ("local", "user", 4)
    assert model.load_state_dict(saved).missing_keys == []
    other = torch.nn.Sequential(layer_of(LocalClient(), "item"), torch.nn.Linear(4, 1))
    with pytest.raises(errors.StateError, match=r"'table': 'user'.*expected .*'table': 'item'"):
        other.load_state_dict(saved)
    dynamic = torch.nn.Sequential(DynamicEmbedding(4), torch.nn.Linear(4, 1))
    with pytest.raises(errors.StateError, match="rows of other layers are not loaded"):
        model.load_state_dict(dynamic.state_dict())


def test_copies():
    layer = layer_of(LocalClient(), background=True)
    layer.prefetch(IDS)
    copied = copy.deepcopy(layer)
    assert copied.client is layer.client
    copied(IDS).sum().backward()
    copied.wait()
    assert copied.stats()["prefetched"] == 0
    assert steps(layer.client) == 1
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.client is not layer.client
    assert torch.equal(loaded.eval()(IDS), torch.zeros(2, 4))


def test_what_cannot_be_is_refused():
    client = LocalClient()
    with pytest.raises(errors.TableError, match=r"no table 'nobody', expected one of \['item', 'user'\]"):
        layer_of(client, "nobody")
    with pytest.raises(errors.OptionTypeError, match="client is str"):
        RemoteEmbeddingBag("ads", "user")
    with pytest.raises(errors.OptionError, match="mode is 'max'"):
        layer_of(client, mode="max")
    layer = layer_of(client)
    with pytest.raises(errors.TableError, match="with a parameter server"):
        layer.to("meta")
    with pytest.raises(errors.TableError, match="with a client of its own"):
        layer.share_memory()
    with pytest.raises(errors.GradientTypeError, match="RemoteEmbeddingBag: offsets are"):
        layer(torch.tensor([1]))
    with pytest.raises(errors.GradientTypeError, match=r"RemoteEmbeddingBag: input has dtype torch\.float32"):
        layer.prefetch(torch.tensor([1.0]))
    loss = layer(IDS).sum()
    layer.weight.grad = torch.zeros(0, 4)
    with pytest.raises(errors.GradientError, match=r"RemoteEmbeddingBag\.weight has a \.grad"):
        loss.backward()
    assert not client.pushed
    assert "'user', dim=4" in repr(layer)


@pytest.mark.jit
def test_the_import_needs_no_ray():
    program = (
        "import sys\n"
        "sys.modules['ray'] = None\n"
        "import nb_sparse_adam.torch\n"
        "print(nb_sparse_adam.torch.RemoteEmbeddingBag)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert out.returncode == 0, out.stderr
