# SPDX-License-Identifier: Apache-2.0
"""Offsets of a fused `EmbeddingBag` are checked before anything is read by them."""

import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")
need("torch.fx.experimental.proxy_tensor")

from nb_sparse_adam.torch import EmbeddingBag  # noqa: E402

ROWS, DIM = 6, 4
IDS = [1, 2, 3, 4]

WRONG = [
    ([0, 2, 3], True, r"offsets\[2\] is 3, expected the number of ids, 4, as include_last_offset=True says"),
    ([0, 2, 5], True, r"offsets\[2\] is 5, expected the number of ids, 4"),
    ([0], True, "offsets name no bag, expected one for the 4 ids"),
    ([], False, "offsets name no bag, expected one for the 4 ids"),
    ([0, -1], False, r"offsets\[1\] is -1, less than offsets\[0\] = 0"),
    ([0, -(2**30)], False, r"offsets\[1\] is -1073741824, less than"),
    ([0, 3, 2, 4], False, r"offsets\[2\] is 2, less than offsets\[1\] = 3; expected a sequence"),
    ([0, 2**31 - 1, 2], False, r"offsets\[1\] is 2147483647, expected at most 4"),
    ([0, 5], False, r"offsets\[1\] is 5, expected at most 4, the number of ids"),
    ([1, 2], False, r"offsets\[0\] is 1, expected 0"),
    ([-1], False, r"offsets\[0\] is -1, expected 0"),
]


def snapshot(layer):
    return layer.weight.detach().clone(), len(layer.optimizer.state)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("offsets", "last", "message"), WRONG)
def test_wrong_offsets_are_refused_in_forward(offsets, last, message, dtype, weighted):
    layer = EmbeddingBag(ROWS, DIM, mode="sum", include_last_offset=last)
    before = snapshot(layer)
    weights = torch.ones(4, requires_grad=True) if weighted else None
    with pytest.raises(errors.GradientIndexError, match=message):
        layer(torch.tensor(IDS, dtype=dtype), torch.tensor(offsets, dtype=dtype), weights)
    assert torch.equal(layer.weight, before[0])
    assert len(layer.optimizer.state) == before[1]


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen"])
@pytest.mark.parametrize("offsets", [[0, -1], [0, -(2**30)], [0, 3, 2, 4], [0, 2**31 - 1, 2]])
def test_no_lookup_follows_offsets_out_of_the_ids(offsets, how):
    layer = EmbeddingBag(ROWS, DIM, mode="sum")
    if how == "eval":
        layer.eval()
    elif how == "frozen":
        layer.weight.requires_grad_(False)
    with torch.set_grad_enabled(how != "no_grad"), pytest.raises(errors.GradientIndexError, match="offsets"):
        layer(torch.tensor(IDS), torch.tensor(offsets))


@pytest.mark.parametrize(
    ("ids", "offsets", "last", "rows"),
    [
        (IDS, [0, 2], False, IDS),
        (IDS, [0, 0, 4, 4], False, IDS),
        (IDS, [0, 4, 4], True, IDS),
        ([], [], False, []),
        ([], [0, 0], False, []),
        ([], [0], True, []),
        ([], [0, 0, 0], True, []),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_right_offsets_train_the_rows_of_the_output(ids, offsets, last, rows, training):
    theirs = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum", include_last_offset=last)
    layer = EmbeddingBag(ROWS, DIM, mode="sum", include_last_offset=last).train(training)
    layer.load_state_dict(theirs.state_dict())
    before = layer.weight.detach().clone()
    for dtype in (torch.int16, torch.int32, torch.int64):
        out = layer(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets, dtype=dtype))
        if dtype is not torch.int16 and not training:
            expected = theirs(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets, dtype=dtype))
            assert torch.equal(out, expected)
        if training:
            out.sum().backward()
    changed = (layer.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == (rows if training else [])


def test_offsets_need_not_be_contiguous():
    layer = EmbeddingBag(ROWS, DIM, mode="sum")
    offsets = torch.tensor([0, 9, 2, 9])[::2]
    layer(torch.tensor(IDS), offsets).sum().backward()
    with pytest.raises(errors.GradientIndexError, match=r"offsets\[1\] is 9"):
        layer(torch.tensor(IDS), torch.tensor([0, 2, 9, 2])[::2])


def test_evaluation_can_be_traced_and_transformed():
    """Where nobody can look at the offsets, nobody does."""
    layer = EmbeddingBag(ROWS, DIM, mode="sum").eval()
    ids, offsets = torch.tensor(IDS), torch.tensor([0, 2])
    expected = layer(ids, offsets)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, offsets), expected)
    made = torch.fx.experimental.proxy_tensor.make_fx(lambda *args: layer(*args))(ids, offsets)
    assert torch.equal(made(ids, offsets), expected)
