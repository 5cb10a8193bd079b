# SPDX-License-Identifier: Apache-2.0
"""``nb_sparse_adam.torch.SparseAdam`` in the place of ``torch.optim.SparseAdam``, in all that one does."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need

import nb_sparse_adam
from nb_sparse_adam import RowGradient, errors

torch = need("torch")

from nb_sparse_adam._src.torch.tensors import coo  # noqa: E402
from nb_sparse_adam.torch import SparseAdam  # noqa: E402

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6}
# torch rounds in its own places: tens of units in the last place after tens of steps.
RTOL = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = [((30, 4), 1), ((30,), 1), ((6, 3, 2), 1), ((30, 4), 2), ((6, 3, 2), 2), ((6, 3, 2), 3), ((9, 1), 1)]


def gradient(rng, shape, sparse_dim=1, nnz=None, dtype=torch.float64, coalesced=False):
    nnz = int(rng.integers(1, 2 * shape[0])) if nnz is None else nnz
    indices = np.stack([rng.integers(0, length, nnz) for length in shape[:sparse_dim]])
    values = torch.from_numpy(rng.normal(size=(nnz, *shape[sparse_dim:]))).to(dtype)
    grad = torch.sparse_coo_tensor(torch.from_numpy(indices), values, shape, check_invariants=True)
    return grad.coalesce() if coalesced else grad


def parameter(shape, dtype=torch.float64, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return torch.nn.Parameter(torch.from_numpy(np.array(values)).to(dtype))


def both(params, groups=None, **options):
    """Copies of the parameters with torch's optimizer, and the parameters with ours."""
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]

    def grouped(params):
        return params if groups is None else groups(params)

    return (
        (theirs, torch.optim.SparseAdam(grouped(theirs), **{**OPTIONS, **options})),
        (params, SparseAdam(grouped(params), **{**OPTIONS, **options})),
    )


def assert_close(theirs, ours, rtol=None):
    """The same numbers in parameters and state."""
    __tracebackhide__ = True
    (their_params, their_optimizer), (params, optimizer) = theirs, ours
    assert len(optimizer.state) == len(their_optimizer.state)
    for a, b in zip(params, their_params, strict=True):
        limit = RTOL[a.dtype] if rtol is None else rtol
        tolerance = {"rtol": limit, "atol": limit / 10}
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance)
        if b in their_optimizer.state:
            entry, expected = optimizer.state[a], their_optimizer.state[b]
            assert entry.keys() == expected.keys()
            assert entry["step"] == expected["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(entry[key], expected[key], **tolerance)


def step_both(pairs, grads):
    for params, optimizer in pairs:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        assert optimizer.step() is None


def snapshot(params, optimizer):
    """Every bit of parameters and state."""
    values = [p.detach().numpy().tobytes() for p in params]
    for p in params:
        for value in optimizer.state.get(p, {}).values():
            values.append(value.numpy().tobytes() if isinstance(value, torch.Tensor) else value)
    return values


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "sparse_dim"), SHAPES)
def test_the_numbers_of_torch(shape, sparse_dim, dtype, maximize, coalesced):
    pairs = both([parameter(shape, dtype)], maximize=maximize)
    rng = np.random.default_rng(1)
    for step in range(30):
        nnz = 0 if step == 7 else None  # an empty gradient counts too
        step_both(pairs, [gradient(rng, shape, sparse_dim, nnz, dtype, coalesced)])
    assert_close(*pairs)


@pytest.mark.jit
@given(st.data())
def test_any_sequence_of_gradients(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pairs = both([parameter(shape, dtype, seed) for seed, (shape, _) in enumerate(shapes)])
    for _ in range(data.draw(st.integers(1, 6))):
        grads = []
        for shape, sparse_dim in shapes:
            nnz = data.draw(st.integers(0, 50))
            has_none = data.draw(st.booleans())
            grads.append(
                None if has_none else gradient(rng, shape, sparse_dim, nnz, dtype, data.draw(st.booleans()))
            )
        step_both(pairs, grads)
    assert_close(*pairs)


def test_the_defaults_are_torchs():
    pairs = both([parameter((20, 3))])
    for params, optimizer in pairs:
        optimizer.__init__(params)
    theirs, ours = (optimizer.defaults for _, optimizer in pairs)
    assert {key: ours[key] for key in theirs} == theirs
    step_both(pairs, [gradient(np.random.default_rng(0), (20, 3))])
    assert_close(*pairs)


@pytest.mark.parametrize(("step_counts", "sparse_dim"), [("element", 1), ("element", 2), ("row", 1)])
def test_own_counts_are_the_engines_bit_for_bit(step_counts, sparse_dim):
    rng, param = np.random.default_rng(2), parameter((30, 4), torch.float32)
    table = param.detach().numpy().copy()
    shape = (30, 4) if sparse_dim == 1 else (120, 1)
    engine = nb_sparse_adam.SparseAdam(
        table.reshape(shape), step_counts=step_counts, eps_hat=False, **OPTIONS
    )
    optimizer = SparseAdam([param], step_counts=step_counts, eps_hat=False, **OPTIONS)
    for _ in range(20):
        grad = gradient(rng, (30, 4), sparse_dim, dtype=torch.float32)
        grad._values()[::3] = 0  # elements without a gradient
        indices = grad._indices().numpy()
        rows = indices[0] if sparse_dim == 1 else indices[0] * 4 + indices[1]
        param.grad = grad
        optimizer.step()
        engine.step(RowGradient(rows, grad._values().numpy().reshape(-1, shape[1])))
    state, entry = engine.state["table"], optimizer.state[param]
    for ours, other in (
        (param.detach().numpy(), table),
        (entry["exp_avg"].numpy(), state.exp_avg),
        (entry["exp_avg_sq"].numpy(), state.exp_avg_sq),
        (entry["step"].numpy(), state.steps),
    ):
        np.testing.assert_array_equal(ours.reshape(other.shape), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_200_steps(dtype):
    def losses(optimizer_class):
        torch.manual_seed(0)
        bags = torch.nn.EmbeddingBag(300, 8, mode="mean", sparse=True, dtype=dtype)
        top = torch.nn.Linear(8, 1, dtype=dtype)
        sparse, dense = optimizer_class(bags.parameters(), lr=0.02), torch.optim.AdamW(top.parameters(), 0.01)
        found = []
        for _ in range(200):
            ids = torch.randint(300, (32, 4))
            clicked = (ids < 100).sum(1, keepdim=True).to(dtype).clamp(max=1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(top(bags(ids)), clicked)
            sparse.zero_grad()
            dense.zero_grad()
            loss.backward()
            sparse.step()
            dense.step()
            found.append(loss.item())
        return found

    theirs, ours = losses(torch.optim.SparseAdam), losses(SparseAdam)
    assert theirs[-1] < 0.7 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6 if dtype == torch.float64 else 1e-4)


# --- what torch.optim.Optimizer gives -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["list", "generator", "named", "groups", "generators in groups", "tensor"])
def test_every_way_to_give_parameters(how):
    def groups(params):
        return {
            "list": lambda: params,
            "generator": lambda: iter(params),
            "named": lambda: [(f"table {i}", p) for i, p in enumerate(params)],
            "groups": lambda: [{"params": params[:1], "lr": 0.5, "betas": (0.5, 0.6)}, {"params": params[1]}],
            "generators in groups": lambda: [{"params": iter(params), "maximize": True}],
            "tensor": lambda: ({"params": p, "eps": 0.1 * (i + 1)} for i, p in enumerate(params)),
        }[how]()

    pairs = both([parameter((20, 3)), parameter((10, 5), seed=1)], groups)
    rng = np.random.default_rng(3)
    for step in range(10):
        step_both(pairs, [gradient(rng, (20, 3)), None if step % 3 else gradient(rng, (10, 5))])
    assert_close(*pairs)
    if how == "named":
        params, optimizer = pairs[1]
        params[1].grad = gradient(rng, (10, 5)).to_dense()
        with pytest.raises(errors.DenseGradientError, match="parameter table 1 has"):
            optimizer.step()


def test_a_learning_rate_may_be_a_tensor():
    pairs = both([parameter((20, 3))], lr=torch.tensor(0.25, dtype=torch.float64))
    rng = np.random.default_rng(4)
    for step in range(4):
        step_both(pairs, [gradient(rng, (20, 3))])
        if step == 1:
            for _, optimizer in pairs:
                optimizer.param_groups[0]["lr"].mul_(0.5)
    assert_close(*pairs)


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_betas_may_be_changed_in_place(kind):
    pairs = both([parameter((20, 3))])
    rng = np.random.default_rng(22)
    for step in range(4):
        for _, optimizer in pairs:
            if step == 0:
                first = 0.9 if kind == "list" else torch.tensor(0.9, dtype=torch.float64)
                optimizer.param_groups[0]["betas"] = [first, 0.99]
            if step == 2 and kind == "list":
                optimizer.param_groups[0]["betas"][0] = 0.1
            elif step == 2:
                optimizer.param_groups[0]["betas"][0].fill_(0.1)
        step_both(pairs, [gradient(rng, (20, 3))])
    assert_close(*pairs)


def test_a_learning_rate_may_be_halved_for_ever():
    param = parameter((20, 3), torch.float32)
    optimizer = SparseAdam([param])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    param.grad = gradient(np.random.default_rng(23), (20, 3), dtype=torch.float32)
    for _ in range(200):
        optimizer.step()
        scheduler.step()
    assert optimizer.state[param]["step"] == 200


def test_a_group_can_be_added():
    pairs = both([parameter((20, 3))])
    more = parameter((10, 2), seed=1)
    rng = np.random.default_rng(5)
    step_both(pairs, [gradient(rng, (20, 3))])
    for (params, optimizer), p in zip(pairs, (torch.nn.Parameter(more.detach().clone()), more), strict=True):
        params.append(p)
        optimizer.add_param_group({"params": [p], "lr": 0.5})
    for _ in range(3):
        step_both(pairs, [gradient(rng, (20, 3)), gradient(rng, (10, 2))])
    assert_close(*pairs)
    optimizer = pairs[1][1]
    with pytest.raises(errors.OptionError, match="lr is -1"):
        optimizer.add_param_group({"params": [parameter((2, 2))], "lr": -1.0})
    with pytest.raises(errors.TableTypeError, match=r"param_groups\[2\]\['params'\]\[0\] has dtype"):
        optimizer.add_param_group({"params": [torch.zeros(3, 2, dtype=torch.bfloat16)]})
    assert len(optimizer.param_groups) == 2  # as before


def test_closure_and_zero_grad():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = SparseAdam(embedding.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = embedding(torch.arange(4)).pow(2).sum()
        loss.backward()
        return loss

    found = [optimizer.step(closure).item() for _ in range(20)]
    assert found[-1] < 0.2 * found[0]
    optimizer.zero_grad(set_to_none=False)
    assert embedding.weight.grad.layout is torch.sparse_coo
    before = embedding.weight.detach().clone()
    optimizer.zero_grad()
    assert embedding.weight.grad is None
    optimizer.step()  # nothing to do
    assert torch.equal(embedding.weight, before)
    with torch.no_grad():
        assert optimizer.step(closure).item() < found[-1]  # a closure has gradients enabled


def test_hooks_and_schedulers():
    pairs = both([parameter((20, 3))], lr=1.0)
    called, rng = [], np.random.default_rng(6)
    schedulers = []
    for _, optimizer in pairs:
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
        schedulers.append(
            torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15),
                ],
                [5],
            )
        )
    rates = []
    for _ in range(20):
        step_both(pairs, [gradient(rng, (20, 3))])
        for scheduler in schedulers:
            scheduler.step()
        rates.append(pairs[1][1].param_groups[0]["lr"])
    assert called == ["before", "after"] * 40
    assert rates[-1] < 1e-12  # the cosine ends at 0, which is allowed
    assert_close(*pairs)


def test_one_cycle_moves_beta1():
    pairs = both([parameter((20, 3))])
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=30) for _, opt in pairs]
    rng = np.random.default_rng(7)
    for _ in range(25):
        step_both(pairs, [gradient(rng, (20, 3))])
        for scheduler in schedulers:
            scheduler.step()
    assert pairs[1][1].param_groups[0]["betas"][0] != 0.9
    assert_close(*pairs)


def test_a_step_counts_as_a_change_of_the_parameter():
    param, other = parameter((5, 2)), parameter((5, 2))
    optimizer = SparseAdam([param, other])
    versions = param._version, other._version
    param.grad = gradient(np.random.default_rng(8), (5, 2))
    optimizer.step()
    assert param._version > versions[0]
    assert other._version == versions[1]


@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_parameters_need_not_be_contiguous(sparse_dim):
    transposed = torch.nn.Parameter(parameter((4, 30)).detach().T)
    pairs = both([transposed])
    (theirs, _), (ours, _) = pairs
    rng = np.random.default_rng(9)
    for step in range(6):
        step_both(pairs, [gradient(rng, (30, 4), sparse_dim)])
        if step == 2:  # by another hand
            with torch.no_grad():
                theirs[0].mul_(2)
                ours[0].mul_(2)
    assert not ours[0].is_contiguous()
    assert_close(*pairs)


# --- state --------------------------------------------------------------------------------------------------


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("shape", "sparse_dim"), SHAPES[:4])
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_a_checkpoint_of_one_is_continued_by_the_other(direction, shape, sparse_dim, named):
    param, rng = parameter(shape), np.random.default_rng(10)
    groups = (lambda params: [("table", params[0])]) if named else None
    theirs, ours = both([param], groups)
    first, second = (theirs, ours) if direction == "from torch" else (ours, theirs)
    grads = [gradient(rng, shape, sparse_dim) for _ in range(8)]
    for grad in grads[:4]:
        step_both([first], [grad])
    with torch.no_grad():
        second[0][0].copy_(first[0][0])
    second[1].load_state_dict(saved(first[1].state_dict()))
    for grad in grads[4:]:
        step_both([theirs, ours], [grad])
    assert_close(theirs, ours)


@pytest.mark.parametrize("step_counts", ["global", "row", "element"])
@pytest.mark.parametrize("how", ["save", "deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_with_the_same_bits_and_by_itself(how, step_counts):
    param, rng = parameter((30, 4), torch.float32), np.random.default_rng(11)
    optimizer = SparseAdam([("table", param)], step_counts=step_counts, on_nonfinite="skip", **OPTIONS)
    grads = [gradient(rng, (30, 4), dtype=torch.float32) for _ in range(8)]
    for grad in grads[:4]:
        param.grad = grad
        optimizer.step()
    param.grad = None
    if how in ("deepcopy", "pickle"):
        duplicate = copy.deepcopy if how == "deepcopy" else lambda value: pickle.loads(pickle.dumps(value))
        other, copied = duplicate((param, optimizer))
        assert copied.param_groups[0]["params"][0] is other
    else:
        other = torch.nn.Parameter(param.detach().clone())
        copied = SparseAdam([("table", other)], step_counts=step_counts, on_nonfinite="skip", **OPTIONS)
        state = optimizer.state_dict()
        copied.load_state_dict(saved(state) if how == "save" else state)
    assert copied.param_groups[0]["on_nonfinite"] == "skip"
    before = snapshot([param], optimizer)
    for grad in grads[4:]:
        other.grad = grad
        copied.step()
    assert snapshot([param], optimizer) == before  # they share nothing
    for grad in grads[4:]:
        param.grad = grad
        optimizer.step()
    assert snapshot([param], optimizer) == snapshot([other], copied)
    assert set(copied.state_dict()) == set(optimizer.state_dict())


def test_the_state_is_live_and_a_state_dict_is_not():
    param, rng = parameter((30, 4)), np.random.default_rng(12)
    optimizer = SparseAdam([param], **OPTIONS)
    param.grad = gradient(rng, (30, 4))
    optimizer.step()
    live, kept = optimizer.state[param]["exp_avg"], optimizer.state_dict()["state"][0]
    first = live.clone()
    assert kept["exp_avg"].is_contiguous()
    assert torch.equal(kept["exp_avg"], first)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"] is live
    assert not torch.equal(live, first)
    assert torch.equal(kept["exp_avg"], first)
    assert (kept["step"], optimizer.state[param]["step"]) == (1, 2)


@pytest.mark.parametrize(
    "how",
    ["in place", "assigned", "data", "set_", "share_memory_", "step", "tensor step", "entry", "cleared"],
)
def test_state_that_was_changed_by_hand_is_what_goes_on(how):
    pairs = both([parameter((30, 4))])
    rng = np.random.default_rng(13)
    for step in range(6):
        step_both(pairs, [gradient(rng, (30, 4))])
        if step == 2:
            for params, optimizer in pairs:
                entry = optimizer.state[params[0]]
                if how == "in place":
                    entry["exp_avg"].mul_(0.5)
                elif how == "assigned":
                    entry["exp_avg_sq"] = torch.full((30, 4), 0.25, dtype=torch.float64)
                elif how == "data":
                    entry["exp_avg"].data = torch.full((30, 4), 0.25, dtype=torch.float64)
                elif how == "set_":
                    entry["exp_avg_sq"].set_(torch.full((30, 4), 0.25, dtype=torch.float64))
                elif how == "share_memory_":
                    for key in ("exp_avg", "exp_avg_sq"):
                        entry[key].share_memory_()
                elif how == "step":
                    entry["step"] = 100
                elif how == "tensor step":
                    entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float64)
                elif how == "entry":
                    optimizer.state[params[0]] = {key: copy.copy(value) for key, value in entry.items()}
                else:
                    optimizer.state.clear()
    assert_close(*pairs)


@pytest.mark.parametrize("how", ["data", "double", "load_state_dict"])
def test_a_parameter_may_get_other_memory(how):
    pairs = both([parameter((30, 4), torch.float32)])
    rng = np.random.default_rng(14)
    for step in range(6):
        step_both(pairs, [gradient(rng, (30, 4), dtype=pairs[1][0][0].dtype)])
        if step == 2:
            for params, optimizer in pairs:
                if how == "data":
                    params[0].data = params[0].data * 2
                elif how == "double":
                    params[0].grad = None
                    params[0].data = params[0].data.double()
                    entry = optimizer.state[params[0]]
                    entry.update({key: entry[key].double() for key in ("exp_avg", "exp_avg_sq")})
                else:
                    optimizer.load_state_dict(optimizer.state_dict())
    assert_close(*pairs, RTOL[torch.float32])


def test_a_parameter_made_for_inference_is_refused():
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(errors.TableError, match=r"made under torch\.inference_mode"):
        SparseAdam([param])


def test_a_row_that_is_out_of_range_of_a_transposed_parameter():
    param = torch.nn.Parameter(torch.zeros(2, 3).T)
    optimizer = SparseAdam([param])
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        param.grad = torch.sparse_coo_tensor([[7]], torch.ones(1, 2), (3, 2), check_invariants=False)
    with pytest.raises(errors.GradientIndexError, match=r"indices\[0, 0\] is 7, expected 0 <= index < 3"):
        optimizer.step()


@pytest.mark.parametrize("step", [math.inf, 3.5, -1, torch.tensor([1.0, 2.0])])
def test_a_step_that_counts_nothing(step):
    (theirs, torchs), (_, optimizer) = both([parameter((3, 2))])
    step_both([(theirs, torchs)], [gradient(np.random.default_rng(24), (3, 2))])
    state = torchs.state_dict()
    state["state"][0]["step"] = step
    with pytest.raises(errors.StateError, match="step is"):
        optimizer.load_state_dict(state)


def test_from_rows_to_entries_and_back():
    pairs = both([parameter((30, 4))])
    rng = np.random.default_rng(15)
    for step in range(9):
        step_both(pairs, [gradient(rng, (30, 4), 1 + step // 3 % 2)])
    assert_close(*pairs)


@pytest.mark.parametrize("step_counts", ["row", "element"])
def test_counts_must_fit(step_counts):
    param, rng = parameter((30, 4)), np.random.default_rng(16)
    own = SparseAdam([param], step_counts=step_counts)
    (theirs, torchs), (ours, optimizer) = both([parameter((30, 4))])
    grad = gradient(rng, (30, 4))
    step_both([([param], own), (theirs, torchs), (ours, optimizer)], [grad])
    before = snapshot([param], own), snapshot(ours, optimizer)
    with pytest.raises(errors.StateError, match="step is the one count 1, with step_counts='"):
        own.load_state_dict(torchs.state_dict())
    with pytest.raises(errors.StateError, match="cannot change"):
        own.load_state_dict(optimizer.state_dict())
    with pytest.raises(errors.StateError, match="cannot change"):
        optimizer.load_state_dict(own.state_dict())
    state = torchs.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(3, 4)
    with pytest.raises(errors.StateError, match=r"exp_avg is of shape \(3, 4\), expected a tensor of shape"):
        optimizer.load_state_dict(state)
    own.param_groups[0]["step_counts"] = "global"
    with pytest.raises(errors.OptionError, match="fixed when the first step is taken"):
        own.step()
    assert before == (snapshot([param], own), snapshot(ours, optimizer))


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "Invalid learning rate: 0.0"),
        ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
        ({"eps": 0.0}, "Invalid epsilon value: 0.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -1)}, "Invalid beta parameter at index 1: -1"),
    ],
)
def test_options_are_refused_in_torchs_words(options, message):
    for optimizer, error in ((torch.optim.SparseAdam, ValueError), (SparseAdam, errors.OptionError)):
        with pytest.raises(error, match=message):
            optimizer([parameter((2, 2))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_counts": "rows"}, "step_counts is 'rows', expected"),
        ({"on_nonfinite": None}, "on_nonfinite is None"),
        ({"eps_hat": "yes"}, "eps_hat"),
        ({"lr": math.inf}, "lr is inf"),
    ],
)
def test_own_options_are_checked(options, message):
    with pytest.raises(errors.OptionError, match=message):
        SparseAdam([parameter((2, 2))], **options)


def test_options_that_became_nonsense_are_refused_before_anything_is_written():
    param = parameter((30, 4))
    optimizer = SparseAdam([param])
    param.grad = gradient(np.random.default_rng(17), (30, 4))
    for key, value in {"lr": -1.0, "betas": (0.9, 2.0), "eps": None, "eps_hat": 3}.items():
        optimizer.step()
        before, kept = snapshot([param], optimizer), optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(errors.OptionError, match=key):
            optimizer.step()
        assert snapshot([param], optimizer) == before
        optimizer.param_groups[0][key] = kept


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.bfloat16), errors.TableTypeError, "has dtype torch.bfloat16"),
        (torch.zeros(3, 2, dtype=torch.float16), errors.TableTypeError, "leave it to torch.optim.SparseAdam"),
        (
            torch.zeros(3, 2, dtype=torch.complex64),
            errors.TableError,
            r"Complex params at indices \[\[0, 0\]\]",
        ),
        (
            torch.zeros(3, 2, device="meta"),
            errors.TableError,
            r"device meta, expected the CPU.*module\.cpu\(\)",
        ),
        (torch.zeros(1, 2).expand(3, 2), errors.TableError, "several elements are one place in memory"),
        (torch.zeros(3, 2).to_sparse(), errors.TableError, r"Sparse params at indices \[\[0, 0\]\]"),
    ],
)
def test_parameters_that_cannot_be_updated_in_place(tensor, error, message):
    with pytest.raises(error, match=message):
        SparseAdam([tensor])
    with pytest.raises(error, match=message):
        SparseAdam([{"params": [tensor]}])


WRONG = {
    "dense": (lambda g: g.to_dense(), errors.DenseGradientError, "does not support dense gradients"),
    "row too large": (lambda g: replaced(g, row=30), errors.GradientIndexError, "30"),
    "negative row": (lambda g: replaced(g, row=-1), errors.GradientIndexError, "-1"),
    "of another shape": (lambda g: g, errors.GradientError, r"has shape \(30, 4\), expected \(60, 4\)"),
    "nan": (lambda g: g * float("nan"), errors.NonFiniteGradientError, r"params'\]\[1\]"),
}


def replaced(grad, row):
    """A gradient as a buggy extension may make it: nothing checks its indices."""
    indices = grad._indices().clone()
    indices[0, -1] = row
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_coo_tensor(indices, grad._values(), grad.shape, check_invariants=False)


@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize("what", WRONG)
def test_one_wrong_gradient_and_nothing_is_changed(what, sparse_dim):
    make, error, message = WRONG[what]
    params, rng = [parameter((30, 4), seed=seed) for seed in range(3)], np.random.default_rng(18)
    optimizer = SparseAdam(params, on_nonfinite="raise")
    for step in range(2):
        for param in params:
            param.grad = gradient(rng, (30, 4), sparse_dim, 9)
        if step == 0:
            optimizer.step()
    before = snapshot(params, optimizer)
    params[1].grad = make(params[1].grad)
    if what == "of another shape":
        params[1].data = torch.zeros(60, 4, dtype=torch.float64)
        optimizer.state.pop(params[1])
        before = snapshot(params, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert snapshot(params, optimizer) == before
    params[1].grad = gradient(rng, tuple(params[1].shape))
    optimizer.step()
    assert snapshot(params, optimizer) != before


def test_a_dense_gradient_is_torchs_error():
    param = parameter((3, 2))
    param.grad = torch.ones(3, 2, dtype=torch.float64)
    for optimizer in (torch.optim.SparseAdam([param]), SparseAdam([param])):
        with pytest.raises(
            RuntimeError, match="SparseAdam does not support dense gradients, please consider Adam"
        ):
            optimizer.step()


def test_a_gradient_on_another_device_says_what_to_do():
    # A parameter's .grad cannot be set to such a one by torch's own ways.
    grad = torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1, 2), (3, 2), device="meta")
    with pytest.raises(
        errors.GradientError, match="gradient of parameter w is on device meta, expected cpu, where the"
    ):
        coo("w", grad, torch.device("cpu"))


def test_rows_are_not_counted_by_gradients_of_entries():
    param = parameter((30, 4))
    optimizer = SparseAdam([param], step_counts="row")
    param.grad = gradient(np.random.default_rng(19), (30, 4), 2)
    with pytest.raises(errors.GradientError, match="2 sparse dimensions, with step_counts='row' expected 1"):
        optimizer.step()
    assert len(optimizer.state) == 0


def test_nonfinite_gradients_propagate_by_default_and_may_be_skipped():
    rng = np.random.default_rng(20)
    bad = gradient(rng, (30, 4), nnz=5) * float("inf")
    pairs = both([parameter((30, 4))])
    step_both(pairs, [bad])
    for params, _ in pairs:
        assert not params[0].isfinite().all()
    np.testing.assert_array_equal(pairs[0][0][0].isnan().numpy(), pairs[1][0][0].isnan().numpy())
    param = parameter((30, 4))
    skipping = SparseAdam([param], on_nonfinite="skip")
    param.grad = bad
    skipping.step()
    assert param.isfinite().all()
    skipped = {param: len(set(bad._indices()[0].tolist()))}
    assert skipping.skipped_rows == skipped
    skipping.load_state_dict(skipping.state_dict())
    assert skipping.skipped_rows == skipped


# --- torch's own cases --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    need("expecttest")  # torch's test code imports it
    return need("torch.testing._internal.common_optimizers")


@pytest.mark.jit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_own_inputs(cases, dtype):
    inputs = cases.optim_inputs_func_sparseadam("cpu", dtype)
    assert len(inputs) >= 4
    for case in inputs:
        theirs, ours = both([parameter((10, 5), dtype)], **case.kwargs)
        rng = np.random.default_rng(21)
        for _ in range(10):
            step_both([theirs, ours], [gradient(rng, (10, 5), dtype=dtype)])
        # With a float32 tensor as lr torch computes the step size in float32.
        assert_close(theirs, ours, RTOL[torch.float32] if "lr" in case.kwargs else None)


@pytest.mark.jit
def test_torchs_own_errors(cases):
    inputs = cases.optim_error_inputs_func_sparseadam("cpu", torch.float32)
    assert len(inputs) >= 10
    for case in inputs:
        given = case.optimizer_error_input
        params = [torch.zeros(2, 3)] if given.params is None else given.params
        if case.error_type is UserWarning:  # torch warns that this is to become an error; here it is one
            with pytest.warns(UserWarning, match=case.error_regex), pytest.raises(errors.TableError):
                SparseAdam(params, **given.kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                SparseAdam(params, **given.kwargs)
