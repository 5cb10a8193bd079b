# SPDX-License-Identifier: Apache-2.0
"""What a model's state dict holds of its fused layers, and the tools that go over state dicts."""

import copy
import io
import json
import math

import numpy as np
import pytest
from needs import need

from nb_sparse_adam import errors

torch = need("torch")

from nb_sparse_adam.torch import Embedding, EmbeddingBag  # noqa: E402

ROWS, DIM = 6, 4
STEP_COUNTS = ["global", "row", "element"]


def make(step_counts="global", dtype=torch.float32, **options):
    return torch.nn.Sequential(
        Embedding(ROWS, DIM, dtype=dtype, optimizer={"step_counts": step_counts, "lr": 0.1, **options}),
        torch.nn.Linear(DIM, 1, dtype=dtype),
    )


def train(model, *ids):
    model(torch.tensor(ids)).sum().backward()


def bits(model):
    """Every bit that a training goes on from."""
    layer = model[0]
    entry = layer.optimizer.state.get(layer.weight, {})
    values = [layer.weight, model[1].weight, *(entry[key] for key in sorted(entry))]
    return [
        value.detach().contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else value
        for value in values
    ]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def old(model):
    """The state dict that version 0.1 wrote."""
    state = model.state_dict()
    state["0._extra_state"] = model[0].optimizer.state_dict()
    return saved(state)


# --- what is refused has changed nothing -----------------------------------------------------------------


def with_entry(**changed):
    def change(state):
        state["0._extra_state"]["state"][0].update(changed)

    return change


def with_group(**changed):
    def change(state):
        state["0._extra_state"]["param_groups"][0].update(changed)

    return change


def with_state(value):
    def change(state):
        state["0._extra_state"] = value

    return change


def without_option(state):
    del state["0._extra_state"]["param_groups"][0]["lr"]


WRONG = {
    "rows": with_entry(step=torch.ones(ROWS, dtype=torch.int32)),
    "shape": with_entry(exp_avg=torch.zeros(ROWS + 1, DIM)),
    "kind": with_entry(exp_avg_sq="none"),
    "count": with_entry(step=-1),
    "counts of": with_group(step_counts="row"),
    "option": with_group(lr=-1.0),
    "type of option": with_group(betas="none"),
    "without option": without_option,
    "none": with_state(None),
    "empty": with_state({}),
    "string": with_state("state"),
    "number": with_state(3),
    "groups": with_state({"state": {}, "param_groups": []}),
    "other state": with_state({"state": {7: {}}, "param_groups": [{}]}),
    "short tensor": with_state(torch.zeros(3, dtype=torch.uint8)),
    "zeros": with_state(torch.zeros(5000, dtype=torch.uint8)),
    "two dimensions": with_state(torch.zeros(8, 8, dtype=torch.uint8)),
    "long header": with_state(torch.full((64,), 255, dtype=torch.uint8)),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_dict_that_is_refused_has_not_changed_the_table(wrong, assign):
    other, model = make(), make()
    train(other, 1, 2)
    train(model, 3)
    state = old(other)
    WRONG[wrong](state)
    before, weight = bits(model), model[0].weight
    with pytest.raises(errors.StateError, match=r"0\._extra_state"):
        model.load_state_dict(state, assign=assign)
    assert bits(model) == before
    assert model[0].weight is weight
    train(model, 3)
    assert model[0].optimizer.state[weight]["step"] == 2


@pytest.mark.parametrize("ours", STEP_COUNTS)
@pytest.mark.parametrize("theirs", STEP_COUNTS)
def test_counts_of_another_kind_are_refused(ours, theirs):
    other, model = make(theirs), make(ours)
    train(other, 1, 2)
    before = bits(model)
    if ours == theirs:
        model.load_state_dict(other.state_dict())
        assert bits(model) == bits(other)
        return
    with pytest.raises(errors.StateError, match="step_counts"):
        model.load_state_dict(other.state_dict())
    assert bits(model) == before


@pytest.mark.parametrize("where", [8, 40, 1023])
@pytest.mark.parametrize("assign", [False, True])
def test_bytes_that_are_damaged_are_refused(where, assign):
    model = make()
    train(model, 1)
    before, state = bits(model), saved(model.state_dict())
    packed = state["0._extra_state"]
    for damaged in (packed[: len(packed) - 8], packed[:where]):
        state["0._extra_state"] = damaged
        with pytest.raises(errors.StateError, match="is not what a layer's state dict holds"):
            model.load_state_dict(state, assign=assign)
    packed = packed.clone()
    packed[where] = 0
    state["0._extra_state"] = packed
    with pytest.raises(errors.StateError, match=r"0\._extra_state .* is not what"):
        model.load_state_dict(state, assign=assign)
    assert bits(model) == before


def test_where_torch_refuses_the_weight_the_state_stays_too():
    model, other = make(), make()
    train(model, 1)
    train(other, 2)
    before = bits(model)[2:]
    for weight in (torch.zeros(ROWS + 1, DIM), "weight", None):
        state = saved(other.state_dict())
        state["0.weight"] = weight
        if weight is None:
            del state["0.weight"]
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            model.load_state_dict(state)
        assert bits(model)[2:] == before


# --- what is taken over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_training_goes_on_with_the_same_bits(step_counts, dtype, kind, assign):
    model = make(step_counts, dtype, on_nonfinite="raise", betas=(0.8, 0.99))
    for ids in ((1, 2, 1), (5,)):
        train(model, *ids)
    model[0].lr = 0.025
    state = old(model) if kind == "old" else saved(model.state_dict())
    other = make(step_counts, dtype)
    other.load_state_dict(state, assign=assign)
    assert bits(other) == bits(model)
    group = other[0].optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["on_nonfinite"]) == (0.025, (0.8, 0.99), "raise")
    for each in (model, other):
        train(each, 0, 2)
    assert bits(other) == bits(model)


def test_before_the_first_step_there_are_options_only():
    model, other = make(lr=0.5), make()
    train(other, 1)
    other.load_state_dict(saved(model.state_dict()))
    assert other[0].lr == 0.5
    assert len(other[0].optimizer.state) == 0
    train(other, 1)
    assert other[0].optimizer.state[other[0].weight]["step"] == 1


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_state_has_one_size(step_counts):
    model = make(step_counts)
    sizes = [len(model.state_dict()["0._extra_state"])]
    for lr in (1.0, 0.1234567890123):
        model[0].lr = lr
        train(model, 1)
        sizes.append(len(model.state_dict()["0._extra_state"]))
    assert len(set(sizes)) == 1
    model[0].weight.requires_grad_(False)
    assert len(model.state_dict()["0._extra_state"]) == sizes[0]
    frozen = Embedding.from_pretrained(torch.zeros(1000, 8))
    assert len(frozen.state_dict()["_extra_state"]) == 1024


def test_an_empty_table():
    layer, other = EmbeddingBag(0, DIM, mode="sum"), EmbeddingBag(0, DIM, mode="sum")
    nothing = torch.zeros(0, dtype=torch.int64)
    for _ in range(2):
        other.load_state_dict(saved(layer.state_dict()))
        layer(nothing, nothing).sum().backward()
    assert other.optimizer.state[other.weight]["step"] == 1


# --- numbers ------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_tensors_become_plain_ones():
    model = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(model[0].optimizer, lambda epoch: np.cos(0.1 * epoch))
    train(model, 1)
    scheduler.step()
    expected = 0.1 * math.cos(0.1)
    assert saved(model.state_dict()) is not None  # weights_only
    for lr in (np.float64(expected), np.float32(0.5), torch.tensor(0.25), np.array(0.125), np.int64(1)):
        model[0].lr = lr
        other = make()
        other.load_state_dict(saved(model.state_dict()))
        group = other[0].optimizer.param_groups[0]
        assert {type(group["lr"]), type(group["initial_lr"])} <= {float, int}
        assert (group["lr"], group["initial_lr"]) == (float(lr), 0.1)
    group["eps"], group["betas"] = np.float64(1e-6), [np.float32(0.5), torch.tensor(0.75)]
    model.load_state_dict(saved(other.state_dict()))
    assert model[0].optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert type(model[0].optimizer.param_groups[0]["eps"]) is float
    resumed = torch.optim.lr_scheduler.LambdaLR(model[0].optimizer, lambda _: 1.0, last_epoch=3)
    assert resumed.get_last_lr() == [0.1]


# --- tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_safetensors_saves_a_model_and_loads_it(step_counts, tmp_path):
    safetensors = need("safetensors.torch")
    model, other = make(step_counts), make(step_counts)
    train(model, 1, 2)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    assert safetensors.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert bits(other) == bits(model)
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    inside = safetensors.load(bytes(model.state_dict()["0._extra_state"].numpy()))
    entry = model[0].optimizer.state[model[0].weight]
    assert torch.equal(inside["exp_avg"], entry["exp_avg"])
    assert ("step" in inside) is (step_counts != "global")


def test_tensors_may_be_moved_cloned_and_cut_out_of_others():
    model, other = make("row"), make("row")
    train(model, 1, 2)
    states = [
        {key: value.cpu() for key, value in model.state_dict().items()},
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        },
        {key: torch.cat([value[:1], value])[1:] for key, value in model.state_dict().items()},
        {key: torch.stack([value, value], -1)[..., 0] for key, value in model.state_dict().items()},
    ]
    for state in states:
        other.load_state_dict(state)
        assert bits(other)[2:] == bits(model)[2:]


def test_averages_of_weights_of_several_kinds():
    """As timm (V2, V3), YOLO and torch's swa_utils make them, from a copy made before the first step."""
    model = make()
    ema = [copy.deepcopy(model).eval() for _ in range(3)]
    average = torch.optim.swa_utils.AveragedModel(model)
    expected = model[0].weight.detach().clone()
    with torch.no_grad():
        for _ in range(3):
            train_step(model)
            expected = 0.5 * expected + 0.5 * model[0].weight
            state = model.state_dict()
            for ours, theirs in zip(ema[0].state_dict().values(), state.values(), strict=True):
                ours.copy_(0.5 * ours + 0.5 * theirs)
            for ours, theirs in zip(ema[1].state_dict().values(), state.values(), strict=True):
                if ours.is_floating_point():
                    ours.lerp_(theirs, 0.5)
                else:
                    ours.copy_(theirs)
            for key, value in ema[2].state_dict().items():
                if value.dtype.is_floating_point:
                    value *= 0.5
                    value += 0.5 * state[key]
            average.update_parameters(model)
    for each in (*ema, average.module):
        if each is not average.module:
            torch.testing.assert_close(each[0].weight.detach(), expected)
        loaded = make()
        loaded.load_state_dict(saved(each.state_dict()))
        assert torch.equal(loaded[0].weight, each[0].weight)


def train_step(model):
    with torch.enable_grad():
        train(model, 1, 2)


def test_an_average_of_everything_is_loaded_without_the_optimizer():
    model = make()
    train(model, 1)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, 1)
    for key, value in model.state_dict().items():
        average[key] = 0.5 * average[key] + 0.5 * value
    before = bits(model)[2:]
    with pytest.warns(errors.SparseAdamWarning, match=r"0\._extra_state .*computed with"):
        model.load_state_dict(average)
    assert torch.equal(model[0].weight, average["0.weight"])
    assert bits(model)[2:] == before


@pytest.mark.parametrize("ours", [Embedding, EmbeddingBag])
def test_the_way_to_torchs_layer_and_back(ours):
    layer, theirs = ours(ROWS, DIM), getattr(torch.nn, ours.__name__)(ROWS, DIM)
    layer(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(RuntimeError, match="_extra_state"):
        theirs.load_state_dict(layer.state_dict())
    weights = {key: value for key, value in layer.state_dict().items() if not key.endswith("_extra_state")}
    theirs.load_state_dict(weights)
    assert torch.equal(theirs.weight, layer.weight)
    theirs.load_state_dict(layer.state_dict(), strict=False)
    step = layer.optimizer.state[layer.weight]["step"]
    layer.load_state_dict(theirs.state_dict())
    assert layer.optimizer.state[layer.weight]["step"] == step


def test_hooks_of_others_see_the_state_and_may_change_it():
    model, other = make(), make()
    train(model, 1)
    seen = []

    def hook(module, state, prefix, *_):
        seen.append(prefix + "_extra_state" in state)
        state.pop(prefix + "_extra_state")

    other[0].register_load_state_dict_pre_hook(hook)
    other.load_state_dict(model.state_dict())
    assert seen == [True]
    assert len(other[0].optimizer.state) == 0


def test_the_options_can_be_read_by_anyone():
    packed = make(lr=0.5).state_dict()["0._extra_state"].numpy().tobytes()
    length = int.from_bytes(packed[:8], "little")
    metadata = json.loads(packed[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["group"])["lr"] == 0.5


@pytest.mark.jit
@pytest.mark.parametrize("how", ["as floats", "in place"])
def test_an_average_that_was_made_bytes_again_is_no_state(how):
    torch.manual_seed(0)
    layer = Embedding(40, 8)
    dicts = []
    for _ in range(2):
        (layer(torch.arange(40)) * torch.randn(40, 8)).sum().backward()
        dicts.append(layer.state_dict())
    if how == "as floats":
        average = {
            key: torch.stack([each[key].float() for each in dicts]).mean(0).to(value.dtype)
            for key, value in dicts[0].items()
        }
    else:
        average = {key: value.clone() for key, value in dicts[0].items()}
        for key, value in average.items():
            value += dicts[1][key]
            value.div_(2) if value.is_floating_point() else value.floor_divide_(2)
    other = Embedding(40, 8)
    before = other.weight.detach().clone()
    with pytest.raises(errors.StateError, match="_extra_state"):
        other.load_state_dict(average)
    assert torch.equal(other.weight, before)


@pytest.mark.jit
def test_what_a_state_dict_cannot_hold_of_a_state_is_left_out():
    layer = Embedding(4, 2)
    layer(torch.tensor([1])).sum().backward()
    layer.optimizer.state[layer.weight].update(
        {"complex": torch.tensor([1 + 1j]), ("a", 1): 2.0, "mine": 3.0}
    )
    other = Embedding(4, 2)
    other.load_state_dict(layer.state_dict())
    state = other.optimizer.state[other.weight]
    assert state["mine"] == 3.0
    assert "complex" not in state
    assert ("a", 1) not in state


def test_a_parametrized_layer_is_copied():
    layer = Embedding(3, 2).eval()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Tanh())
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(torch.tensor([1])), layer(torch.tensor([1])))
