# SPDX-License-Identifier: Apache-2.0
"""An interrupt between any two bytecodes of a fused pass, or of `accumulate`, leaves no layer waiting."""

from pathlib import Path

import pytest
from interrupts import Interrupted, interrupted
from needs import need

import nb_sparse_adam
from nb_sparse_adam import errors

torch = need("torch")

from nb_sparse_adam.torch import DynamicEmbedding, Embedding, EmbeddingBag, accumulate  # noqa: E402

ROWS, DIM = 6, 4
FOLDER = Path(nb_sparse_adam.__file__).parent / "_src" / "torch"
NAMES = (
    "backward.py", "deferred.py", "dynamic.py", "dynamic_layers.py", "functions.py", "fused.py", "layer.py",
    "layers.py", "sharing.py",
)  # fmt: skip
OURS = tuple(str(FOLDER / name) for name in NAMES)


def steps(layer):
    if isinstance(layer, DynamicEmbedding):
        return layer.table.stats()["steps"]
    return layer.optimizer.state[layer.weight]["step"] if layer.weight in layer.optimizer.state else 0


def passes(layers):
    return sum(layer(torch.tensor([[1, 2]])).sum() for layer in layers)


def accumulated(layers):
    with accumulate(torch.nn.ModuleList(layers)):
        passes(layers).backward()


@pytest.mark.jit
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # generators let go
def test_after_an_interrupt_anywhere_the_next_pass_is_a_step_of_its_own():
    layers = [Embedding(ROWS, DIM), EmbeddingBag(ROWS, DIM), DynamicEmbedding(DIM)]
    accumulated(layers)
    number, place = 0, ""
    while place is not None:
        number += 1
        before = steps(layers[0])
        place = interrupted(lambda: accumulated(layers), number, every=True, files=OURS)
        after = {steps(layer) for layer in layers}
        assert after in ({before}, {before + 1}), number  # of both, or of none
        passes(layers).backward()
        assert [steps(layer) for layer in layers] == [max(after) + 1] * 3, number
    assert number > 300


def test_a_pass_that_is_refused_is_no_part_of_the_block():
    waiting, refusing = Embedding(ROWS, DIM), Embedding(ROWS, DIM, optimizer={"on_nonfinite": "raise"})
    before = waiting.weight.detach().clone()
    with accumulate(waiting):
        loss = waiting(torch.tensor([1])).sum() + refusing(torch.tensor([1])).sum() * float("nan")
        with pytest.raises(errors.NonFiniteGradientError):
            loss.backward()
    assert torch.equal(waiting.weight, before)
    assert steps(waiting) == steps(refusing) == 0


def test_a_decorated_function_is_a_block_at_each_call():
    layer = Embedding(ROWS, DIM)

    @accumulate(layer)
    def train():
        for _ in range(3):
            layer(torch.tensor([1])).sum().backward()

    for step in (1, 2):
        train()
        assert steps(layer) == step


def test_while_an_interrupt_is_handled_the_layers_do_not_wait():
    layer = Embedding(ROWS, DIM)

    def block():
        layer(torch.tensor([1])).sum().backward()
        raise Interrupted

    try:
        with accumulate(layer):
            block()
    except Interrupted:
        layer(torch.tensor([1])).sum().backward()
        assert steps(layer) == 1
