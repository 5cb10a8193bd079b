# SPDX-License-Identifier: Apache-2.0
"""State dicts, pickles and copies of the drop-in optimizer: of one moment, shared with nobody, loadable."""

import copy
import io
import math
import pickle
import threading

import numpy as np
import pytest
from needs import need

torch = need("torch")

from nb_sparse_adam.torch import SparseAdam  # noqa: E402

ROWS, DIM = 5, 2


def made(dtype=torch.float64, **options):
    param = torch.nn.Parameter(torch.ones(ROWS, DIM, dtype=dtype))
    param.grad = torch.ones(ROWS, DIM, dtype=dtype).to_sparse(1)
    return param, SparseAdam([param], **options)


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- options are copied, and plain ------------------------------------------------------------------------


def test_a_tensor_lr_is_copied():
    _, optimizer = made(lr=torch.tensor(0.5))
    kept = optimizer.state_dict()["param_groups"][0]
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert (kept["lr"].item(), optimizer.param_groups[0]["lr"].item()) == (0.5, 0.25)
    kept["lr"].zero_()
    assert optimizer.param_groups[0]["lr"].item() == 0.25


@pytest.mark.parametrize("kind", ["list", "list of tensors", "tuple of tensors", "array", "tensor"])
def test_betas_are_copied(kind):
    param, optimizer = made()
    group = optimizer.param_groups[0]
    first = torch.tensor(0.5, dtype=torch.float64) if "tensors" in kind else 0.5
    pair = [first, 0.75]
    group["betas"] = {
        "list": lambda: pair,
        "list of tensors": lambda: pair,
        "tuple of tensors": lambda: tuple(pair),
        "array": lambda: np.array(pair),
        "tensor": lambda: torch.tensor(pair, dtype=torch.float64),
    }[kind]()
    optimizer.step()
    kept = optimizer.state_dict()
    if "tensors" in kind:
        first.fill_(0.25)
    else:
        group["betas"][0] = 0.25
    assert [float(beta) for beta in kept["param_groups"][0]["betas"]] == [0.5, 0.75]
    assert [float(beta) for beta in saved(kept)["param_groups"][0]["betas"]] == [0.5, 0.75]
    optimizer.step()  # which hears of it
    assert optimizer.state[param]["exp_avg"][0, 0].item() == 0.25 * 0.5 + 0.75 * 1


def test_what_else_is_in_a_group_is_copied():
    _, optimizer = made()
    optimizer.param_groups[0]["mine"] = {"seen": [torch.zeros(2), np.float32(1)]}
    kept = saved(optimizer.state_dict())["param_groups"][0]["mine"]
    assert type(kept["seen"][1]) is float
    shared = optimizer.state_dict()["param_groups"][0]["mine"]
    optimizer.param_groups[0]["mine"]["seen"][0].add_(1)
    assert shared["seen"][0].tolist() == [0, 0]


@pytest.mark.parametrize("scalar", [np.float64, np.float32, np.longdouble])
def test_numpys_scalars_become_pythons(scalar):
    param, optimizer = made(lr=scalar(0.25), betas=(scalar(0.5), scalar(0.75)), eps=scalar(0.125))
    optimizer.param_groups[0]["maximize"] = np.bool_(True)
    optimizer.step()
    optimizer.state[param]["mine"] = scalar(2)
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    for value in (group["lr"], *group["betas"], group["eps"], state["state"][0]["mine"]):
        assert type(value) is float
    assert group["maximize"] is True
    loaded = saved(state)
    other, copied = made()
    copied.load_state_dict(loaded)
    copied.step()
    assert copied.state[other]["mine"] == 2


def test_a_scheduler_that_computes_with_numpy():
    param, optimizer = made(lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(epoch / 10))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    state = saved(optimizer.state_dict())
    assert state["param_groups"][0]["lr"] == math.cos(0.3)
    assert param.isfinite().all()


def test_a_sparse_tensor_of_the_users_is_copied():
    param, optimizer = made()
    optimizer.step()
    optimizer.state[param]["mine"] = torch.eye(2).to_sparse()
    kept = optimizer.state_dict()["state"][0]["mine"]
    optimizer.state[param]["mine"]._values().zero_()
    assert kept.to_dense().tolist() == [[1, 0], [0, 1]]


# --- of one moment ----------------------------------------------------------------------------------------


class Stepping:
    """Another thread that steps, and stops when the block ends."""

    def __init__(self, optimizer):
        self.optimizer, self.over, self.failure = optimizer, threading.Event(), None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            while not self.over.wait(1e-4):  # which lets another one have its turn
                self.optimizer.step()
        except BaseException as error:  # noqa: BLE001 (raised below)
            self.failure = error

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        assert self.failure is None


def steps_of(param, entry):
    """How often parameter, moment and count have been stepped, with gradients of 1: each step moves by lr."""
    by_moment = math.log1p(-entry["exp_avg"][0, 0].item()) / math.log(0.9999)
    by_values = {round((1 - value) / 0.001) for value in param.detach().flatten().tolist()}
    return by_values | {round(by_moment), entry["step"]}


class Slow:
    """Takes long to be copied: another thread steps meanwhile, if it may."""

    def __reduce__(self):
        for _ in range(200):
            threading.Event().wait(1e-5)
        return Slow, ()


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def through_torch_save(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_after_the_parameter(optimizer):
    return copy.deepcopy((optimizer.param_groups[0]["params"], Slow(), optimizer))[2]


@pytest.mark.jit
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copied_after_the_parameter, pickled, through_torch_save]
)
def test_a_copy_while_another_thread_steps_is_of_one_moment(duplicate):
    _, optimizer = made(betas=(0.9999, 0.999))
    optimizer.step()
    optimizer.defaults["slow"] = Slow()  # which comes before the parameters
    with Stepping(optimizer):
        for _ in range(3):
            copied = duplicate(optimizer)
            (param,) = copied.param_groups[0]["params"]
            assert len(steps_of(param, copied.state[param])) == 1


@pytest.mark.jit
def test_a_state_dict_while_another_thread_steps_is_of_one_moment():
    params = [torch.nn.Parameter(torch.ones(500, 4)) for _ in range(8)]
    optimizer = SparseAdam(params)
    for param in params:
        param.grad = torch.ones(500, 4).to_sparse(1)
    optimizer.step()
    with Stepping(optimizer):
        for _ in range(10):
            state = optimizer.state_dict()["state"]
            assert len({entry["step"] for entry in state.values()}) == 1
            assert (
                len({value for entry in state.values() for value in entry["exp_avg"].unique().tolist()}) == 1
            )


def test_a_shallow_copy_has_the_same_parameters_and_state_of_its_own():
    param, optimizer = made()
    optimizer.step()
    other = copy.copy(optimizer)
    assert other.param_groups[0]["params"][0] is param
    assert other.state[param] is not optimizer.state[param]
    optimizer.step()
    assert (other.state[param]["step"], optimizer.state[param]["step"]) == (1, 2)


def test_a_copy_for_other_parameters_leaves_them_their_values():
    param, other = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.full((3, 2), 7.0))
    optimizer = SparseAdam([param], lr=0.1)
    param.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
    optimizer.step()
    copied = copy.deepcopy(optimizer, {id(param): other})
    assert torch.equal(other.detach(), torch.full((3, 2), 7.0))
    assert copied.state[other]["step"] == 1


def test_what_other_processes_have_too_is_not_set_back():
    param = torch.nn.Parameter(torch.zeros(3, 2))
    param.share_memory_()
    optimizer = SparseAdam([param], lr=0.1)
    steps = []
    for _ in range(2):
        param.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
        optimizer.step()
        steps.append(optimizer.__getstate__())
    after = param.detach().clone()
    SparseAdam.__new__(SparseAdam).__setstate__(steps[0])
    assert torch.equal(param.detach(), after)


def test_a_reset_holds_after_a_step_that_was_refused():
    param = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = SparseAdam([param], lr=0.1, on_nonfinite="raise")

    def step(value):
        values = torch.full((1, 2), value)
        param.grad = torch.sparse_coo_tensor([[0]], values, (3, 2), check_invariants=True)
        optimizer.step()

    for _ in range(3):
        step(1.0)
    optimizer.state[param] = dict(optimizer.state[param])
    with pytest.raises(ValueError, match="finite"):
        step(float("nan"))
    optimizer.state.clear()
    step(1.0)
    assert optimizer.state[param]["step"] == 1
    assert float(optimizer.state[param]["exp_avg"][0, 0]) == pytest.approx(0.1)
