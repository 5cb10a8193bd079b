# SPDX-License-Identifier: Apache-2.0
"""Fused embeddings: the numbers of torch's own layers and optimizer, and what each use of them means."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")
need("torch.utils.checkpoint")
need("torch.nn.utils.prune")

from nb_sparse_adam.torch import Embedding, EmbeddingBag, SparseAdam, accumulate  # noqa: E402

ROWS, DIM = 30, 4
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6}
RTOL = {torch.float32: 2e-5, torch.float64: 1e-12}


def pair(kind, dtype=torch.float64, optimizer=None, **kwargs):
    """A layer of torch's with its optimizer, and a fused one with the same table."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(ROWS, DIM, sparse=True, dtype=dtype, **kwargs)
    ours = {"Embedding": Embedding, "EmbeddingBag": EmbeddingBag}[kind](
        ROWS, DIM, dtype=dtype, optimizer={**OPTIONS, **(optimizer or {})}, **kwargs
    )
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    return theirs, torch.optim.SparseAdam(theirs.parameters(), **OPTIONS), ours


def assert_same(theirs, their_optimizer, ours):
    dtype = ours.weight.dtype
    state, entry = their_optimizer.state[theirs.weight], ours.optimizer.state[ours.weight]
    for a, b in (
        (ours.weight, theirs.weight),
        (entry["exp_avg"], state["exp_avg"]),
        (entry["exp_avg_sq"], state["exp_avg_sq"]),
    ):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=RTOL[dtype], atol=RTOL[dtype] / 10)
    assert entry["step"] == state["step"]
    assert ours.weight.grad is None


def bags(rng, bags=8, dtype=torch.int64, empty=True):
    lengths = rng.integers(0 if empty else 1, 6, bags)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(rng.integers(0, ROWS, lengths.sum())).to(dtype), torch.from_numpy(offsets).to(
        dtype
    )


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (0,), (2, 3, 2), ()])
def test_embedding(shape, padding_idx, dtype, ids_dtype):
    theirs, optimizer, ours = pair("Embedding", dtype, padding_idx=padding_idx)
    rng = np.random.default_rng(1)
    for _ in range(10):
        ids = torch.from_numpy(np.asarray(rng.integers(0, ROWS, shape))).to(ids_dtype)
        head = torch.from_numpy(np.asarray(rng.normal(size=(*shape, DIM)))).to(dtype)
        optimizer.zero_grad()
        # flat, for torch's own backward pass fails for a single id with padding_idx
        (theirs(ids.reshape(-1)) * head.reshape(-1, DIM)).sum().backward()
        optimizer.step()
        out = ours(ids)
        assert out.shape == (*shape, DIM)
        (out * head).sum().backward()
    assert_same(theirs, optimizer, ours)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_embedding_bag(mode, last, padding_idx, dtype, ids_dtype):
    weighted = mode == "weighted"
    theirs, optimizer, ours = pair(
        "EmbeddingBag",
        dtype,
        mode="sum" if weighted else mode,
        include_last_offset=last,
        padding_idx=padding_idx,
    )
    rng = np.random.default_rng(2)
    for _ in range(10):
        ids, offsets = bags(rng, dtype=ids_dtype)
        offsets = offsets if last else offsets[:-1]
        head = torch.from_numpy(rng.normal(size=(8, DIM))).to(dtype)
        both = []
        for layer in (theirs, ours):
            weights = None
            if weighted:
                weights = torch.linspace(-1, 2, len(ids), dtype=dtype, requires_grad=True)
            optimizer.zero_grad()
            out = layer(ids, offsets, weights)
            (out * head).sum().backward()
            if layer is theirs:
                optimizer.step()
            both.append((out.detach(), weights.grad if weighted else out.detach()))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_same(theirs, optimizer, ours)


@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bags_of_one_length(mode):
    weighted = mode == "weighted"
    theirs, optimizer, ours = pair("EmbeddingBag", mode="sum" if weighted else mode, padding_idx=0)
    rng = np.random.default_rng(3)
    for _ in range(5):
        ids = torch.from_numpy(rng.integers(0, ROWS, (6, 4)))
        grads = []
        for layer in (theirs, ours):
            weights = torch.ones(6, 4, dtype=torch.float64, requires_grad=True) if weighted else None
            optimizer.zero_grad()
            layer(ids, per_sample_weights=weights).pow(2).sum().backward()
            if layer is theirs:
                optimizer.step()
            grads.append(weights.grad if weighted else None)
        if weighted:
            torch.testing.assert_close(*grads)
    assert_same(theirs, optimizer, ours)


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_two_lookups_before_one_backward_are_one_step(kind):
    theirs, optimizer, ours = pair(kind)
    ids, others = torch.arange(8).reshape(4, 2), torch.tensor([[1, 1], [9, 2], [3, 29]])
    for _ in range(3):
        for layer in (theirs, ours):
            optimizer.zero_grad()
            (layer(ids).pow(2).sum() * 3 + layer(others).sin().sum()).backward()
            if layer is theirs:
                optimizer.step()
    assert_same(theirs, optimizer, ours)


def test_weighted_and_plain_bags_in_one_pass():
    theirs, optimizer, ours = pair("EmbeddingBag", mode="sum")
    ids, weights = (
        torch.arange(8).reshape(4, 2),
        torch.full((4, 2), 0.5, dtype=torch.float64, requires_grad=True),
    )
    for layer in (theirs, ours):
        (layer(ids).pow(2).sum() + layer(ids, per_sample_weights=weights).sum()).backward()
    optimizer.step()
    assert_same(theirs, optimizer, ours)


def test_accumulate_makes_several_passes_one_step():
    theirs, optimizer, ours = pair("EmbeddingBag")
    batches = [torch.arange(8).reshape(4, 2), torch.arange(4, 12).reshape(4, 2)]
    for ids in batches:
        theirs(ids).pow(2).sum().backward()
    optimizer.step()
    model = torch.nn.Sequential(ours)
    with accumulate(model):
        for ids in batches:
            model(ids).pow(2).sum().backward()
        assert len(ours.optimizer.state) == 0
        with pytest.raises(RuntimeError, match="already accumulating"), accumulate(ours):
            pass
    assert_same(theirs, optimizer, ours)


def test_accumulate_drops_everything_when_the_block_raises():
    *_, ours = pair("Embedding")
    before = ours.weight.detach().clone()
    loss = ours(torch.arange(3)).sum()

    def block():
        loss.backward()
        raise KeyError

    with pytest.raises(KeyError), accumulate(ours):
        block()
    assert torch.equal(ours.weight, before)
    ours(torch.arange(3)).sum().backward()
    assert ours.optimizer.state[ours.weight]["step"] == 1


def test_every_backward_pass_through_one_graph_is_a_step():
    *_, ours = pair("Embedding")
    loss = ours(torch.arange(3)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert ours.optimizer.state[ours.weight]["step"] == 2


@pytest.mark.parametrize("how", ["no_grad", "eval", "frozen"])
def test_nothing_is_updated_without_training(how):
    *_, ours = pair("EmbeddingBag", mode="sum")
    before = ours.weight.detach().clone()
    weights = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6).reshape(3, 2)
    if how == "no_grad":
        with torch.no_grad():
            assert not ours(ids).requires_grad
    else:
        if how == "eval":
            ours.eval()
        else:
            ours.weight.requires_grad_(False)
        assert not ours(ids).requires_grad
        ours(ids, per_sample_weights=weights).sum().backward()
        torch.testing.assert_close(weights.grad, before[ids].sum(-1))
    assert torch.equal(ours.weight, before)
    assert ours.weight.grad is None


def test_gradients_of_other_things_alone_update_nothing():
    *_, ours = pair("EmbeddingBag", mode="sum")
    before = ours.weight.detach().clone()
    weights = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    loss = ours(torch.arange(6).reshape(3, 2), per_sample_weights=weights).sum()
    (found,) = torch.autograd.grad(loss, [weights], retain_graph=True)
    assert found.shape == weights.shape
    loss.backward(inputs=[weights], retain_graph=True)
    assert torch.equal(ours.weight, before)
    loss.backward()
    assert not torch.equal(ours.weight, before)


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_double_backward_is_refused(kind):
    *_, ours = pair(kind)
    before = ours.weight.detach().clone()
    with pytest.raises(errors.GradientError, match="create_graph=True"):
        ours(torch.arange(6).reshape(3, 2)).pow(2).sum().backward(create_graph=True)
    assert torch.equal(ours.weight, before)


def test_weights_of_samples_need_the_table_as_it_was():
    *_, ours = pair("EmbeddingBag", mode="sum")
    weights = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6).reshape(3, 2)
    loss = ours(ids, per_sample_weights=weights).sum()
    ours(ids).sum().backward()  # a step
    before = ours.weight.detach().clone()
    with pytest.raises(RuntimeError, match="changed in place since the forward pass"):
        loss.backward()
    assert torch.equal(ours.weight, before)
    assert weights.grad is None


def test_a_pass_that_raises_changes_nothing():
    *_, ours = pair("Embedding", optimizer={"on_nonfinite": "raise"})
    *_, other = pair("Embedding")
    before = other.weight.detach().clone()
    loss = ours(torch.arange(3)).sum() * float("nan") + other(torch.arange(3)).sum()
    with pytest.raises(errors.NonFiniteGradientError, match=r"Embedding\.weight"):
        loss.backward()
    assert torch.equal(other.weight, before)
    assert len(ours.optimizer.state) == len(other.optimizer.state) == 0
    other(torch.arange(3)).sum().backward()
    assert other.optimizer.state[other.weight]["step"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments(reentrant):
    theirs, optimizer, ours = pair("Embedding")
    scale = torch.ones(DIM, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6)

    def run(layer):
        def segment(scale):
            return (layer(ids) * scale).sin()

        return torch.utils.checkpoint.checkpoint(segment, scale, use_reentrant=reentrant).sum()

    if reentrant:
        with pytest.raises(errors.GradientError, match="use_reentrant=False"):
            run(ours).backward()
        return
    run(theirs).backward()
    optimizer.step()
    run(ours).backward()
    assert_same(theirs, optimizer, ours)


def test_learning_rate_and_schedulers():
    *_, ours = pair("Embedding", optimizer={"lr": 0.5})
    scheduler = torch.optim.lr_scheduler.StepLR(ours.optimizer, 1, gamma=0.1)
    before = ours.weight.detach().clone()
    ours(torch.tensor([1])).sum().backward()
    scheduler.step()  # does not warn that no step came before
    expected = torch.full((DIM,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(before[1] - ours.weight[1].detach(), expected, rtol=1e-4, atol=0)
    assert ours.lr == pytest.approx(0.05)
    ours.lr = 0.0
    before = ours.weight.detach().clone()
    ours(torch.tensor([1])).sum().backward()
    assert torch.equal(ours.weight, before)


@pytest.mark.parametrize("step_counts", ["global", "row", "element"])
def test_state_dict_goes_on_with_the_same_bits(step_counts):
    def make():
        return torch.nn.Sequential(
            EmbeddingBag(ROWS, DIM, optimizer={"step_counts": step_counts, "lr": 0.1}),
            torch.nn.Linear(DIM, 1),
        )

    torch.manual_seed(3)
    model, ids = make(), torch.arange(12).reshape(6, 2)
    for _ in range(3):
        model(ids).sum().backward()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    others = [make(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    others[0].load_state_dict(torch.load(file, weights_only=True))
    others.append(make())
    others[-1].load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for each in (model, *others):
        for _ in range(2):
            each(ids).sum().backward()
    for other in others:
        assert torch.equal(other[0].weight, model[0].weight)
        a, b = model[0].optimizer.state[model[0].weight], other[0].optimizer.state[other[0].weight]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(a[key], b[key])


def test_weights_of_torchs_layer_can_be_loaded():
    theirs, _, ours = pair("EmbeddingBag")
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys


def test_from_pretrained():
    table = torch.zeros(5, 3)
    frozen = EmbeddingBag.from_pretrained(table, mode="sum")
    assert not frozen.weight.requires_grad
    for kind in (Embedding, EmbeddingBag):
        layer = kind.from_pretrained(table.clone(), freeze=False, optimizer={"lr": 0.25})
        layer(torch.tensor([[1]])).sum().backward()
        torch.testing.assert_close(layer.weight[1].detach(), torch.full((3,), -0.25))
        with pytest.raises(errors.TableError, match=r"expected \(rows, dim\)"):
            kind.from_pretrained(torch.zeros(3))


def test_another_parameter_can_take_the_place():
    theirs, optimizer, ours = pair("Embedding")
    for step in range(4):
        if step == 2:
            ours.weight = torch.nn.Parameter(ours.weight.detach().clone())
        for layer in (theirs, ours):
            optimizer.zero_grad()
            layer(torch.arange(5)).pow(2).sum().backward()
            if layer is theirs:
                optimizer.step()
    assert_same(theirs, optimizer, ours)


# The compiler looks at .grad of whatever it is given, and hides the warning from users only.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_beside_adamw_and_with_a_compiled_dense_part():
    torch.manual_seed(0)
    dense = torch.nn.Linear(DIM, 1)
    layer = EmbeddingBag(ROWS, DIM, optimizer={"lr": 0.05})
    model = torch.nn.Sequential(layer, torch.compile(dense, backend="aot_eager"))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.05)  # skips the table: its .grad stays None
    ids = torch.randint(ROWS, (16, 3))
    losses = []
    for _ in range(20):
        adamw.zero_grad()
        loss = (model(ids) - 1).pow(2).mean()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    whole = torch.compile(torch.nn.Sequential(layer, dense), backend="aot_eager")
    before = layer.optimizer.state[layer.weight]["step"]
    whole(ids).sum().backward()
    assert layer.optimizer.state[layer.weight]["step"] == before + 1


# --- what others may change between a lookup and its step -------------------------------------------------


def test_weights_of_samples_that_are_trained_while_the_pass_goes_on():
    theirs, optimizer, ours = pair("EmbeddingBag", mode="sum")
    ids = torch.arange(6).reshape(3, 2)
    for layer in (theirs, ours):
        weights = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        sgd = torch.optim.SGD([weights], lr=1.0)
        weights.register_post_accumulate_grad_hook(lambda _, sgd=sgd: sgd.step() and None)
        layer(ids, per_sample_weights=weights).pow(2).sum().backward()
        assert not torch.equal(weights, torch.ones(3, 2, dtype=torch.float64))
    optimizer.step()
    assert_same(theirs, optimizer, ours)


def test_buffers_that_are_used_again_while_accumulating():
    *_, ours = pair("EmbeddingBag", mode="sum")
    reference = ours.weight.detach().clone().requires_grad_()
    ids, offsets = torch.zeros(4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    with accumulate(ours):
        for step in range(3):
            ids.copy_(torch.arange(4) + 4 * step)
            offsets.copy_(torch.tensor([0, 1 + step]))
            ours(ids, offsets).pow(2).sum().backward()
            torch.nn.functional.embedding_bag(ids, reference, offsets, mode="sum").pow(2).sum().backward()
    first = ours.optimizer.state[ours.weight]["exp_avg"]
    torch.testing.assert_close(first, 0.1 * reference.grad)


def test_outputs_gradients_that_others_add_to_while_accumulating():
    """A leaf that is added to the output takes the very memory of the output's gradient for its own."""
    *_, ours = pair("Embedding")
    reference = ours.weight.detach().clone().requires_grad_()
    start = ours.weight.detach().clone()
    shift = torch.zeros(3, DIM, dtype=torch.float64, requires_grad=True)
    with accumulate(ours):
        for step in range(3):
            ids = torch.arange(3)[None] + 3 * step
            ((ours(ids) + shift.unsqueeze(0)).pow(2).sum() * (1 + step)).backward()
            (reference[ids].pow(2).sum() * (1 + step)).backward()
    first = ours.optimizer.state[ours.weight]["exp_avg"]
    torch.testing.assert_close(first, 0.1 * reference.grad)
    assert not torch.equal(ours.weight, start)


def test_a_copy_made_while_accumulating_is_in_nobodys_block():
    *_, ours = pair("Embedding")
    with accumulate(ours):
        ours(torch.arange(3)).sum().backward()
        copied = copy.deepcopy(ours)
    copied(torch.arange(3)).sum().backward()
    assert copied.optimizer.state[copied.weight]["step"] == 1


def test_gradients_with_the_negative_bit():
    real, imaginary = Embedding(ROWS, DIM, optimizer=OPTIONS), Embedding(ROWS, DIM, optimizer=OPTIONS)
    before = imaginary.weight.detach().clone()
    number = torch.complex(real(torch.arange(3)), imaginary(torch.arange(3)))
    (number.conj() * (1 + 2j)).real.sum().backward()
    assert imaginary.optimizer.state[imaginary.weight]["step"] == 1
    assert not torch.equal(imaginary.weight, before)


def test_an_exchanged_weight_is_not_kept():
    *_, ours = pair("Embedding")
    for _ in range(4):
        ours.weight = torch.nn.Parameter(ours.weight.detach().clone())
        ours(torch.arange(3)).sum().backward()
    assert list(ours.optimizer._param_states) == [ours.weight]
    assert ours.optimizer.state[ours.weight]["step"] == 4


# --- tables that are not the layer's alone ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parametrized", "weight_norm", "pruned"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_that_is_computed_is_refused(how):
    *_, ours = pair("Embedding")
    if how == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(ours, "weight", torch.nn.Softplus())
    elif how == "weight_norm":
        torch.nn.utils.weight_norm(ours)
    else:
        torch.nn.utils.prune.random_unstructured(ours, "weight", 0.5)
    with pytest.raises(errors.TableError, match="computed from other parameters"):
        ours(torch.arange(3))
    ours.eval()
    assert ours(torch.arange(3)).shape == (3, DIM)


def test_a_functional_call_is_refused_in_backward():
    *_, ours = pair("Embedding")
    before = ours.weight.detach().clone()
    weight = torch.nn.Parameter(torch.ones(ROWS, DIM, dtype=torch.float64))
    out = torch.func.functional_call(ours, {"weight": weight}, (torch.arange(3),))
    with pytest.raises(errors.GradientError, match="not the Parameter that was looked up"):
        out.sum().backward()
    assert torch.equal(ours.weight, before)


def test_one_table_in_two_layers_is_refused():
    *_, ours = pair("Embedding")
    *_, other = pair("EmbeddingBag")
    other.weight = ours.weight
    before = ours.weight.detach().clone()
    with pytest.raises(errors.GradientError, match=r"two fused layers .* have one table"):
        (ours(torch.arange(3)).sum() + other(torch.arange(4)[None]).sum()).backward()
    assert torch.equal(ours.weight, before)


def test_a_table_that_is_used_besides_is_refused():
    *_, ours = pair("Embedding")
    tied = torch.nn.Linear(DIM, ROWS, bias=False, dtype=torch.float64)
    tied.weight = ours.weight
    before = ours.weight.detach().clone()
    with pytest.raises(errors.GradientError, match=r"Embedding\.weight has a \.grad too"):
        tied(ours(torch.arange(3))).sum().backward()
    assert torch.equal(ours.weight, before)
    ours.weight.grad = None
    ours(torch.arange(3)).sum().backward()
    assert ours.optimizer.state[ours.weight]["step"] == 1


def test_the_gradient_of_a_table_cannot_be_asked_for():
    *_, ours = pair("Embedding")
    with pytest.raises(errors.GradientError, match="was asked for, and is never made"):
        torch.autograd.grad(ours(torch.arange(3)).sum(), [ours.weight])


def test_a_layer_that_became_bfloat16_is_refused():
    *_, ours = pair("EmbeddingBag")
    with pytest.raises(errors.TableTypeError, match="bfloat16"):
        ours.bfloat16()(torch.arange(3)[None])


def test_a_state_dict_of_another_size_is_torchs_error():
    *_, ours = pair("Embedding")
    ours(torch.arange(3)).sum().backward()
    larger = Embedding(ROWS + 1, DIM, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        larger.load_state_dict(ours.state_dict())


def test_evaluation_compiles_in_one_graph():
    *_, ours = pair("EmbeddingBag")
    model = torch.nn.Sequential(ours, torch.nn.Linear(DIM, 1, dtype=torch.float64)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(torch.arange(6).reshape(3, 2)).shape == (3, 1)


# --- beside other parts of torch --------------------------------------------------------------------------


def test_gradscaler():
    theirs, optimizer, ours = pair("Embedding", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours.grad_scaler = scaler
    theirs(torch.arange(5)).pow(2).sum().backward()
    optimizer.step()
    scaler.scale(ours(torch.arange(5)).pow(2).sum()).backward()
    assert_same(theirs, optimizer, ours)
    ours.grad_scaler = None
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(errors.OptionError, match="grad_scaler"):
        ours(torch.arange(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(torch.arange(5))


def test_a_step_that_the_scaler_leaves_out_is_left_out_here():
    *_, ours = pair("Embedding", torch.float32)
    *_, other = pair("EmbeddingBag", torch.float32)
    dense = torch.nn.Parameter(torch.ones(DIM))
    sgd, scaler = torch.optim.SGD([dense], lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    ours.grad_scaler = scaler
    before = [layer.weight.detach().clone() for layer in (ours, other)]
    loss = (ours(torch.arange(5)) * dense).sum() * 1e4 + other(torch.arange(5)[None]).sum()
    scaler.scale(loss).backward()
    scaler.step(sgd)
    scaler.update()
    assert torch.equal(dense, torch.ones(DIM))
    for layer, weight in zip((ours, other), before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert len(layer.optimizer.state) == 0


def test_float16_autocast_of_another_device_needs_a_scaler_too():
    *_, ours = pair("Embedding", torch.float32)
    torch.set_autocast_enabled("cuda", True)
    try:
        with pytest.raises(errors.OptionError, match="float16 autocast"):
            ours(torch.arange(5))
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_distributed_data_parallel_is_refused(tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = DistributedDataParallel(torch.nn.Sequential(Embedding(ROWS, DIM)))
        with pytest.raises(errors.TableError, match="DistributedDataParallel"):
            wrapped(torch.arange(3))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [Embedding, EmbeddingBag])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_norm": 1.0}, errors.OptionError, "max_norm is 1.0"),
        ({"scale_grad_by_freq": True}, errors.OptionError, "scale_grad_by_freq is True"),
        ({"optimizer": {"learning_rate": 1}}, errors.OptionError, "'learning_rate', expected some of lr"),
        ({"optimizer": SparseAdam}, errors.OptionTypeError, "expected a dict"),
        ({"optimizer": {"lr": -1.0}}, errors.OptionError, "Invalid learning rate"),
        ({"dtype": torch.bfloat16}, errors.TableTypeError, "bfloat16"),
        ({"device": "meta"}, errors.TableError, "device meta"),
        ({"_weight": torch.zeros(DIM, ROWS).T}, errors.TableError, "contiguous"),
    ],
)
def test_what_cannot_work_is_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(ROWS, DIM, **options)


def test_max_is_refused():
    with pytest.raises(errors.OptionError, match="mode is 'max'"):
        EmbeddingBag(ROWS, DIM, mode="max")
