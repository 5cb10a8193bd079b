# SPDX-License-Identifier: Apache-2.0
"""Fused layers whose weight is not theirs alone, or not the one that was looked up."""

import copy
import gc

import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")

from nb_sparse_adam.torch import Embedding, EmbeddingBag, accumulate  # noqa: E402

ROWS, DIM = 6, 4
KINDS = [Embedding, EmbeddingBag]


def ids_for(layer, *ids):
    return torch.tensor([ids]) if isinstance(layer, EmbeddingBag) else torch.tensor(ids)


def train(layer, *ids):
    layer(ids_for(layer, *ids)).sum().backward()


def steps(layer):
    return layer.optimizer.state[layer.weight]["step"] if layer.weight in layer.optimizer.state else 0


# --- the weight that was looked up ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_any_lookup_of_another_weight_is_refused(kind, first):
    """In whatever order a pass meets the lookups, rows of the other table move nothing."""
    layer, dense = kind(ROWS, DIM), kind(ROWS, DIM)
    other = torch.nn.Parameter(torch.randn(ROWS, DIM))
    before = [layer.weight.detach().clone(), other.detach().clone(), dense.weight.detach().clone()]
    calls = [
        lambda: torch.func.functional_call(layer, {"weight": other}, (ids_for(layer, 1),)),
        lambda: layer(ids_for(layer, 3)),
    ]
    outs = [call() for call in (calls if first else calls[::-1])]
    with pytest.raises(errors.GradientError, match="not the Parameter that was looked up"):
        (outs[0].sum() + outs[1].sum() + dense(ids_for(dense, 2)).sum()).backward()
    for weight, expected in zip((layer.weight, other, dense.weight), before, strict=True):
        assert torch.equal(weight, expected)
    assert steps(layer) == steps(dense) == 0
    train(layer, 3)
    assert steps(layer) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_exchanged_between_two_lookups_is_refused(kind):
    layer = kind(ROWS, DIM)
    out = layer(ids_for(layer, 1)).sum()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    before = layer.weight.detach().clone()
    with pytest.raises(errors.GradientError, match="exchanged since"):
        (out + layer(ids_for(layer, 3)).sum()).backward()
    assert torch.equal(layer.weight, before)


def test_a_weight_that_is_exchanged_while_accumulating_is_refused():
    layer = Embedding(ROWS, DIM)

    def block():
        train(layer, 1)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        train(layer, 3)

    with pytest.raises(errors.GradientError, match="exchanged since"), accumulate(layer):
        block()
    assert steps(layer) == 0


def test_weights_that_are_exchanged_between_layers_are_refused():
    a, b = Embedding(ROWS, DIM), Embedding(ROWS, DIM)
    loss = a(torch.tensor([1])).sum() + b(torch.tensor([3])).sum()
    a.weight, b.weight = b.weight, a.weight
    with pytest.raises(errors.GradientError, match="not the Parameter that was looked up"):
        loss.backward()
    assert steps(a) == steps(b) == 0


def test_a_model_that_is_called_with_other_weights():
    """Evaluation gives right results with any weights; training refuses those that are not the model's."""
    model = torch.nn.Sequential(Embedding(ROWS, DIM), torch.nn.Linear(DIM, 1))
    ids = torch.tensor([1, 3])
    teacher = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = model(ids).detach()
    for trained in (False, True):  # a teacher of a training model, and an adapted model's evaluation
        model.train(trained)
        given = {name: value.clone().requires_grad_(not trained) for name, value in teacher.items()}
        assert torch.equal(torch.func.functional_call(model, given, (ids,)), expected)
    loss = (model(ids) - torch.func.functional_call(model, teacher, (ids,))).pow(2).sum()
    loss.backward()
    assert steps(model[0]) == 1
    before = model[0].weight.detach().clone()
    perturbed = {name: value.clone().requires_grad_() for name, value in teacher.items()}
    out = torch.func.functional_call(model, perturbed, (ids,))
    with pytest.raises(errors.GradientError, match="not the Parameter that was looked up"):
        (out.sum() + model(ids).sum()).backward()
    adapted = {name: value.clone().requires_grad_() * 0.5 for name, value in teacher.items()}
    with pytest.raises(errors.TableError, match="computed from other"):
        torch.func.functional_call(model, adapted, (ids,))
    assert torch.equal(model[0].weight, before)


# --- a weight that two layers have ------------------------------------------------------------------------


@pytest.mark.parametrize("same_pass", [True, False])
@pytest.mark.parametrize(
    ("rows", "others", "refused"),
    [
        (slice(None), slice(None), "have one table, of shape"),
        (slice(None), slice(2, 5), "have tables that share memory, of shapes"),
        (slice(2, 5), slice(None), "have tables that share memory, of shapes"),
        (slice(0, 4), slice(3, 6), "have tables that share memory, of shapes"),
        (slice(0, 3), slice(3, 6), None),
    ],
)
def test_tables_that_share_memory(rows, others, refused, same_pass):
    table = torch.randn(ROWS, DIM)
    a = Embedding.from_pretrained(table[rows], freeze=False)
    b = EmbeddingBag.from_pretrained(table[others], freeze=False)

    def both():
        if same_pass:
            (a(ids_for(a, 1)).sum() + b(ids_for(b, 1)).sum()).backward()
        else:
            train(a, 1)
            train(b, 1)

    if refused is None:
        both()
        both()
        assert steps(a) == steps(b) == 2
        return
    before = table.clone()
    for time in range(3):  # it does not go unseen a second time
        with pytest.raises(errors.GradientError, match=refused):
            both()
        assert steps(b) == 0
        assert steps(a) == (0 if same_pass else time + 1)
    assert torch.equal(table, before) is same_pass


@pytest.mark.parametrize("how", ["given", "loaded", "moved into"])
def test_a_weight_that_another_layer_has_stepped(how):
    a, b = Embedding(ROWS, DIM), Embedding(ROWS, DIM)
    train(a, 1)
    train(b, 1)
    if how == "given":
        b.weight = a.weight
    elif how == "loaded":
        b.load_state_dict(a.state_dict(), assign=True)
    else:
        b.weight.data = a.weight.data
    before = a.weight.detach().clone()
    with pytest.raises(errors.GradientError, match="two fused layers"):
        train(b, 1)
    assert torch.equal(a.weight, before)


def test_a_weight_whose_layer_has_let_it_go_is_free():
    a, b = Embedding(ROWS, DIM), Embedding(ROWS, DIM)
    train(a, 1)
    b.weight, a.weight = a.weight, torch.nn.Parameter(torch.zeros(ROWS, DIM))
    train(b, 1)
    train(a, 1)
    assert (steps(a), steps(b)) == (2, 1)
    weight = b.weight
    del b
    gc.collect()
    a.weight = weight
    train(a, 1)
    assert steps(a) == 3


def test_a_layer_that_only_looks_up_may_share():
    a = Embedding(ROWS, DIM)
    b = Embedding(ROWS, DIM).eval()
    b.weight = a.weight
    for _ in range(2):
        train(a, 1)
        b(torch.tensor([1]))
    frozen = EmbeddingBag.from_pretrained(a.weight.detach())
    frozen(torch.tensor([[1]]))
    train(a, 1)
    assert steps(a) == 3


def test_a_copy_that_shares_the_optimizer_too_is_the_same_table():
    a = Embedding(ROWS, DIM)
    b = copy.copy(a)
    train(a, 1)
    train(b, 1)
    assert steps(a) == steps(b) == 2
    for _ in range(2):
        with pytest.raises(errors.GradientError, match="have one table"):
            (a(torch.tensor([1])).sum() + b(torch.tensor([1])).sum()).backward()
    assert steps(a) == 2


def test_empty_tables_share_nothing():
    a, b = EmbeddingBag(0, DIM, mode="sum"), EmbeddingBag(0, DIM, mode="sum")
    nothing = torch.zeros(0, dtype=torch.int64)
    for _ in range(2):
        (a(nothing, nothing).sum() + b(nothing, nothing).sum()).backward()
    assert steps(a) == steps(b) == 2


@pytest.mark.parametrize("when", ["before the lookup", "after it"])
def test_a_weight_that_is_not_contiguous_is_refused(when):
    """It would be trained in a copy."""
    layer = Embedding(ROWS, DIM)
    strided = torch.randn(DIM, ROWS).T
    loss = layer(torch.tensor([1])).sum()
    if when == "before the lookup":
        layer.weight = torch.nn.Parameter(strided)
        with pytest.raises(errors.TableError, match="expected it contiguous"):
            layer(torch.tensor([1]))
    else:
        layer.weight.data = strided
        with pytest.raises(errors.TableError, match="expected it contiguous"):
            loss.backward()
    layer.eval()
    assert torch.equal(layer(torch.tensor([1]))[0], layer.weight[1])
