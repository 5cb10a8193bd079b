# SPDX-License-Identifier: Apache-2.0
"""Dynamic embeddings: the bits of the fused layers on the same rows, and what ids come and go by."""

import numpy as np
import pytest
from checks import STEP_COUNTS
from needs import need

from nb_sparse_adam import EmbeddingTable, errors

torch = need("torch")

from dynamic_layers import DIM, IDS, KINDS, OPTIONS, ROWS, assert_same_bits, bits, pair, rows_of  # noqa: E402

from nb_sparse_adam.torch import (  # noqa: E402
    DynamicEmbedding,
    DynamicEmbeddingBag,
    Embedding,
    accumulate,
)


def random_bags(rng, bags=8):
    lengths = rng.integers(0, 6, bags)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(rng.integers(0, ROWS, lengths.sum())), torch.from_numpy(offsets)


# --- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_counts", "dtype"),
    [*((each, torch.float32) for each in STEP_COUNTS), ("row", torch.float64)],
)
def test_the_bits_of_a_fused_embedding(step_counts, dtype):
    fused, dynamic = pair("Embedding", dtype, step_counts)
    rng = np.random.default_rng(1)
    for shape in [(7,), (5, 3), (0,), (2, 3, 2), (), (9,)]:
        ids = torch.from_numpy(np.asarray(rng.integers(0, ROWS, shape)))
        head = torch.from_numpy(np.asarray(rng.normal(size=(*shape, DIM)))).to(dtype)
        outs = [layer(ids) for layer in (fused, dynamic)]
        assert torch.equal(*outs)
        for out in outs:
            (out.sin() * head).sum().backward()
    assert_same_bits(fused, dynamic)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_the_bits_of_a_fused_embedding_bag(mode, last):
    weighted = mode == "weighted"
    fused, dynamic = pair("EmbeddingBag", mode="sum" if weighted else mode, include_last_offset=last)
    rng = np.random.default_rng(2)
    for step in range(6):
        if step % 2:
            ids, offsets = torch.from_numpy(rng.integers(0, ROWS, (8, 3))), None
        else:
            ids, offsets = random_bags(rng)
            offsets = offsets if last else offsets[:-1]
        weights = torch.linspace(-1, 2, ids.numel()).reshape(ids.shape) if weighted else None
        head = torch.from_numpy(rng.normal(size=(8, DIM))).float()
        outs = [layer(ids, offsets, weights) for layer in (fused, dynamic)]
        torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)  # torch's way of summing has other bits
        for out in outs:
            (out * head).sum().backward()
    assert_same_bits(fused, dynamic)


def test_weights_of_samples_get_the_gradient_of_torchs():
    fused, dynamic = pair("EmbeddingBag", torch.float64, mode="sum")
    rng = np.random.default_rng(3)
    for _ in range(4):
        ids, offsets = random_bags(rng)
        grads = []
        for layer in (fused, dynamic):
            weights = torch.linspace(-1, 2, len(ids), dtype=torch.float64, requires_grad=True)
            layer(ids, offsets[:-1], weights).pow(2).sum().backward()
            grads.append(weights.grad)
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(torch.from_numpy(rows_of(dynamic)[0]), fused.weight.detach())
    loss = dynamic(ids, offsets[:-1], weights).sum()
    dynamic(ids, offsets[:-1]).sum().backward()  # a step
    before, weights.grad = torch.from_numpy(dynamic.table.lookup(ids.numpy(), train=False)), None
    loss.backward()  # of the vectors that were looked up, which are kept
    assert not torch.allclose(weights.grad, before.sum(-1))
    dynamic.eval()
    weights.grad = None
    before = torch.from_numpy(dynamic.table.lookup(ids.numpy(), train=False))
    dynamic(ids, offsets[:-1], weights).sum().backward()
    torch.testing.assert_close(weights.grad, before.sum(-1))


def test_the_numbers_of_torchs_own_optimizer():
    _, dynamic = pair("Embedding", step_counts="global")
    theirs = torch.nn.Embedding(ROWS, DIM, sparse=True)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(rows_of(dynamic)[0]))
    optimizer = torch.optim.SparseAdam(theirs.parameters(), lr=0.02, betas=(0.9, 0.99), eps=1e-6)
    for step in range(5):
        for layer in (theirs, dynamic):
            optimizer.zero_grad()
            layer(torch.arange(step, step + 9) % ROWS).pow(2).sum().backward()
            if layer is theirs:
                optimizer.step()
    torch.testing.assert_close(torch.from_numpy(rows_of(dynamic)[0]), theirs.weight.detach())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint64, torch.int16])
def test_ids_of_any_width(dtype):
    layer = DynamicEmbedding(DIM)
    ids = torch.tensor([0, 3, 200, 3]).to(dtype)
    if dtype == torch.uint64:
        ids = torch.tensor([-1, -(2**63)]).view(torch.uint64)
    layer(ids).sum().backward()
    expected = ids.numpy().astype(np.int64)
    assert np.array_equal(layer.table.ids(), expected[np.sort(np.unique(expected, return_index=True)[1])])
    assert (layer.table.state(expected).steps == 1).all()


# --- ids that come and go ---------------------------------------------------------------------------------


def test_ids_that_are_new_in_the_middle_of_training():
    fused = Embedding(ROWS, DIM, optimizer={**OPTIONS, "step_counts": "row"})
    torch.nn.init.zeros_(fused.weight)
    dynamic = DynamicEmbedding(DIM, initializer="zeros", **OPTIONS)
    for step in range(6):
        ids = torch.arange(3 * step, 3 * step + 8) % ROWS
        for layer in (fused, dynamic):
            (layer(ids) - 1).pow(2).sum().backward()
    there = np.sort(dynamic.table.ids())
    assert 8 < len(there) < ROWS
    assert torch.equal(fused.weight.detach()[there], torch.from_numpy(rows_of(dynamic)[0]))


def test_an_id_that_is_not_admitted_yet_has_its_initial_value_and_takes_no_step():
    layer = DynamicEmbedding(DIM, admission=2)
    out = layer(torch.tensor([5]))
    out.sum().backward()
    assert len(layer.table) == 0
    assert layer.table.stats()["dropped"] == 1
    assert torch.equal(layer(torch.tensor([5])), out)
    assert layer.table.ids().tolist() == [5]
    strict = DynamicEmbedding(DIM, admission=2, missing="raise")
    with pytest.raises(errors.GradientIndexError, match=r"input\[1\] is 6, which has no row"):
        strict(torch.tensor([5, 6, 5])).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_go_between_forward_and_backward(kind):
    layer, other = (kind(DIM, initializer="zeros") for _ in range(2))
    known, ids = torch.tensor([[1, 3]]), torch.tensor([[3, 2], [1, 2]])
    for each in (layer, other):
        for _ in range(2):
            each(known).sum().backward()
    head = torch.tensor([[1.0], [2.0]]).expand(2, DIM)
    loss = (layer(ids).reshape(-1, DIM)[[0, -1]] * head).sum()
    assert layer.table.evict(seen_fewer_than=3).tolist() == [2]
    layer(torch.tensor([[7]]))  # takes the place of its row
    loss.backward()
    assert layer.table.stats()["dropped"] > 0
    before = other.table.lookup([1, 3], train=False)
    (other(ids).reshape(-1, DIM)[[0, -1]] * head).sum().backward()
    after = other.table.lookup([1, 3], train=False)
    assert not np.array_equal(before, after)
    assert np.array_equal(layer.table.lookup([1, 3], train=False), after)
    assert not layer.table.lookup([7], train=False).any()
    assert layer.table.state([7]).steps.tolist() == [0]


def test_a_lookup_that_does_not_fit_has_changed_nothing():
    layer = DynamicEmbedding(DIM, capacity=2)
    layer(torch.tensor([1])).sum().backward()
    before = bits(layer)
    with pytest.raises(errors.TableError, match=r"2 ids are new, expected at most 1"):
        layer(torch.tensor([2, 3]))
    assert bits(layer) == before


@pytest.mark.parametrize("how", ["no_grad", "eval", "frozen", "inference_mode"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_without_training(kind, how):
    layer = kind(DIM)
    model = torch.nn.Sequential(layer)
    model(IDS).sum().backward()
    before, stats = bits(layer), layer.table.stats()
    ids = torch.tensor([[1, 77]])
    if how in ("no_grad", "inference_mode"):
        with getattr(torch, how)():
            out = model(ids)
    else:
        model.eval() if how == "eval" else model.requires_grad_(False)
        out = model(ids)
    assert not out.requires_grad
    if kind is DynamicEmbedding:
        assert not out[0, 1].any()  # as `unknown` says
        assert out[0, 0].any()
    assert bits(layer) == before
    assert layer.table.stats() == stats


# --- when a step is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_two_lookups_in_one_pass_are_one_step(kind):
    fused, dynamic = pair(kind)
    ids, others = torch.arange(8).reshape(4, 2), torch.tensor([[1, 1], [9, 2], [3, 29]])
    for layer in (fused, dynamic):
        (layer(ids).sum() * 3 + layer(others).sum()).backward()
    assert_same_bits(fused, dynamic)
    assert dynamic.table.stats()["steps"] == 1


@pytest.mark.parametrize("modes", [(None, "mean"), (None, "sum"), ("sum", "mean"), (None, None)])
def test_layers_that_share_a_table_make_one_step_with_the_sum(modes):
    table = EmbeddingTable(DIM, dtype=np.float64, initializer="zeros", **OPTIONS)
    layers = [
        DynamicEmbedding.from_table(table)
        if mode is None
        else DynamicEmbeddingBag.from_table(table, mode=mode)
        for mode in modes
    ]
    assert all(layer.table is table for layer in layers)
    plain = torch.nn.Embedding(ROWS, DIM, dtype=torch.float64)
    optimizer = torch.optim.SparseAdam(plain.parameters(), lr=0.02, betas=(0.9, 0.99), eps=1e-6)
    plain.sparse = True
    torch.nn.init.zeros_(plain.weight)
    ids = torch.tensor([[1, 2, 1], [3, 1, 4]])
    loss = expected = 0
    for factor, (mode, layer) in enumerate(zip(modes, layers, strict=True), 1):
        vectors = plain(ids)
        if mode is not None:
            vectors = vectors.sum(1) if mode == "sum" else vectors.mean(1)
        expected = expected + (vectors * factor).sum()
        loss = loss + (layer(ids) * factor).sum()
    loss.backward()
    expected.backward()
    optimizer.step()
    assert table.stats()["steps"] == 1
    found = torch.from_numpy(table.lookup(np.arange(ROWS), train=False))
    torch.testing.assert_close(found, plain.weight.detach())


def test_accumulate_makes_several_passes_one_step():
    fused, dynamic = pair("EmbeddingBag")
    model = torch.nn.ModuleList([fused, dynamic])
    ids = torch.zeros(4, 2, dtype=torch.long)
    with accumulate(model):
        for step in range(3):
            ids.copy_(torch.arange(8).reshape(4, 2) + step)  # a buffer that is used again
            for layer in model:
                layer(ids).sum().backward()
        assert dynamic.table.stats()["steps"] == 0
    assert_same_bits(fused, dynamic)
    before = bits(dynamic)

    def block():
        dynamic(torch.tensor([[1]])).sum().backward()
        raise KeyError

    with pytest.raises(KeyError), accumulate(model):
        block()
    assert dynamic.table.stats()["steps"] == 1
    assert np.array_equal(rows_of(dynamic)[0], fused.weight.detach())
    assert bits(dynamic) != before  # the lookup was seen


@pytest.mark.parametrize("wrong", ["dynamic", "fused"])
def test_a_pass_over_layers_of_both_kinds_is_all_or_nothing(wrong):
    dynamic, other = DynamicEmbedding(DIM), DynamicEmbeddingBag(DIM)
    fused = Embedding(ROWS, DIM, optimizer={"on_nonfinite": "raise"})
    ids, weight = torch.tensor([[1, 2]]), fused.weight.detach().clone()
    before = [layer.table.lookup(ids.numpy()[0]) for layer in (dynamic, other)]
    factors = {"dynamic": 1.0, "fused": 1.0, wrong: float("nan")}
    loss = dynamic(ids).sum() * factors["dynamic"] + other(ids).sum() + fused(ids).sum() * factors["fused"]
    with pytest.raises(
        errors.NonFiniteGradientError, match="grad_output" if wrong == "dynamic" else "fused|Embedding"
    ):
        loss.backward()
    assert torch.equal(fused.weight, weight)
    for layer, values in zip((dynamic, other), before, strict=True):
        assert np.array_equal(layer.table.lookup(ids.numpy()[0]), values)
        assert layer.table.stats()["steps"] == 0
    (dynamic(ids).sum() + other(ids).sum() + fused(ids).sum()).backward()
    assert [layer.table.stats()["steps"] for layer in (dynamic, other)] == [1, 1]
    assert fused.optimizer.state[fused.weight]["step"] == 1


def test_every_backward_pass_through_one_graph_is_a_step_and_only_of_what_is_asked_for():
    layer, other = DynamicEmbedding(DIM), torch.ones(DIM, requires_grad=True)
    loss = (layer(IDS) * other).sum()
    torch.autograd.grad(loss, [other], retain_graph=True)
    assert layer.table.stats()["steps"] == 0
    loss.backward(retain_graph=True)
    loss.backward()
    assert layer.table.stats()["steps"] == 2
    with pytest.raises(errors.GradientError, match="was asked for, and is never made"):
        torch.autograd.grad(layer(IDS).sum(), [layer.weight])


def test_what_a_grad_scaler_scales():
    fused, dynamic = pair("Embedding")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    dynamic.grad_scaler = scaler
    fused(torch.arange(5)).pow(2).sum().backward()
    scaler.scale(dynamic(torch.arange(5)).pow(2).sum()).backward()
    assert_same_bits(fused, dynamic)
    other = DynamicEmbeddingBag(DIM)
    scaler.scale(dynamic(torch.arange(5)).sum() * float("inf") + other(IDS).sum()).backward()
    assert dynamic.table.stats()["steps"] == 1
    assert other.table.stats()["steps"] == 0
    dynamic.grad_scaler = None
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(errors.OptionError, match="grad_scaler"):
        dynamic(torch.arange(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dynamic(torch.arange(5)).sum().backward()


# --- options ----------------------------------------------------------------------------------------------


def test_learning_rates_and_schedulers():
    layer = DynamicEmbedding(DIM, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(layer.optimizer, 1, gamma=0.1)
    layer(IDS).sum().backward()
    scheduler.step()  # does not warn that no step came before
    assert layer.lr == layer.table.lr == pytest.approx(0.05)
    layer.table.lr = 0.25
    assert layer.lr == layer.optimizer.param_groups[0]["lr"] == 0.25
    assert dict(layer.optimizer.param_groups[0].items())["lr"] == 0.25
    layer.lr = torch.tensor(0.125)
    assert layer.table.lr == 0.125
    layer.lr = 1e-300  # where a scheduler that halves it ends
    assert layer.table.lr == 0.0
    cycle = torch.optim.lr_scheduler.OneCycleLR(layer.optimizer, 1.0, total_steps=5)
    layer(IDS).sum().backward()
    cycle.step()
    assert layer.table.betas[0] == layer.optimizer.param_groups[0]["betas"][0] != 0.9
    with pytest.raises(errors.OptionError, match="lr is -1"):
        layer.lr = -1.0
    with pytest.raises(errors.OptionError, match="step_counts is 'element', expected 'row'"):
        layer.optimizer.param_groups[0]["step_counts"] = "element"
    assert layer.optimizer.step() is None
    for refused in (
        lambda: layer.optimizer.add_param_group({"params": []}),
        lambda: layer.optimizer.load_state_dict({}),
        lambda: layer.optimizer.register_step_pre_hook(print),
        lambda: layer.optimizer.register_step_post_hook(print),
    ):
        with pytest.raises(errors.OptionError, match=r"layer\.optimizer\."):
            refused()


def test_torchs_number_of_threads_is_the_tables_unless_it_has_its_own():
    layer, own = DynamicEmbedding(DIM), DynamicEmbedding(DIM, num_threads=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        layer(IDS)
        assert layer.table.num_threads == 1
    finally:
        torch.set_num_threads(threads)
    layer.table.num_threads = None
    own(IDS)
    assert own.table.num_threads == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cpu"}, errors.OptionError, "got 'device', expected options of EmbeddingTable"),
        ({"dtype": torch.bfloat16}, errors.OptionError, "bfloat16, expected float32 or float64"),
        ({"dtype": torch.float16}, errors.OptionError, "float16, expected float32 or float64"),
        ({"lr": -1.0}, errors.OptionError, "lr is -1"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_that_are_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(DIM, **options)
    with pytest.raises(errors.TableTypeError, match=r"expected an EmbeddingTable.*from_pretrained"):
        kind.from_table(torch.zeros(3, DIM))
    with pytest.raises(errors.OptionError, match="mode is 'max'"):
        DynamicEmbeddingBag(DIM, mode="max")


# --- what torch does to modules, and what cannot be -------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), r"to torch\.float64, expected torch\.float32.*dtype="),
        (lambda model: model.half(), r"to torch\.float16"),
        (lambda model: model.to(torch.bfloat16), r"to torch\.bfloat16"),
        (lambda model: model.to("meta"), "to device meta, expected cpu.*Move the other parts"),
        (lambda model: model.share_memory(), "to shared memory"),
    ],
)
def test_what_would_move_or_convert_the_table_is_refused(change, message):
    model = torch.nn.Sequential(DynamicEmbedding(DIM), torch.nn.Linear(DIM, 1))
    model(IDS).sum().backward()
    before = bits(model[0])
    with pytest.raises(errors.TableError, match=message):
        change(model)
    assert bits(model[0]) == before
    model.to("cpu").float().train()(IDS).sum().backward()
    assert model[0].table.stats()["steps"] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Using backward", "ignore:.*TorchScript")
def test_what_cannot_be_trained_is_refused(kind):
    layer = kind(DIM)
    replica = layer._replicate_for_data_parallel()
    for call, error, message in (
        (lambda: replica(IDS), errors.TableError, "in DataParallel"),
        (lambda: torch.jit.trace(layer, IDS), errors.TableError, r"torch\.jit\.trace"),
        (lambda: torch.jit.script(layer), errors.TableError, r"torch\.jit\.script"),
        (lambda: torch.vmap(layer)(IDS.unsqueeze(0)), errors.TableError, r"torch\.func"),
        (lambda: layer(IDS.to("meta")), errors.TableError, "input is on device meta"),
        (lambda: layer(IDS.float()), errors.GradientTypeError, "dtype torch.float32, expected integers"),
        (lambda: layer([1, 2]), errors.GradientTypeError, "input is a list"),
        (lambda: layer(IDS).sum().backward(create_graph=True), errors.GradientError, "create_graph=True"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert layer.table.stats()["steps"] == 0
    weight = torch.nn.Parameter(torch.empty(0, DIM))
    layer.weight.grad = torch.empty(0, DIM)
    with pytest.raises(errors.GradientError, match=r"weight has a \.grad too"):
        layer(IDS).sum().backward()
    layer.weight = weight
    with pytest.raises(errors.TableError, match="weight has been exchanged"):
        layer(IDS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((IDS, torch.tensor([0])), "got offsets with an input of shape"),
        ((torch.tensor([1, 2]),), "offsets are a NoneType"),
        ((torch.tensor([1, 2]), torch.tensor([0.0])), r"offsets are of shape \(1,\) and torch.float32"),
        ((torch.tensor([1, 2]), torch.tensor([1])), "offsets"),
        ((torch.tensor([1, 2]), torch.tensor([0, 3])), "offsets"),
        ((torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)), "offsets name no bag"),
        ((torch.zeros(1, 1, 1, dtype=torch.long),), "input has shape"),
        ((IDS, None, torch.ones(3)), "per_sample_weights are of shape"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bags_that_are_malformed(args, message, training):
    layer = DynamicEmbeddingBag(DIM, mode="sum").train(training)
    with pytest.raises(errors.GradientError, match=message):
        layer(*args)
    assert len(layer.table) == 0
    with pytest.raises(errors.GradientError, match="per_sample_weights with mode='mean'"):
        DynamicEmbeddingBag(DIM)(IDS, None, torch.ones(2, 2))


@pytest.mark.jit
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_lookup_is_a_graph_break():
    model = torch.nn.Sequential(DynamicEmbeddingBag(DIM), torch.nn.Linear(DIM, 1))
    compiled = torch.compile(model, backend="eager")
    compiled(IDS).sum().backward()
    assert model[0].table.stats()["steps"] == 1
    model.eval()
    assert torch.equal(compiled(IDS), model(IDS))
