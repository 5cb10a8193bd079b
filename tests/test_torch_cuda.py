# SPDX-License-Identifier: Apache-2.0
"""``nb_sparse_adam.torch`` with parameters on a GPU: the bits of the CPU, in numba's simulator and on a GPU.

In the simulator tensors of the CPU pass for a GPU's (`place`). Tests on a GPU are collected where torch has
one.
"""

import copy
import io
import pickle
import threading
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")

from nb_sparse_adam._src.torch import backward  # noqa: E402
from nb_sparse_adam._src.torch.tensors import Gpu  # noqa: E402
from nb_sparse_adam.torch import Embedding, EmbeddingBag, SparseAdam, accumulate  # noqa: E402

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
__test__ = SIMULATED or torch.cuda.is_available()  # else there is nothing to collect, and nothing to skip

pytestmark = pytest.mark.gpu

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6}
ROWS, DIM = 9, 4


class Interface:
    """A tensor of the CPU, seen as memory of a simulated GPU."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.__cuda_array_interface__ = {**tensor.numpy().__array_interface__, "version": 3}


class Place:
    """Where a test is run: parameters are on the GPU, if not made by `on_host`."""

    def __init__(self):
        self.simulated = SIMULATED
        self.device = "cpu" if SIMULATED else "cuda"
        self.hosts = []

    def has(self, tensor):
        return all(tensor.data_ptr() != host.data_ptr() for host in self.hosts)

    def param(self, shape=(ROWS, DIM), dtype=torch.float32, seed=0):
        values = np.array(np.random.default_rng(seed).normal(size=shape))
        return torch.nn.Parameter(torch.from_numpy(values).to(dtype).to(self.device))

    def on_host(self, tensor):
        """A copy of a parameter on the CPU."""
        made = torch.nn.Parameter(tensor.detach().cpu().clone())
        self.hosts.append(made)
        return made

    def assert_same(self, ours, expected):
        """The same bits; on a GPU the same numbers."""
        __tracebackhide__ = True
        ours, expected = (value.detach().cpu() for value in (ours, expected))
        if self.simulated:
            np.testing.assert_array_equal(ours.numpy(), expected.numpy())
        else:
            torch.testing.assert_close(ours, expected)

    def assert_same_state(self, optimizer, param, expected, other):
        __tracebackhide__ = True
        assert (optimizer._param_states[param].on_gpu, expected._param_states[other].on_gpu) == (True, False)
        self.assert_same(param, other)
        entry, wanted = optimizer.state[param], expected.state[other]
        assert entry.keys() == wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert entry[key].device.type == self.device
                self.assert_same(entry[key], value)
            else:
                assert (key, type(entry[key]), entry[key]) == (key, int, value)


@pytest.fixture
def place(monkeypatch):
    place = Place()
    if place.simulated:
        monkeypatch.setattr(Gpu, "has", staticmethod(place.has))
        monkeypatch.setattr(Gpu, "for_engine", staticmethod(Interface))
        monkeypatch.setattr(
            Gpu, "for_torch", staticmethod(lambda array, device: torch.from_numpy(np.asarray(array._ary)))
        )
    return place


@pytest.fixture
def unheard(place, monkeypatch):
    """A GPU that is far behind the host: nothing is known of a step before somebody waits."""
    from nb_sparse_adam._src.cuda.guard import Guard

    monkeypatch.setattr(Guard, "tell", lambda *_: None)


def gradient(rng, shape=(ROWS, DIM), sparse_dim=1, nnz=7, dtype=torch.float32):
    indices = np.stack([rng.integers(0, length, nnz) for length in shape[:sparse_dim]])
    values = torch.from_numpy(np.array(rng.normal(size=(nnz, *shape[sparse_dim:])))).to(dtype)
    return torch.sparse_coo_tensor(torch.from_numpy(indices), values, shape, check_invariants=True)


def replaced(grad, row):
    """A gradient as a buggy extension may make it: nothing checks its indices."""
    indices = grad._indices().clone()
    indices[0, -1] = row
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_coo_tensor(indices, grad._values(), grad.shape, check_invariants=False)


def step(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.device)
    optimizer.step()


def snapshot(params, optimizer):
    """Every bit of parameters and state, but for numbers that the host counts."""
    tensors = [*params]
    for param in params:
        tensors.extend(v for v in optimizer.state.get(param, {}).values() if isinstance(v, torch.Tensor))
    return [tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors]


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sparse_dim", "step_counts", "dtype"),
    [
        ((ROWS, DIM), 1, "global", torch.float32),
        ((ROWS, DIM), 1, "row", torch.float64),
        ((ROWS, DIM), 1, "element", torch.float32),
        ((ROWS,), 1, "element", torch.float64),
        ((ROWS, 5), 2, "global", torch.float64),
        ((4, 3, 2), 2, "element", torch.float32),
        ((4, 3, 2), 3, "global", torch.float64),
    ],
)
def test_the_bits_of_the_cpu(place, shape, sparse_dim, step_counts, dtype):
    param, rng = place.param(shape, dtype), np.random.default_rng(1)
    other = place.on_host(param)
    torchs = torch.nn.Parameter(other.detach().clone())
    optimizer, expected = (SparseAdam([p], step_counts=step_counts, **OPTIONS) for p in (param, other))
    theirs = torch.optim.SparseAdam([torchs], **OPTIONS)
    for nnz in (7, 0, 11):
        grad = gradient(rng, shape, sparse_dim, nnz, dtype)
        for each, p in ((optimizer, param), (expected, other), (theirs, torchs)):
            step(each, [p], [grad])
        place.assert_same_state(optimizer, param, expected, other)
    if step_counts == "global":
        torch.testing.assert_close(param.detach().cpu(), torchs.detach(), rtol=2e-5, atol=2e-6)
        assert optimizer.state[param]["step"] == theirs.state[torchs]["step"]


def test_gradients_of_torchs_embedding(place):
    layer = torch.nn.Embedding(ROWS, DIM, sparse=True, device=place.device)
    other = place.on_host(layer.weight)
    optimizer, expected = SparseAdam([layer.weight], **OPTIONS), torch.optim.SparseAdam([other], **OPTIONS)
    ids = torch.tensor([3, 1, 3])
    layer(ids.to(place.device)).sum().backward()  # its values are one number, spread
    optimizer.step()
    other.grad = layer.weight.grad.cpu()
    expected.step()
    torch.testing.assert_close(layer.weight.detach().cpu(), other.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("device_checks", ["immediate", "deferred"])
def test_parameters_need_not_be_contiguous(place, device_checks):
    param, rng = torch.nn.Parameter(place.param((DIM, ROWS)).detach().T), np.random.default_rng(2)
    other = place.on_host(param)
    optimizer, expected = SparseAdam([param], device_checks=device_checks), SparseAdam([other])
    for _ in range(2):
        grad = gradient(rng)
        step(optimizer, [param], [grad])
        step(expected, [other], [grad])
        place.assert_same_state(optimizer, param, expected, other)
        with torch.no_grad():  # by another hand
            param[0].mul_(2)
            other[0].mul_(2)
    assert not param.is_contiguous()
    before = snapshot([param], optimizer)
    with pytest.raises(errors.GradientIndexError, match=r"indices\[0, 6\] is 9, expected 0 <= index < 9"):
        step(optimizer, [param], [replaced(gradient(rng), ROWS)])
    assert snapshot([param], optimizer) == before


def test_parameters_on_both(place):
    param, host = place.param(), place.on_host(place.param((6, 3), seed=1))
    others = [place.on_host(p) for p in (param, host)]
    optimizer, expected = (SparseAdam(p, on_nonfinite="raise", **OPTIONS) for p in ([param, host], others))
    rng = np.random.default_rng(3)
    for _ in range(2):
        grads = [gradient(rng), gradient(rng, (6, 3))]
        step(optimizer, [param, host], grads)
        step(expected, others, grads)
    place.assert_same_state(optimizer, param, expected, others[0])
    before = snapshot([param, host], optimizer)
    for device_checks in ("immediate", "deferred"):
        optimizer.device_checks = device_checks
        for wrong in (0, 1):
            bad = [grad * float("nan") if i == wrong else grad for i, grad in enumerate(grads)]
            with pytest.raises(errors.NonFiniteGradientError, match=rf"params'\]\[{wrong}\]"):
                step(optimizer, [param, host], bad)
            assert snapshot([param, host], optimizer) == before
            assert [optimizer.state[p]["step"] for p in (param, host)] == [2, 2]
    step(optimizer, [param, host], grads)
    step(expected, others, grads)
    place.assert_same_state(optimizer, param, expected, others[0])


@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize("wrong", ["row", "nan"])
def test_one_wrong_gradient_and_nothing_is_changed(place, wrong, sparse_dim):
    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(4)
    optimizer = SparseAdam(params, on_nonfinite="raise")
    step(optimizer, params, [gradient(rng, sparse_dim=sparse_dim) for _ in params])
    before = snapshot(params, optimizer)
    grads = [gradient(rng, sparse_dim=sparse_dim) for _ in params]
    bad = replaced(grads[1], ROWS) if wrong == "row" else grads[1] * float("inf")
    with pytest.raises(errors.GradientError, match=r"params'\]\[1\].* is (9|-?inf)"):
        step(optimizer, params, [grads[0], bad])
    assert snapshot(params, optimizer) == before
    assert [optimizer.state[p]["step"] for p in params] == [1, 1]
    step(optimizer, params, grads)
    assert [optimizer.state[p]["step"] for p in params] == [2, 2]
    assert snapshot(params, optimizer) != before


def test_rows_that_are_skipped_are_counted(place):
    param = place.param()
    optimizer = SparseAdam([param], on_nonfinite="skip")
    grad = gradient(np.random.default_rng(5)) * float("inf")
    step(optimizer, [param], [grad])
    skipped = {param: len(set(grad._indices()[0].tolist()))}
    assert optimizer.skipped_rows == skipped
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_rows == skipped


def test_torchs_threads_are_for_the_cpu(place):
    param, before = place.param(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step(SparseAdam([param]), [param], [gradient(np.random.default_rng(16))])
    finally:
        torch.set_num_threads(before)


def test_one_gpu_a_step(place):
    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(6)
    optimizer = SparseAdam(params)
    grads = [gradient(rng) for _ in params]
    step(optimizer, params, grads)
    before = snapshot(params, optimizer)
    optimizer._param_states[params[1]].device = torch.device("cuda", 1)
    with pytest.raises(errors.TableError, match=r"params'\]\[0\] on .* and .* on cuda:1, expected one GPU"):
        step(optimizer, params, grads)
    assert snapshot(params, optimizer) == before


# --- state ------------------------------------------------------------------------------------------------


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("step_counts", ["global", "row", "element"])
def test_a_state_goes_from_the_cpu_to_a_gpu_and_back(place, step_counts):
    gpu, rng = place.param(), np.random.default_rng(7)
    host = place.on_host(gpu)
    expected = place.on_host(gpu)
    optimizers = [SparseAdam([p], step_counts=step_counts, **OPTIONS) for p in (gpu, host, expected)]
    grads = [gradient(rng) for _ in range(3)]
    for grad, (at, to) in zip(
        grads, [((gpu, 0), (host, 1)), ((host, 1), (gpu, 0)), ((gpu, 0), (host, 1))], strict=True
    ):
        step(optimizers[at[1]], [at[0]], [grad])
        step(optimizers[2], [expected], [grad])
        with torch.no_grad():
            to[0].copy_(at[0])
        state = optimizers[at[1]].state_dict()
        for value in state["state"][0].values():
            assert not isinstance(value, torch.Tensor) or (
                value.is_contiguous() and value.device == at[0].device
            )
        optimizers[to[1]].load_state_dict(saved(state))
    place.assert_same_state(optimizers[0], gpu, optimizers[2], expected)
    assert optimizers[1].state[host].keys() == optimizers[2].state[expected].keys()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_with_the_same_bits_and_by_itself(place, how):
    param, rng = place.param(), np.random.default_rng(8)
    optimizer = SparseAdam([param], device_checks="deferred", **OPTIONS)
    grads = [gradient(rng) for _ in range(2)]
    step(optimizer, [param], grads[:1])
    param.grad = None
    before = snapshot([param], optimizer)
    duplicate = copy.deepcopy if how == "deepcopy" else lambda value: pickle.loads(pickle.dumps(value))
    other, copied = duplicate((param, optimizer))
    assert copied.device_checks == "deferred"
    step(copied, [other], grads[1:])
    assert snapshot([param], optimizer) == before
    step(optimizer, [param], grads[1:])
    assert snapshot([param], optimizer) == snapshot([other], copied)
    assert copied.state[other]["step"] == optimizer.state[param]["step"] == 2


def test_the_state_is_live_and_goes_on_as_it_was_changed_by_hand(place):
    param, rng = place.param(), np.random.default_rng(9)
    other = torch.nn.Parameter(param.detach().cpu().clone())
    optimizer, expected = SparseAdam([param], **OPTIONS), torch.optim.SparseAdam([other], **OPTIONS)
    for number in range(4):
        grad = gradient(rng)
        step(optimizer, [param], [grad])
        step(expected, [other], [grad])
        live = optimizer.state[param]["exp_avg"]
        for entry in (optimizer.state[param], expected.state[other]):
            if number == 0:
                entry["exp_avg"].mul_(0.5)
            elif number == 1:
                entry["step"] = 100
            elif number == 2:
                entry["exp_avg_sq"] = torch.full_like(entry["exp_avg_sq"], 0.25)
    assert optimizer.state[param]["step"] == expected.state[other]["step"] == 102
    torch.testing.assert_close(param.detach().cpu(), other.detach(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(live.cpu(), expected.state[other]["exp_avg"], rtol=2e-5, atol=2e-6)


# --- device_checks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_checks", ["deferred", "off"])
def test_a_step_waits_for_nothing(place, monkeypatch, device_checks):
    from nb_sparse_adam._src.cuda import guard, steps, table

    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(10)
    optimizer = SparseAdam(params, device_checks=device_checks)
    grads = [gradient(rng) for _ in params]
    step(optimizer, params, grads)  # in which tables of corrections are copied
    for module in (guard, steps, table):
        monkeypatch.setattr(module, "copy_to_host", None)
    optimizer.param_groups[0]["lr"] = 0.5
    step(optimizer, params, grads)
    assert [optimizer.state[p]["step"] for p in params] == [2, 2]


@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_a_deferred_error_is_raised_by_the_next_step(place, sparse_dim):
    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(11)
    optimizer = SparseAdam(params, device_checks="deferred")
    grads = [gradient(rng, sparse_dim=sparse_dim) for _ in params]
    step(optimizer, params, grads)
    before = snapshot(params, optimizer)
    step(optimizer, params, [replaced(grads[0], ROWS), grads[1]])
    if not place.simulated:
        torch.cuda.synchronize()
    assert snapshot(params, optimizer) == before
    with pytest.raises(errors.GradientIndexError, match=r"params'\]\[0\].* is (9|-1), expected 0 <= row"):
        step(optimizer, params, [None, grads[1]])  # of another parameter
    assert snapshot(params, optimizer) == before
    assert [optimizer.state[p]["step"] for p in params] == [1, 1]
    step(optimizer, params, [None, grads[1]])
    optimizer.synchronize()
    assert [optimizer.state[p]["step"] for p in params] == [1, 2]
    assert snapshot(params, optimizer) != before


@pytest.mark.parametrize(
    "how", ["synchronize", "state_dict", "deepcopy", "load_state_dict", "device_checks", "memory"]
)
def test_a_deferred_error_is_not_lost(place, unheard, how):
    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(12)
    optimizer = SparseAdam(params, device_checks="deferred")
    grads = [gradient(rng) for _ in params]
    step(optimizer, params, grads)
    before, state = snapshot(params, optimizer), optimizer.state_dict()
    step(optimizer, params, [replaced(grads[0], -3), grads[1]])
    step(optimizer, params, [None, grads[1]])  # writes nothing either
    if place.simulated:
        assert [optimizer.state[p]["step"] for p in params] == [2, 3]
    params[0].grad = None
    if how == "memory":
        params[1].data = params[1].data.clone()
    call = {
        "synchronize": optimizer.synchronize,
        "state_dict": optimizer.state_dict,
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "device_checks": lambda: setattr(optimizer, "device_checks", "off"),
        "memory": optimizer.step,
    }[how]
    with pytest.raises(errors.GradientIndexError, match=r"params'\]\[0\].* is -3, expected 0 <= row"):
        call()
    assert snapshot(params, optimizer) == before
    assert [optimizer.state[p]["step"] for p in params] == [1, 1]
    step(optimizer, params, grads)
    optimizer.synchronize()
    assert [optimizer.state[p]["step"] for p in params] == [2, 2]
    assert snapshot(params, optimizer) != before


def test_a_deferred_error_comes_before_the_error_of_a_later_step(place, unheard):
    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(13)
    optimizer = SparseAdam(params, device_checks="deferred")
    step(optimizer, params, [replaced(gradient(rng), ROWS), gradient(rng)])
    with pytest.raises(errors.DenseGradientError):  # before any GPU is asked
        step(optimizer, params, [None, gradient(rng).to_dense()])
    ours = torch.sparse_coo_tensor(
        torch.tensor([[1]], device=place.device), params[1].detach()[:1], (ROWS, DIM), check_invariants=True
    )
    with pytest.raises(errors.GradientIndexError, match=r"params'\]\[0\].* is 9") as raised:
        step(optimizer, params, [None, ours])
    assert "shares memory with a table" in str(raised.value.__cause__)
    optimizer.synchronize()
    step(optimizer, params, [gradient(rng), None])
    assert [optimizer.state[p]["step"] for p in params] == [1, 0]


def test_a_step_that_waits_raises_what_others_were_refused_for(place, unheard):
    params, rng = [place.param(seed=seed) for seed in range(2)], np.random.default_rng(15)
    params.append(place.on_host(params[0]))
    optimizer = SparseAdam(params, device_checks="deferred")
    step(optimizer, params, [replaced(gradient(rng), ROWS), gradient(rng), None])
    before = snapshot(params, optimizer)
    with pytest.raises(errors.GradientIndexError, match=r"params'\]\[0\].* is 9"):
        step(optimizer, params, [None, gradient(rng), gradient(rng)])  # waits, for one is on the CPU
    assert snapshot(params, optimizer) == before
    step(optimizer, params, [None, gradient(rng), gradient(rng)])
    optimizer.synchronize()
    assert [optimizer.state[p]["step"] for p in params] == [0, 1, 1]


def test_layers_of_one_pass_are_one_step(place, unheard):
    first, second = (
        Embedding(ROWS, DIM, device=place.device, optimizer={"device_checks": checks, "on_nonfinite": how})
        for checks, how in (("deferred", "raise"), ("off", "propagate"))
    )
    ids = torch.tensor([2, 5], device=place.device)
    (first(ids).sum() + second(ids).sum()).backward()
    layers = [first, second]
    before = [snapshot([layer.weight], layer.optimizer) for layer in layers]
    (first(ids).sum() * float("nan") + second(ids).sum()).backward()
    second(ids).sum().backward()
    assert [snapshot([layer.weight], layer.optimizer) for layer in layers] == before
    with pytest.raises(errors.NonFiniteGradientError, match=r"Embedding\.weight"):
        second.optimizer.synchronize()
    assert [layer.optimizer.state[layer.weight]["step"] for layer in layers] == [1, 1]
    second(ids).sum().backward()
    assert second.optimizer.state[second.weight]["step"] == 2
    assert snapshot([second.weight], second.optimizer) != before[1]


def test_device_checks_are_for_gpus(place):
    host = place.on_host(place.param())
    for checks in ("deferred", "off"):
        with pytest.raises(
            errors.OptionError, match=f"device_checks is '{checks}', expected 'immediate': no"
        ):
            SparseAdam([host], device_checks=checks)
    with pytest.raises(errors.OptionError, match="device_checks is 'no', expected"):
        SparseAdam([place.param()], device_checks="no")
    optimizer = SparseAdam([place.param(), host], device_checks="deferred")
    assert "device_checks" not in optimizer.state_dict()["param_groups"][0]
    layer = Embedding(ROWS, DIM, optimizer={"device_checks": "deferred"})  # to be moved
    place.hosts.append(layer.weight)
    with pytest.raises(errors.OptionError, match="device_checks is 'deferred', expected 'immediate': no"):
        layer(torch.tensor([1]))
    place.hosts.pop()
    layer.to(place.device)
    layer(torch.tensor([1], device=place.device)).sum().backward()
    layer.optimizer.synchronize()
    assert layer.optimizer.state[layer.weight]["step"] == 1


def test_off_cannot_raise(place):
    param, rng = place.param(), np.random.default_rng(14)
    optimizer = SparseAdam([param], device_checks="off", on_nonfinite="raise")
    with pytest.raises(errors.OptionError, match="device_checks='off' with on_nonfinite='raise'"):
        step(optimizer, [param], [gradient(rng)])
    optimizer.device_checks = "deferred"
    step(optimizer, [param], [gradient(rng)])
    optimizer.param_groups[0]["on_nonfinite"], optimizer.device_checks = "skip", "off"
    step(optimizer, [param], [gradient(rng)])
    optimizer.param_groups[0]["on_nonfinite"], optimizer.device_checks = "raise", "immediate"
    step(optimizer, [param], [gradient(rng)])
    assert optimizer.state[param]["step"] == 3


# --- fused layers -----------------------------------------------------------------------------------------


def pair(place, kind, optimizer=None, **kwargs):
    """A layer on the GPU, and one on the CPU with the same table."""
    options = {**OPTIONS, "step_counts": "element", **(optimizer or {})}
    torch.manual_seed(0)
    layer, other = (kind(ROWS, DIM, optimizer=options, **kwargs) for _ in range(2))
    place.hosts.append(other.weight)
    layer.to(place.device)
    with torch.no_grad():
        layer.weight.copy_(other.weight)
    return layer, other


def train(layer, calls):
    """One backward pass through several lookups; the gradients of their weights."""
    device, found, loss = layer.weight.device, [], 0
    for ids, *rest in calls:
        tensors = [None if tensor is None else tensor.detach().to(device) for tensor in (ids, *rest)]
        if len(tensors) == 3 and tensors[2] is not None:
            found.append(tensors[2].requires_grad_())
        loss = loss + layer(*tensors).sin().sum()
    loss.backward()
    return [weights.grad for weights in found]


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding(place, padding_idx):
    layer, other = pair(place, Embedding, padding_idx=padding_idx)
    for calls in ([(torch.tensor([[3, 1], [3, 8]]),)], [(torch.tensor([4]),), (torch.tensor([3, 4, 0]),)]):
        train(layer, calls)
        train(other, calls)
        place.assert_same_state(layer.optimizer, layer.weight, other.optimizer, other.weight)
    assert layer.weight.grad is None


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_embedding_bag(place, mode, padding_idx, last):
    layer, other = pair(
        place,
        EmbeddingBag,
        mode="mean" if mode == "mean" else "sum",
        padding_idx=padding_idx,
        include_last_offset=last,
    )
    ids, offsets = torch.tensor([3, 1, 3, 8, 0, 3]), torch.tensor([0, 2, 2, 5, 6])
    weights = torch.linspace(-1, 2, 6) if mode == "weighted" else None
    calls = [(ids, offsets if last else offsets[:-1], weights)]
    for repeated in (calls, calls + calls):
        for ours, expected in zip(train(layer, repeated), train(other, repeated), strict=True):
            torch.testing.assert_close(ours.cpu(), expected)
        place.assert_same_state(layer.optimizer, layer.weight, other.optimizer, other.weight)


WRONG_OFFSETS = [
    ([1, 2], False, r"offsets\[0\] is 1, expected 0"),
    ([0, -1], False, r"offsets\[1\] is -1, less than offsets\[0\] = 0"),
    ([0, 4, 3, 6], False, r"offsets\[2\] is 3, less than offsets\[1\] = 4"),
    ([0, 7], False, r"offsets\[1\] is 7, expected at most 6"),
    ([0, 2, 5], True, r"offsets\[2\] is 5, expected the number of ids, 6"),
]


@pytest.mark.parametrize(("offsets", "last", "message"), WRONG_OFFSETS)
def test_wrong_offsets_are_refused_in_the_lookup(place, offsets, last, message):
    layer, _ = pair(place, EmbeddingBag, include_last_offset=last)
    ids = torch.tensor([3, 1, 3, 8, 0, 3])
    with pytest.raises(errors.GradientIndexError, match=message):
        train(layer, [(ids, torch.tensor(offsets))])


@pytest.mark.parametrize(("padding_idx", "dtype"), [(None, torch.int64), (3, torch.int32)])
@pytest.mark.parametrize("where", ["alone", "first", "second"])
@pytest.mark.parametrize(("offsets", "last", "message"), WRONG_OFFSETS)
def test_wrong_offsets_are_refused_in_a_deferred_step(
    place, unheard, offsets, last, message, where, padding_idx, dtype
):
    options = {"device_checks": "deferred", "step_counts": "row"}
    layer, _ = pair(
        place, EmbeddingBag, options, include_last_offset=last, padding_idx=padding_idx, mode="sum"
    )
    ids = torch.tensor([3, 1, 3, 8, 0, 3])
    weights = torch.linspace(-1, 2, 6)
    right = (ids, torch.tensor([0, 2, 6], dtype=dtype), weights)
    wrong = (ids, torch.tensor(offsets, dtype=dtype), weights)
    before = layer.weight.detach().clone()
    train(layer, {"alone": [wrong], "first": [wrong, right], "second": [right, wrong]}[where])
    with pytest.raises(errors.GradientIndexError, match=r"BagGradient\.offsets"):
        layer.optimizer.synchronize()
    assert torch.equal(layer.weight, before)
    train(layer, [right])
    layer.optimizer.synchronize()
    assert not torch.equal(layer.weight, before)


def test_bags_of_one_length_with_ids_of_32_bits(place):
    layer, other = pair(place, EmbeddingBag, mode="sum", optimizer={"step_counts": "global"})
    calls = [
        (torch.tensor([[3, 1], [3, 8]], dtype=torch.int32), None, torch.tensor([[1.0, 2.0], [0.5, -1.0]]))
    ]
    for ours, expected in zip(train(layer, calls), train(other, calls), strict=True):
        torch.testing.assert_close(ours.cpu(), expected)
    place.assert_same_state(layer.optimizer, layer.weight, other.optimizer, other.weight)


def test_accumulate(place):
    layer, other = pair(place, EmbeddingBag)
    batches = [torch.tensor([[3, 1], [3, 8]]), torch.tensor([[0, 1]])]
    for each in (layer, other):
        with accumulate(each):
            for ids in batches:
                train(each, [(ids,)])
            assert len(each.optimizer.state) == 0
    place.assert_same_state(layer.optimizer, layer.weight, other.optimizer, other.weight)


def test_layers_on_both_in_one_pass(place):
    layer, other = pair(place, Embedding, optimizer={"on_nonfinite": "raise"})
    ids = torch.tensor([3, 1, 3])
    (layer(ids.to(place.device)).sin().sum().cpu() + other(ids).sin().sum()).backward()
    place.assert_same_state(layer.optimizer, layer.weight, other.optimizer, other.weight)
    before = [snapshot([each.weight], each.optimizer) for each in (layer, other)]
    with pytest.raises(errors.NonFiniteGradientError):
        (layer(ids.to(place.device)).sum().cpu() * float("nan") + other(ids).sum()).backward()
    assert [snapshot([each.weight], each.optimizer) for each in (layer, other)] == before


def test_a_state_dict_of_a_layer(place):
    layer, other = pair(place, Embedding)
    calls = [(torch.tensor([3, 1, 3]),)]
    train(layer, calls)
    other.load_state_dict(saved(layer.state_dict()))
    train(other, calls)
    train(layer, calls)
    place.assert_same_state(layer.optimizer, layer.weight, other.optimizer, other.weight)


def test_a_step_waits_for_the_streams_of_all_lookups(place, monkeypatch):
    """In the simulator, which has no streams, with things that only note what is asked of them."""
    asked = []

    class Stream(str):
        def wait_stream(self, other):
            asked.append((str(self), "waits for", str(other)))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("a"))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: asked.append((stream, len(tensor)))
    )
    weight, ids, grads = torch.zeros(ROWS, DIM), torch.arange(3), torch.zeros(3, DIM)
    for stream in (None, Stream("a"), Stream("b")):
        backward._wait_for(backward.Lookup(weight, ids, grads, stream=stream))
    assert asked == [("a", "waits for", "b"), ("a", 3), ("a", 3)]


def test_the_threads_of_one_pass_collect_for_one_step(place, monkeypatch):
    queued = []
    monkeypatch.setattr(
        torch.autograd.Variable, "_execution_engine", SimpleNamespace(queue_callback=queued.append)
    )
    found, barrier, passes = [], threading.Barrier(4), range(10**9, 10**9 + 50)

    def collect():
        for number in passes:
            barrier.wait()
            found.append((number, backward._pass_of(number)))

    threads = [threading.Thread(target=collect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(queued) == len(passes)
    assert len({(number, id(each)) for number, each in found}) == len(passes)
    found.clear()
    queued.clear()  # autograd has called them, or the pass has failed
    assert not [number for number in passes if backward._passes.get(number, lambda: None)() is not None]
