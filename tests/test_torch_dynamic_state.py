# SPDX-License-Identifier: Apache-2.0
"""State of dynamic layers: state dicts, copies and pickles go on with the same bits, or are refused."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from checks import STEP_COUNTS
from needs import need

from nb_sparse_adam import EmbeddingTable, Eviction, checkpoint, errors
from nb_sparse_adam._src.table import ages, snapshot

torch = need("torch")

from dynamic_layers import DIM, IDS, ROWS, bits, rows_of  # noqa: E402

from nb_sparse_adam.torch import (  # noqa: E402
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingBag,
)


@pytest.fixture
def standing_clock(monkeypatch):
    """Ages in seconds are a part of the state."""
    monkeypatch.setattr(ages, "time", SimpleNamespace(time=lambda: 1e9))


def make(step_counts="row", **options):
    given = {"step_counts": step_counts, "admission": 2, "admission_bytes": 256, "lr": 0.1, **options}
    return torch.nn.Sequential(DynamicEmbeddingBag(DIM, **given), torch.nn.Linear(DIM, 1))


def train(model, seed, steps=4):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        model(torch.from_numpy(rng.integers(-40, 40, (16, 3)))).pow(2).sum().backward()


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.usefixtures("standing_clock")
def test_training_goes_on_with_the_same_bits(step_counts):
    model = make(step_counts)
    train(model, 0)
    model[0].table.evict(down_to=30)  # so that rows lie in another order
    train(model, 1)
    model[0].lr = 0.05
    state = saved(model.state_dict())
    assert [key for key in state if key.startswith("0.")] == ["0._extra_state"]
    others = [make(step_counts), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(others[0], 5)  # what was there goes
    others[0].load_state_dict(state)
    for each in (model, *others):
        train(each, 2)
    for other in others:
        assert bits(other[0]) == bits(model[0])
        assert np.array_equal(other[0].table.ids(), model[0].table.ids())  # in order of admission
        assert other[0].table is not model[0].table
    assert model[0].table.stats()["dropped"] > 0


@pytest.mark.usefixtures("standing_clock")
@pytest.mark.parametrize("condition", [{"older_than_steps": 3}, {"down_to": 20}, {"seen_fewer_than": 3}])
def test_what_is_evicted_after_loading_is_what_would_have_been(condition):
    model, other = make(admission=None), make(admission=None)
    train(model, 0)
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        train(each, 1, steps=2)
    gone = [np.sort(each[0].table.evict(**condition)) for each in (model, other)]
    assert np.array_equal(*gone)
    assert 0 < len(gone[0]) < len(gone[0]) + len(model[0].table)
    assert bits(other[0]) == bits(model[0])


def test_a_scheduler_goes_on_in_a_copy():
    layer = DynamicEmbedding(DIM, lr=1.0)
    torch.optim.lr_scheduler.ExponentialLR(layer.optimizer, 0.5)
    other = DynamicEmbedding(DIM)
    other.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), other):
        group = copied.optimizer.param_groups[0]
        assert group["initial_lr"] == group["lr"] == copied.table.lr == 1.0
        scheduler = torch.optim.lr_scheduler.ExponentialLR(copied.optimizer, 0.5, last_epoch=3)
        copied(IDS).sum().backward()
        scheduler.step()
        assert copied.lr == layer.lr / 2
    assert layer.lr == 1.0


def test_copies_share_a_table_among_themselves():
    table = EmbeddingTable(DIM)
    model = torch.nn.ModuleList([DynamicEmbedding.from_table(table), DynamicEmbeddingBag.from_table(table)])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].table is copied[1].table is not table


def test_a_table_in_a_folder_is_not_copied(tmp_path):
    layer = DynamicEmbedding(DIM, state_dir=tmp_path / "state", capacity=10)
    layer(IDS).sum().backward()
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(errors.TableError, match=r"in a folder \(state_dir\)"):
            how(layer)
    other = DynamicEmbedding(DIM)
    other.load_state_dict(layer.state_dict())
    assert np.array_equal(other.table.export()[1], layer.table.export()[1])


def damaged(state, **changed):
    return {**state, **{f"0.{key}": value for key, value in changed.items()}}


WRONG = {
    "float": (torch.zeros(3000), "dtype|float32"),
    "none": (None, "NoneType"),
    "short": (torch.zeros(3, dtype=torch.uint8), "shape"),
    "zeros": (torch.zeros(3000, dtype=torch.uint8), "not what a layer's state dict holds"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_is_damaged_is_refused(wrong):
    model = make()
    train(model, 0)
    before = bits(model[0])
    value, message = WRONG[wrong]
    with pytest.raises(errors.StateError, match=rf"0\._extra_state of the state dict.*({message})"):
        model.load_state_dict(damaged(model.state_dict(), _extra_state=value))
    assert bits(model[0]) == before


CANNOT_BE = {
    "ids": (lambda arrays, _: arrays["ids"][::-1], "in ids, expected numbers that increase"),
    "admitted": (lambda arrays, _: arrays["admitted"] * 0 + 1, "come at the same place in the order"),
    "touched": (lambda arrays, numbers: arrays["touched"] + numbers["clock"], "in touched, expected 0 to"),
    "exp_avg": (lambda arrays, _: arrays["exp_avg"][1:], r"exp_avg = float32 \(\d+, 4\), expected float32"),
    "more": (lambda arrays, _: arrays["ids"], "has arrays"),
}


@pytest.mark.parametrize("name", [*CANNOT_BE, *snapshot.NUMBERS])
def test_content_that_cannot_be_is_refused_by_name(name, monkeypatch):
    model = make()
    train(model, 0)
    before = bits(model[0])
    arrays, numbers = snapshot.copied(model[0].table)
    if name in CANNOT_BE:
        change, message = CANNOT_BE[name]
        arrays[name] = np.ascontiguousarray(change(arrays, numbers))
    else:
        numbers[name], message = -1, f"{name} = -1, expected an integer from 0"
    monkeypatch.setattr(snapshot, "copied", lambda _: (arrays, numbers))
    state = model.state_dict()
    monkeypatch.undo()
    with pytest.raises(errors.StateError, match=rf"0\._extra_state of the state dict .*{message}"):
        model.load_state_dict(state)
    assert bits(model[0]) == before


def test_rows_in_a_folder_are_exchanged_and_a_save_of_what_was_there_is_no_base(tmp_path):
    model, other = make(), make(capacity=500, state_dir=tmp_path / "state")
    train(model, 0)
    train(other, 1)
    checkpoint.save(tmp_path / "0", other[0].table)
    other.load_state_dict(model.state_dict())
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["1.int64"]
    assert rows_of(other[0])[0].tobytes() == rows_of(model[0])[0].tobytes()
    with pytest.raises(errors.CheckpointError, match="is of other tables"):
        checkpoint.save(tmp_path / "1", other[0].table, base=tmp_path / "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "made with seed 1, expected 0"),
        ({"initializer": "zeros"}, "made with initializer 'zeros', expected 'normal"),
        ({"initializer": lambda ids: np.zeros((len(ids), DIM))}, "made with initializer 'a callable'"),
        ({"step_counts": "element"}, "made with step_counts 'element', expected 'row'"),
        ({"dtype": torch.float64}, "made with dtype 'float64', expected 'float32'"),
        ({"admission": 3}, "made with admission 3, expected 2"),
    ],
)
def test_a_table_of_another_kind_is_refused(options, message):
    model, other = make(), make(**options)
    train(model, 0)
    train(torch.nn.Sequential(other[0]), 1) if "dtype" in options else train(other, 1)
    before = bits(model[0])
    with pytest.raises(errors.StateError, match=message):
        model.load_state_dict({**model.state_dict(), **other.state_dict()})
    assert bits(model[0]) == before


def test_a_table_without_room_is_refused():
    model, small = make(), make(capacity=3)
    train(model, 0)
    with pytest.raises(errors.StateError, match="expected at most 3, for which table 'table' has room"):
        small.load_state_dict(model.state_dict())
    large = make(capacity=1000, eviction=Eviction(when_full=True))
    large.load_state_dict(model.state_dict())
    assert len(large[0].table) == len(model[0].table)


def test_keys_that_are_missing_or_of_other_layers_are_refused_by_name():
    model = make()
    train(model, 0)
    before, state = bits(model[0]), model.state_dict()
    without = {key: value for key, value in state.items() if key != "0._extra_state"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\._extra_state"'):
        model.load_state_dict(without)
    assert model.load_state_dict(without, strict=False).missing_keys == ["0._extra_state"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.other"'):
        model.load_state_dict(damaged(state, other=torch.zeros(3)))
    plain = torch.nn.Sequential(torch.nn.EmbeddingBag(ROWS, DIM), torch.nn.Linear(DIM, 1))
    with pytest.raises(RuntimeError, match=r"0\.weight is of a layer whose rows are numbered.*table\.load"):
        model.load_state_dict(plain.state_dict())
    fused = torch.nn.Sequential(EmbeddingBag(ROWS, DIM), torch.nn.Linear(DIM, 1))
    with pytest.raises(RuntimeError, match=r"0\.weight is of a layer whose rows are numbered"):
        model.load_state_dict(fused.state_dict())
    only = {**without, "0._extra_state": fused.state_dict()["0._extra_state"]}
    with pytest.raises(errors.StateError, match="its format is"):
        model.load_state_dict(only)
    assert bits(model[0]) == before
