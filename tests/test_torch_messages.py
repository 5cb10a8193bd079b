# SPDX-License-Identifier: Apache-2.0
"""What a fused layer cannot do is refused by name, with what to do instead; whose GradScaler a copy has."""

import copy
import pickle

import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")
need("torch._dynamo.compiled_autograd")

from nb_sparse_adam.torch import Embedding, EmbeddingBag, SparseAdam  # noqa: E402

ROWS, DIM = 6, 4
KINDS = [Embedding, EmbeddingBag]
IDS = torch.tensor([[1, 2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit")  # torch's own
def test_transforms_of_functions(kind, transform):
    layer, ones = kind(ROWS, DIM), torch.ones(DIM)

    def call():
        if transform == "vmap":
            return torch.vmap(layer)(IDS.unsqueeze(0))
        if transform == "jvp":
            return torch.func.jvp(lambda w: (layer(IDS) @ w).sum(), (ones,), (ones,))
        return getattr(torch.func, transform)(lambda w: (layer(IDS) @ w).sum())(ones)

    with pytest.raises(errors.GradientError, match=r"under torch\.func .*layer\.eval\(\)"):
        call()
    layer.eval()
    call()


@pytest.mark.jit
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd(kind):
    layer = kind(ROWS, DIM)
    before = layer.weight.detach().clone()
    loss = layer(IDS).sum()
    enable = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
    with enable, pytest.raises(errors.GradientError, match="compiled autograd"):
        loss.backward()
    assert torch.equal(layer.weight, before)
    layer(IDS).sum().backward()
    assert layer.optimizer.state[layer.weight]["step"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_memory(kind):
    message = r"device meta, which has no memory.*from_pretrained\(torch\.empty\(6, 4\)"
    with pytest.raises(errors.TableError, match=message):
        torch.nn.utils.skip_init(kind, ROWS, DIM)
    with torch.device("meta"), pytest.raises(errors.TableError, match=message):
        kind(ROWS, DIM)
    layer = kind(ROWS, DIM)
    state = layer.state_dict()
    layer.to("meta")
    with pytest.raises(errors.TableError, match=message):
        layer(IDS)
    layer.load_state_dict(state, assign=True)
    layer(IDS).sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripts(training):
    model = torch.nn.Sequential(EmbeddingBag(ROWS, DIM), torch.nn.Linear(DIM, 1)).train(training)
    with pytest.raises(errors.TableError, match=r"torch\.jit\.script .*load_state_dict"):
        torch.jit.script(model)
    assert isinstance(model[0], EmbeddingBag)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_weight(kind):
    layer, seen = kind(ROWS, DIM), []
    hook = layer.weight.register_hook(seen.append)
    with pytest.warns(errors.SparseAdamWarning, match=r"weight has a hook, which is called with None"):
        layer(IDS).sum().backward()
    hook.remove()
    layer(IDS).sum().backward()
    assert seen == [None]
    assert layer.optimizer.state[layer.weight]["step"] == 2


@pytest.mark.parametrize("which", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_the_optimizer(which):
    layer = pickle.loads(pickle.dumps(Embedding(ROWS, DIM)))
    with pytest.raises(errors.OptionError, match=f"{which}: the hook would never be called"):
        getattr(layer.optimizer, which)(print)
    assert isinstance(layer.optimizer, SparseAdam)
    seen = []
    drop_in = SparseAdam([torch.nn.Parameter(torch.zeros(ROWS, DIM))])
    drop_in.register_step_post_hook(lambda *_: seen.append(1))
    drop_in.step()
    assert seen == [1]


# --- whose scaler -----------------------------------------------------------------------------------------


def scaled():
    layer, scaler = Embedding(ROWS, DIM), torch.amp.GradScaler("cpu", init_scale=1024.0)
    layer.grad_scaler = scaler
    return layer, scaler


def test_a_copy_shares_the_scaler():
    layer, scaler = scaled()
    copied = copy.deepcopy(torch.nn.Sequential(layer))[0]
    assert copied.grad_scaler is scaler
    scaler.scale(torch.ones(1))
    scaler.update(2.0)
    for each in (layer, copied):
        scaler.scale(each(IDS).pow(2).sum()).backward()
    assert torch.equal(copied.weight, layer.weight)
    a, b = (each.optimizer.state[each.weight]["exp_avg"] for each in (layer, copied))
    assert torch.equal(a, b)
    assert copied.optimizer is not layer.optimizer


def test_a_copy_between_unscale_and_update():
    layer, scaler = scaled()
    dense = torch.nn.Linear(DIM, 1)
    sgd = torch.optim.SGD(dense.parameters(), lr=0.1)
    scaler.scale(dense(layer(IDS)).sum()).backward()
    scaler.unscale_(sgd)
    copied = copy.deepcopy(layer)
    scaler.step(sgd)
    scaler.update()
    assert copied.grad_scaler is scaler
    assert torch.equal(copied.weight, layer.weight)


@pytest.mark.parametrize("first", [0, 1])
def test_a_model_and_its_scaler_that_are_copied_together_stay_together(first):
    pair = scaled()[:: -1 if first else 1]
    copied = copy.deepcopy(pair)
    layer, scaler = copied[:: -1 if first else 1]
    assert layer.grad_scaler is scaler
    sent = pickle.loads(pickle.dumps(pair))
    layer, scaler = sent[:: -1 if first else 1]
    assert layer.grad_scaler is scaler


def test_a_number_for_a_scaler_is_copied():
    layer = Embedding(ROWS, DIM)
    layer.grad_scaler = 8.0
    copied = copy.deepcopy(layer)
    layer.grad_scaler = 1.0
    assert copied.grad_scaler == 8.0
