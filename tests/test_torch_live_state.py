# SPDX-License-Identifier: Apache-2.0
"""``optimizer.state[p]`` of the drop-in optimizer: one dict, and what a user does to it is what goes on."""

import copy
import io

import numpy as np
import pytest
from needs import need

import nb_sparse_adam
from nb_sparse_adam import RowGradient, errors

torch = need("torch")

from nb_sparse_adam.torch import SparseAdam  # noqa: E402

COUNTS = ["global", "row", "element"]
END_OF_INT32, END_OF_INT64 = 2**31 - 1, 2**63 - 1


def gradient(rows=(1, 3), shape=(5, 2), seed=0):
    values = np.random.default_rng(seed).normal(size=(len(rows), *shape[1:]))
    return torch.sparse_coo_tensor(
        torch.tensor([list(rows)]), torch.from_numpy(values), shape, check_invariants=True
    )


def stepped(steps=3, **options):
    """A parameter with its optimizer, after some steps of the same gradient."""
    param = torch.nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
    optimizer = SparseAdam([param], lr=0.1, **options)
    param.grad = gradient()
    for _ in range(steps):
        optimizer.step()
    return param, optimizer


def bits(param, optimizer):
    found = [param.detach().numpy().tobytes()]
    for value in optimizer.state[param].values():
        found.append(value.numpy().tobytes() if isinstance(value, torch.Tensor) else value)
    return found


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- one dict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_counts", COUNTS)
def test_the_dict_stays_the_same_one(step_counts):
    param, optimizer = stepped(1, step_counts=step_counts)
    entry = optimizer.state[param]
    for number in range(2, 5):
        optimizer.step()
        assert optimizer.state[param] is entry
        assert torch.as_tensor(entry["step"]).max() == number
    entry["exp_avg"] = entry["exp_avg"].clone()  # for which the engine begins with other memory
    optimizer.step()
    assert optimizer.state[param] is entry
    optimizer.state[param].clear()
    optimizer.step()
    assert optimizer.state[param] is entry
    assert torch.as_tensor(entry["step"]).max() == 1


def test_keys_of_the_user_are_kept():
    param, optimizer = stepped(0)
    optimizer.state[param]["seen"] = torch.arange(5.0, dtype=torch.float64)  # before the first step
    optimizer.step()
    entry = optimizer.state[param]
    entry["nested"] = {"of": [torch.ones(2, dtype=torch.float64), 3]}
    optimizer.step()
    assert entry["step"] == 2
    keys = {"step", "exp_avg", "exp_avg_sq", "seen", "nested"}
    assert set(entry) == keys
    other = torch.nn.Parameter(param.detach().clone())
    loaded = SparseAdam([other], lr=0.1)
    loaded.load_state_dict(saved(optimizer.state_dict()))
    param.grad = None
    copied = copy.deepcopy(optimizer)
    for each in (loaded, copied):
        (one,) = each.param_groups[0]["params"]
        one.grad = gradient()
        each.step()
        found = each.state[one]
        assert set(found) == keys
        assert found["step"] == 3
        assert found["seen"].tolist() == [0, 1, 2, 3, 4]
        assert found["nested"]["of"][1] == 3
        found["seen"][0] = found["nested"]["of"][0][0] = 7
    assert entry["seen"][0] == 0
    assert entry["nested"]["of"][0][0] == 1


def test_keys_of_the_user_alone_are_no_state():
    param, optimizer = stepped(0)
    optimizer.state[param]["mine"] = 5
    state = optimizer.state_dict()
    assert state["state"] == {0: {"mine": 5}}
    optimizer.load_state_dict(state)
    optimizer.step()
    expected, its = stepped(1)
    assert torch.equal(param, expected)
    assert optimizer.state[param]["mine"] == 5
    assert its.state[expected]["step"] == optimizer.state[param]["step"] == 1


def test_state_of_which_a_part_is_missing_is_refused():
    param, optimizer = stepped()
    before = param.detach().clone()
    del optimizer.state[param]["exp_avg"]
    with pytest.raises(errors.StateError, match=r"got \['exp_avg_sq', 'step'\], expected step, exp_avg and"):
        optimizer.step()
    assert torch.equal(param, before)


# --- what is assigned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "new tensors", "cleared"])
@pytest.mark.parametrize("step_counts", COUNTS)
def test_bias_correction_begins_anew(step_counts, how):
    param, optimizer = stepped(step_counts=step_counts)
    entry = optimizer.state[param]
    for _ in range(2):  # an entry that was kept goes on to be the one
        if how == "in place":
            entry["step"] = 0
            entry["exp_avg"].zero_()
            entry["exp_avg_sq"].zero_()
        elif how == "new tensors":
            entry.update(step=0, exp_avg=torch.zeros(5, 2), exp_avg_sq=torch.zeros_like(entry["exp_avg_sq"]))
        else:
            entry.clear()
        fresh = torch.nn.Parameter(param.detach().clone())
        expected = SparseAdam([fresh], lr=0.1, step_counts=step_counts)
        fresh.grad = param.grad
        for _ in range(2):
            optimizer.step()
            expected.step()
        assert bits(param, optimizer) == bits(fresh, expected)


@pytest.mark.parametrize("step", [100, np.int64(100), np.float32(100), 100.0, torch.tensor(100.0)])
def test_another_count_of_steps(step):
    param, optimizer = stepped()
    moments = optimizer.state[param]["exp_avg"]
    state = optimizer.state_dict()
    state["state"][0]["step"] = 100
    fresh = torch.nn.Parameter(param.detach().clone())
    expected = SparseAdam([fresh], lr=0.1)
    expected.load_state_dict(state)
    fresh.grad = param.grad
    optimizer.state[param]["step"] = step
    param.grad = torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(errors.DenseGradientError):
        optimizer.step()
    assert optimizer.state[param]["step"] is step  # a step that is refused changes nothing here either
    param.grad = gradient()
    for each in (optimizer, expected):
        each.step()
    assert bits(param, optimizer) == bits(fresh, expected)
    assert (type(optimizer.state[param]["step"]), optimizer.state[param]["step"]) == (int, 101)
    assert optimizer.state[param]["exp_avg"] is moments  # the memory is the same


def test_a_count_that_is_a_tensor_may_be_changed_again_before_the_step():
    param, optimizer = stepped()
    optimizer.state[param]["step"] = count = torch.tensor(7)
    param.grad = torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(errors.DenseGradientError):
        optimizer.step()
    count.fill_(20)
    param.grad = gradient()
    optimizer.step()
    assert optimizer.state[param]["step"] == 21


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
@pytest.mark.parametrize("step_counts", ["row", "element"])
def test_counts_may_be_given_in_any_dtype(step_counts, dtype):
    param, optimizer = stepped(step_counts=step_counts)
    counts = optimizer.state[param]["step"]
    optimizer.state[param]["step"] = (10 * counts).to(dtype)
    optimizer.step()
    assert optimizer.state[param]["step"].reshape(5, -1)[:, 0].tolist() == [0, 31, 0, 31, 0]


@pytest.mark.parametrize("step", [-1, 2**63, 1e30, 2.5, float("nan"), "many", None, torch.tensor(-2)])
@pytest.mark.parametrize("step_counts", COUNTS)
def test_what_counts_nothing_is_refused(step_counts, step):
    param, optimizer = stepped(step_counts=step_counts)
    entry = optimizer.state[param]
    kept, before = entry["step"], bits(param, optimizer)
    entry["step"] = step
    for _ in range(2):
        with pytest.raises(errors.StateError, match=r"state of parameter param_groups.*: step is .*expected"):
            optimizer.step()
    entry["step"] = kept
    assert bits(param, optimizer) == before
    optimizer.step()
    assert torch.as_tensor(optimizer.state[param]["step"]).max() == 4


@pytest.mark.parametrize("bad", [[1.5] * 5, [float("inf")] * 5, [-1] * 5, [2**63 - 1] * 5])
def test_counts_that_count_nothing_are_refused(bad):
    param, optimizer = stepped(step_counts="row")
    before = param.detach().clone()
    optimizer.state[param]["step"] = torch.tensor(bad)
    with pytest.raises(errors.StateError, match="step"):
        optimizer.step()
    assert torch.equal(param, before)


# --- counts that are changed in place ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, -(2**31)])
@pytest.mark.parametrize("step_counts", ["row", "element"])
def test_a_negative_count_is_refused_until_it_is_mended(step_counts, count):
    param, optimizer = stepped(step_counts=step_counts)
    counts = optimizer.state[param]["step"]
    counts[1] = count
    before = bits(param, optimizer)
    where = r"\[1\]" if step_counts == "row" else r"\[1, 0\]"
    for _ in range(2):
        with pytest.raises(errors.StateError, match=rf"step{where} is {count}, expected 0 <= step"):
            optimizer.step()
        assert bits(param, optimizer) == before
    counts[1] = 0
    optimizer.step()
    assert optimizer.state[param]["step"] is counts
    assert counts.reshape(5, -1)[:, 0].tolist() == [0, 1, 0, 4, 0]


@pytest.mark.parametrize("edit", ["indexed", "view", "fill_", "inference mode"])
@pytest.mark.parametrize("step_counts", ["row", "element"])
def test_a_count_at_the_end_of_its_type_goes_on(step_counts, edit):
    param, optimizer = stepped(step_counts=step_counts)
    counts = optimizer.state[param]["step"]
    assert counts.dtype == torch.int32
    if edit == "indexed":
        counts[1] = END_OF_INT32
    elif edit == "view":
        counts.view(5, -1)[1:2].add_(END_OF_INT32 - 3)
    elif edit == "fill_":
        counts.fill_(END_OF_INT32)
    else:
        with torch.inference_mode():
            counts[1] = END_OF_INT32
    table = param.detach().numpy().copy()
    engine = nb_sparse_adam.SparseAdam(
        table, lr=0.1, step_counts=step_counts, eps_hat=True, on_nonfinite="propagate"
    )
    entry = optimizer.state[param]
    engine.load_state_dict({
        **engine.state_dict(),
        "tables": {"table": {
            "exp_avg": entry["exp_avg"].numpy(), "exp_avg_sq": entry["exp_avg_sq"].numpy(),
            "steps": counts.numpy().astype(np.int64), "skipped_rows": 0,
        }},
    })  # fmt: skip
    for _ in range(2):
        optimizer.step()
        engine.step(RowGradient([1, 3], gradient()._values().numpy()))
    entry = optimizer.state[param]
    assert entry["step"].dtype == torch.int64
    assert entry["step"].reshape(5, -1)[1, 0] == END_OF_INT32 + 2
    np.testing.assert_array_equal(entry["step"].numpy(), engine.state["table"].steps)
    np.testing.assert_array_equal(param.detach().numpy(), table)


def test_a_count_that_nothing_can_have_come_to_is_refused():
    param, optimizer = stepped(step_counts="row")
    optimizer.state[param]["step"] = torch.full((5,), 2**40)
    optimizer.step()
    counts = optimizer.state[param]["step"]
    assert counts[1] == 2**40 + 1
    counts[1] = END_OF_INT64
    before = bits(param, optimizer)
    with pytest.raises(
        errors.StateError, match=rf"step\[1\] is {END_OF_INT64}, expected 0 <= step <= 2\*\*62"
    ):
        optimizer.step()
    assert bits(param, optimizer) == before


def test_state_under_inference_mode_tells_of_its_changes():
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
        optimizer = SparseAdam([param], lr=0.1, step_counts="row")
        param.grad = gradient()
        optimizer.step()
        optimizer.state[param]["step"][1] = -1
        with pytest.raises(errors.StateError, match=r"step\[1\] is -1"):
            optimizer.step()


# --- parameters ---------------------------------------------------------------------------------------------

OVERLAPPING = {
    "unfold": lambda: torch.ones(5).unfold(0, 3, 1),
    "expand": lambda: torch.ones(1, 3).expand(4, 3),
    "unfold of 2-D": lambda: torch.ones(4, 6).unfold(1, 3, 2),
    "rows that meet": lambda: torch.ones(20).as_strided((3, 4), (3, 1)),
    "3-D": lambda: torch.ones(60).as_strided((3, 3, 3), (7, 5, 2)),
    "in the last dimension": lambda: torch.ones(3, 1).expand(3, 2),
}
APART = {
    "transposed": lambda: torch.ones(3, 4).T,
    "permuted": lambda: torch.ones(2, 3, 4).permute(2, 0, 1),
    "with gaps": lambda: torch.ones(5, 9)[::2, ::3],
    "a column": lambda: torch.ones(5, 3)[:, 1],
    "every second row of unfold": lambda: torch.ones(9).unfold(0, 3, 3),
    "interleaved": lambda: torch.ones(20).as_strided((3, 2), (2, 3)),
    "of one row": lambda: torch.ones(7).as_strided((1, 3), (0, 2)),
    "empty": lambda: torch.ones(0, 3).expand(0, 3),
    "diagonal": lambda: torch.ones(4, 4).diagonal(),
}


@pytest.mark.parametrize("what", OVERLAPPING)
def test_a_parameter_of_which_two_elements_are_one_place_is_refused(what):
    made = OVERLAPPING[what]()
    with pytest.raises(
        errors.TableError, match=r"several elements are one place in memory.*\.contiguous\(\)"
    ):
        SparseAdam([torch.nn.Parameter(made)])
    param = torch.nn.Parameter(torch.ones(made.shape))
    optimizer = SparseAdam([param])
    param.grad = torch.ones(made.shape).to_sparse(1)
    optimizer.step()
    param.data = made  # since
    before = made.clone()
    with pytest.raises(errors.TableError, match="several elements are one place in memory"):
        optimizer.step()
    assert torch.equal(made, before)


@pytest.mark.parametrize("what", APART)
def test_a_parameter_with_any_other_strides_is_not(what):
    ours, theirs = (torch.nn.Parameter(APART[what]()) for _ in range(2))
    for optimizer, param in ((SparseAdam([ours]), ours), (torch.optim.SparseAdam([theirs]), theirs)):
        for _ in range(2):
            param.grad = torch.ones(param.shape).to_sparse(1)
            optimizer.step()
    torch.testing.assert_close(ours.detach(), theirs.detach())


def test_moments_that_are_assigned_may_overlap():
    param, optimizer = stepped()
    optimizer.state[param]["exp_avg_sq"] = torch.full((1, 2), 0.5, dtype=torch.float64).expand(5, 2)
    optimizer.step()
    found = optimizer.state[param]["exp_avg_sq"]
    assert found[0].tolist() == [0.5, 0.5]
    assert (found[[1, 3]] != 0.5).all()


def test_a_parameter_whose_storage_is_gone_is_refused():
    param, optimizer = stepped(0)
    param.untyped_storage().resize_(0)  # as FSDP does between two uses
    with pytest.raises(errors.TableError, match="has 0 bytes of memory, expected 80"):
        optimizer.step()
    param.untyped_storage().resize_(80)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
