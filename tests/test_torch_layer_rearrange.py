# SPDX-License-Identifier: Apache-2.0
"""Rows of a fused layer that come, go and change places."""

import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")

from nb_sparse_adam.torch import Embedding, EmbeddingBag, accumulate  # noqa: E402

ROWS, DIM = 6, 4
KINDS = [Embedding, EmbeddingBag]
STEP_COUNTS = ["global", "row", "element"]
SOURCES = {
    "append": [0, 1, 2, 3, 4, 5, -1, -1],
    "prune": [0, 2, 5],
    "reorder": [5, 3, 1, 0, 2, 4],
    "reset": [0, -1, 2, 3, -1, 5],
    "split": [0, 2, 2, 5, -1],
    "nothing": [],
}


def train(layer, *ids):
    layer(torch.tensor([ids])).pow(2).sum().backward()


def bits(layer):
    entry = layer.optimizer.state.get(layer.weight, {})
    return [layer.weight.detach().clone(), *(entry[key] for key in sorted(entry))]


def padded_by_hand(layer, weight, source, kind, step_counts):
    """A new layer with the arrays of the old one's state, rows chosen and padded with zeros."""
    other = kind.from_pretrained(weight, freeze=False, optimizer={"step_counts": step_counts, "lr": 0.1})
    state = layer.optimizer.state_dict()
    for key, value in state["state"][0].items():
        if isinstance(value, torch.Tensor):
            rows = torch.cat([value, torch.zeros_like(value[:1])])
            state["state"][0][key] = rows[torch.tensor(source, dtype=torch.int64)]
    other.optimizer.load_state_dict(state)
    return other


@pytest.mark.parametrize("how", SOURCES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_padding_by_hand(kind, step_counts, how):
    layer, source = kind(ROWS, DIM, optimizer={"step_counts": step_counts, "lr": 0.1}), SOURCES[how]
    for ids in ((0, 1, 2, 2), (2, 5)):
        train(layer, *ids)
    weight = torch.randn(len(source), DIM)
    other = padded_by_hand(layer, weight.clone(), source, kind, step_counts)
    old = layer.weight
    layer.rearrange(weight, torch.tensor(source, dtype=torch.int64))
    assert layer.num_embeddings == len(source)
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert old not in layer.optimizer.state
    for _ in range(2):
        assert all(map(torch.equal, bits(layer)[:3], bits(other)[:3]))
        assert [str(value) for value in bits(layer)] == [str(value) for value in bits(other)]
        if source:
            train(layer, 0, len(source) - 1)
            train(other, 0, len(source) - 1)
    assert layer.lr == 0.1


def test_before_the_first_step_there_is_nothing_to_rearrange():
    layer = Embedding(ROWS, DIM)
    layer.rearrange(torch.nn.Parameter(torch.zeros(2, DIM)), [-1, 3])
    assert len(layer.optimizer.state) == 0
    train(layer, 1)
    assert layer.optimizer.state[layer.weight]["step"] == 1


def test_a_frozen_layer_stays_frozen():
    layer = Embedding(ROWS, DIM)
    layer.weight.requires_grad_(False)
    layer.rearrange(torch.zeros(2, DIM), [0, 1])
    assert not layer.weight.requires_grad


WRONG = [
    (torch.zeros(3, DIM + 1), [0, 1, 2], errors.TableError, "shape"),
    (torch.zeros(3, DIM, dtype=torch.float64), [0, 1, 2], errors.TableError, "float64"),
    (torch.zeros(3), [0, 1, 2], errors.TableError, r"expected a Tensor \(rows, dim\)"),
    ([[0.0] * DIM], [0], errors.TableError, r"is a list, expected a Tensor"),
    (torch.zeros(DIM, 3).T, [0, 1, 2], errors.TableError, "contiguous"),
    (torch.zeros(3, DIM, device="meta"), [0, 1, 2], errors.TableError, "device meta"),
    (torch.zeros(3, DIM), [0, 1, ROWS], errors.StateError, "6"),
    (torch.zeros(3, DIM), [0, -2, 1], errors.StateError, "-2"),
    (torch.zeros(3, DIM), [0, 1], errors.StateError, "source"),
    (torch.zeros(3, DIM), [0.0, 1.0, 2.0], errors.StateError, "source"),
    (torch.zeros(2, DIM), [0, 1], errors.TableError, "padding_idx is 2, expected one of the 2 rows"),
]


@pytest.mark.parametrize(("weight", "source", "error", "message"), WRONG)
def test_what_is_refused_has_changed_nothing(weight, source, error, message):
    layer = Embedding(ROWS, DIM, padding_idx=2)
    train(layer, 0, 1, 2)
    before, old = bits(layer), layer.weight
    with pytest.raises(error, match=message):
        layer.rearrange(weight, source)
    assert layer.weight is old
    assert layer.num_embeddings == ROWS
    assert all(str(a) == str(b) for a, b in zip(bits(layer), before, strict=True))
    train(layer, 0)
    assert layer.optimizer.state[old]["step"] == 2


def test_while_lookups_wait_for_a_step_it_is_refused():
    layer = Embedding(ROWS, DIM)
    train(layer, 1)
    with accumulate(layer):
        train(layer, 1)
        with pytest.raises(errors.TableError, match="accumulate block"):
            layer.rearrange(torch.zeros(2, DIM), [0, 1])
    seen = []

    class InTheMiddle(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, grad):
            with pytest.raises(errors.TableError, match="while a backward pass"):
                layer.rearrange(torch.zeros(2, DIM), [0, 1])
            seen.append(1)
            return grad

    scale = torch.ones(DIM, requires_grad=True)
    early = InTheMiddle.apply(scale)  # the later a node was made, the sooner backward comes to it
    (layer(torch.tensor([1])) * early).sum().backward()
    assert seen == [1]
    assert layer.optimizer.state[layer.weight]["step"] == 3


def test_a_lookup_in_the_old_weight_is_refused():
    layer = Embedding(ROWS, DIM)
    loss = layer(torch.tensor([1])).sum()
    layer.rearrange(torch.zeros(2, DIM), [0, 1])
    with pytest.raises(errors.GradientError, match="not the Parameter that was looked up"):
        loss.backward()
    assert not layer.weight.any()


def test_a_computed_weight_and_the_optimizers_own_rearrange():
    layer = Embedding(ROWS, DIM)
    with pytest.raises(errors.OptionError, match=r"expected layer\.rearrange"):
        layer.optimizer.rearrange(layer.weight, torch.nn.Parameter(torch.zeros(2, DIM)), [0, 1])
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    with pytest.raises(errors.TableError, match="computed from others"):
        layer.rearrange(torch.zeros(2, DIM), [0, 1])
