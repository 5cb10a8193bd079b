# SPDX-License-Identifier: Apache-2.0
"""``optimizer.rearrange`` of the drop-in optimizer, held to doing it by hand through its state dict."""

import copy

import numpy as np
import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")

from nb_sparse_adam.torch import SparseAdam  # noqa: E402

ROWS = 6
SOURCES = {
    "append": [0, 1, 2, 3, 4, 5, -1, -1],
    "prune": [0, 2, 5],
    "reorder": [5, 3, 4, 0, 1, 2],
    "reset": [0, -1, 2, -1, 4, 5],
    "repeat": [1, 1, 1, 0, 0, 5, 3],
    "all at once": [4, -1, 4, 0, -1],
    "nothing left": [],
    "all fresh": [-1] * 9,
}
COUNTS = ["global", "row", "element"]


def gradient(rows, dim=(3,), seed=0, sparse_dim=1):
    rng = np.random.default_rng([seed, rows])
    shape = (rows, *dim)
    indices = np.stack([rng.integers(0, max(length, 1), 5 if rows else 0) for length in shape[:sparse_dim]])
    values = torch.from_numpy(rng.normal(size=(indices.shape[1], *shape[sparse_dim:])))
    return torch.sparse_coo_tensor(torch.from_numpy(indices), values, shape, check_invariants=True)


def made(dim=(3,), sparse_dim=1, steps=3, **options):
    """Two parameters with their optimizer, after some steps."""
    rng = np.random.default_rng(1)
    params = [torch.nn.Parameter(torch.from_numpy(rng.normal(size=(ROWS, *dim)))) for _ in range(2)]
    optimizer = SparseAdam([("first", params[0]), ("second", params[1])], lr=0.1, **options)
    for step in range(steps):
        go_on(params, optimizer, step, dim, sparse_dim)
    return params, optimizer


def go_on(params, optimizer, step, dim=(3,), sparse_dim=1):
    for param in params:
        param.grad = gradient(len(param), dim, step, sparse_dim)
    optimizer.step()


def bits(params, optimizer):
    found = [param.detach().contiguous().numpy().tobytes() for param in params]
    for param in params:
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            is_tensor = isinstance(value, torch.Tensor)
            found.append((key, value.contiguous().numpy().tobytes() if is_tensor else value))
    return found


def by_hand(state, at, source, step_counts):
    """A state dict whose entry's arrays have been rearranged, as one had to do it."""
    source = np.array(source, np.int64)

    def rows_of(tensor):
        old = tensor.numpy()
        new = np.zeros((len(source), *old.shape[1:]), old.dtype)
        for row, origin in enumerate(source):
            if origin >= 0:
                new[row] = old[origin]
        return torch.from_numpy(new)

    entry = state["state"][at]
    for key in ("exp_avg", "exp_avg_sq", *(() if step_counts == "global" else ("step",))):
        entry[key] = rows_of(entry[key])
    return state


@pytest.mark.parametrize("what", SOURCES)
@pytest.mark.parametrize("step_counts", COUNTS)
def test_the_bits_of_doing_it_by_hand(step_counts, what):
    source = SOURCES[what]
    params, optimizer = made(step_counts=step_counts)
    values = torch.from_numpy(np.random.default_rng(2).normal(size=(len(source), 3)))
    new, other = torch.nn.Parameter(values), torch.nn.Parameter(values.clone())
    others = [params[0].detach().clone().requires_grad_(), other]
    expected = SparseAdam([("first", others[0]), ("second", other)], lr=0.1, step_counts=step_counts)
    expected.load_state_dict(by_hand(optimizer.state_dict(), 1, source, step_counts))
    old = params[1]
    optimizer.rearrange(old, new, source)
    assert torch.equal(new, other)  # its values are the caller's
    assert optimizer.param_groups[0]["params"][1] is new
    assert old not in optimizer.state
    assert bits([params[0], new], optimizer) == bits(others, expected)
    for step in range(3, 6):
        go_on([params[0], new], optimizer, step)
        go_on(others, expected, step)
    assert bits([params[0], new], optimizer) == bits(others, expected)


@pytest.mark.parametrize(
    ("dim", "sparse_dim", "step_counts"),
    [((), 1, "row"), ((), 1, "element"), ((2, 2), 1, "row"), ((3,), 2, "element"), ((3, 2), 2, "global")],
)
def test_rows_of_any_shape_and_gradients_of_entries(dim, sparse_dim, step_counts):
    source = SOURCES["all at once"]
    params, optimizer = made(dim, sparse_dim, step_counts=step_counts)
    new, other = (torch.nn.Parameter(torch.ones(len(source), *dim, dtype=torch.float64)) for _ in range(2))
    others = [params[0].detach().clone().requires_grad_(), other]
    expected = SparseAdam(others, lr=0.1, step_counts=step_counts)
    expected.load_state_dict(by_hand(optimizer.state_dict(), 1, source, step_counts))
    optimizer.rearrange(params[1], new, np.array(source))
    for step in range(3, 6):
        go_on([params[0], new], optimizer, step, dim, sparse_dim)
        go_on(others, expected, step, dim, sparse_dim)
    assert bits([params[0], new], optimizer) == bits(others, expected)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda s: torch.tensor(s, dtype=torch.int32)])
def test_sources_of_any_kind(kind):
    source = SOURCES["all at once"]
    params, optimizer = made()
    before = optimizer.state[params[0]]["exp_avg"].clone()
    new = torch.nn.Parameter(torch.ones(len(source), 3, dtype=torch.float64))
    optimizer.rearrange(params[0], new, kind(source))
    found = optimizer.state[new]["exp_avg"]
    assert torch.equal(found[[0, 2, 3]], before[[4, 4, 0]])
    assert not found[[1, 4]].any()


def test_parameters_need_not_be_contiguous():
    _, optimizer = made(step_counts="row")
    new = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64).T)
    other = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    copied = copy.deepcopy(optimizer)
    for each, to in ((optimizer, new), (copied, other)):
        (old, _) = each.param_groups[0]["params"]
        each.rearrange(old, to, [1, 0, -1, 3])
        to.grad = gradient(4)
        each.step()
    assert bits([new], optimizer) == bits([other], copied)


def test_the_same_parameter_with_other_rows():
    params, optimizer = made(step_counts="row")
    param, source = params[0], [3, -1, 0, 1]
    copied = copy.deepcopy(optimizer)
    (old, _) = copied.param_groups[0]["params"]
    new = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    copied.rearrange(old, new, source)
    param.data = torch.ones(4, 3, dtype=torch.float64)
    optimizer.rearrange(param, param, source)
    for each, to in ((optimizer, param), (copied, new)):
        assert each.param_groups[0]["params"][0] is to
        to.grad = gradient(4)
        each.step()
    assert bits([param], optimizer) == bits([new], copied)


def test_keys_of_the_user_are_kept_and_the_dict_is():
    params, optimizer = made()
    entry = optimizer.state[params[0]]
    entry["seen"] = seen = torch.arange(ROWS)
    new = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer.rearrange(params[0], new, [1, 2])
    assert optimizer.state[new] is entry
    assert entry["seen"] is seen
    assert entry["exp_avg"].shape == (2, 3)
    assert set(optimizer.state) == {new, params[1]}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[new]["seen"].tolist() == seen.tolist()


def test_what_was_assigned_since_the_last_step_is_what_is_rearranged():
    params, optimizer = made(step_counts="row")
    entry = optimizer.state[params[0]]
    entry["exp_avg"] = torch.arange(18.0).reshape(6, 3)
    entry["step"][4] = 100
    new = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer.rearrange(params[0], new, [4, 0])
    assert optimizer.state[new]["exp_avg"][0].tolist() == [12, 13, 14]
    assert optimizer.state[new]["step"][0] == 100


def test_counts_of_64_bits_stay_so():
    params, optimizer = made(step_counts="row")
    optimizer.state[params[0]]["step"].fill_(2**31 - 1)
    go_on(params, optimizer, 5)
    assert optimizer.state[params[0]]["step"].max() == 2**31
    row = int(optimizer.state[params[0]]["step"].argmax())
    new = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer.rearrange(params[0], new, [row, -1])
    assert optimizer.state[new]["step"].tolist() == [2**31, 0]


@pytest.mark.parametrize("keys", [{}, {"mine": 3}])
def test_a_parameter_that_was_never_stepped_just_takes_the_place(keys):
    params, optimizer = made(steps=0)
    optimizer.state[params[0]].update(keys)
    new = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer.rearrange(params[0], new, [1, -1])
    assert optimizer.state.get(new, {}) == keys
    assert params[0] not in optimizer.state
    go_on([new, params[1]], optimizer, 0)
    assert [optimizer.state[p]["step"] for p in (new, params[1])] == [1, 1]
    assert optimizer.state[new].keys() == {"step", "exp_avg", "exp_avg_sq", *keys}


def test_skipped_rows_stay():
    params, optimizer = made(on_nonfinite="skip")
    params[0].grad = gradient(ROWS) * float("nan")
    optimizer.step()
    skipped = optimizer.skipped_rows[params[0]]
    assert skipped > 0
    new = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer.rearrange(params[0], new, [1, -1])
    assert optimizer.skipped_rows[new] == skipped
    assert params[0] not in optimizer.skipped_rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": [0, 6]}, errors.StateError, r"rearrange of parameter first: source\[1\] is 6, expected"),
        ({"source": [0, -2]}, errors.StateError, r"source\[1\] is -2"),
        ({"source": [0]}, errors.StateError, r"source has shape \(1,\), expected \(2,\)"),
        ({"source": [0.0, 1.0]}, errors.StateTypeError, "source has dtype float64"),
        ({"source": torch.tensor([True, False])}, errors.StateTypeError, "source has dtype bool"),
        ({"new": torch.ones(2, 3)}, errors.TableError, r"torch\.float32.*expected a dense .*torch\.float64"),
        ({"new": torch.ones(2, 4, dtype=torch.float64)}, errors.TableError, r"shape \(2, 4\), expected"),
        ({"new": torch.ones((), dtype=torch.float64)}, errors.TableError, r"shape \(\), expected"),
        ({"new": np.ones((2, 3))}, errors.TableTypeError, "the new one is a ndarray"),
        (
            {"new": torch.ones(1, 3, dtype=torch.float64).expand(2, 3)},
            errors.TableError,
            "several elements are one place in memory",
        ),
        (
            {"new": torch.ones(2, 3, dtype=torch.float64, requires_grad=True) * 2},
            errors.TableError,
            "computed from others",
        ),
        ({"new": torch.ones(2, 3, dtype=torch.float64, device="meta")}, errors.TableError, "device meta"),
        ({"old": torch.ones(2)}, errors.TableError, "in none of this optimizer's groups"),
        ({"new": "second"}, errors.TableError, "the new parameter is second of this optimizer"),
    ],
)
def test_what_is_refused_changes_nothing(change, error, message):
    params, optimizer = made(step_counts="row")
    given = {
        "old": params[0],
        "new": torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64)),
        "source": [0, 1],
        **change,
    }
    if isinstance(given["new"], str):
        given["new"] = params[1]
    before, entries = bits(params, optimizer), dict(optimizer.state)
    with pytest.raises(error, match=message):
        optimizer.rearrange(given["old"], given["new"], given["source"])
    assert bits(params, optimizer) == before
    assert optimizer.param_groups[0]["params"] == params
    assert all(optimizer.state[p] is entries[p] for p in params)
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_state_that_cannot_be_gone_on_with_is_refused(key):
    params, optimizer = made(step_counts="row")
    optimizer.state[params[0]][key] = torch.zeros(4, 3)
    new = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(errors.StateError, match=f"state of parameter first: .*{key}"):
        optimizer.rearrange(params[0], new, [0, 1])
    assert optimizer.param_groups[0]["params"][0] is params[0]
    assert new not in optimizer.state


def test_densify_and_prune():
    """As gsplat's strategies do it, for several parameters of the same Gaussians."""
    rng = np.random.default_rng(3)
    splats = {
        name: torch.nn.Parameter(torch.from_numpy(rng.normal(size=(ROWS, *shape))))
        for name, shape in (("means", (3,)), ("scales", (3,)), ("opacities", ()), ("sh0", (1, 3)))
    }
    optimizers = {
        name: SparseAdam([{"params": [param], "name": name}], lr=0.01, step_counts="row")
        for name, param in splats.items()
    }
    for step in range(12):
        for name, param in splats.items():
            param.grad = gradient(len(param), tuple(param.shape[1:]), step)
            optimizers[name].step()
        if step % 4 == 3:  # the first two are split, the last one goes
            kept = torch.arange(len(splats["means"]) - 1)
            source = torch.cat([kept, torch.tensor([-1, -1])])
            for name, param in splats.items():
                rows = torch.cat([kept, torch.tensor([0, 1])])
                counts = optimizers[name].state[param]["step"].clone()
                splats[name] = torch.nn.Parameter(param.detach()[rows])
                optimizers[name].rearrange(param, splats[name], source)
                found = optimizers[name].state[splats[name]]["step"]
                assert found.tolist() == [*counts[:-1].tolist(), 0, 0]
    assert len(splats["means"]) == ROWS + 3
    assert all(param.isfinite().all() for param in splats.values())
