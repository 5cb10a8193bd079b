# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of EmbeddingTable: full saves, increments, chains, and what they refuse."""

import shutil

import numpy as np
import pytest
from checks import STEP_COUNTS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from table_saves import (
    CHANGES,
    DIM,
    chain_in,
    content,
    do,
    files_in,
    make,
    manifest_of,
    step,
    trained,
    without_names,
)

from nb_sparse_adam import EmbeddingTable, Eviction, RowGradient, SparseAdam, checkpoint
from nb_sparse_adam._src.checkpoint import row_files, tensor_files
from nb_sparse_adam._src.table import history
from nb_sparse_adam.errors import CheckpointError, OptionError, OptionTypeError

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def chain(tmp_path):
    return chain_in(tmp_path)


# --- the same bits ------------------------------------------------------------------------------------------

OPERATIONS = st.one_of(*CHANGES, st.tuples(st.just("save"), st.booleans()))
# Which rows a step looks at is not saved: here it is all of them.
OPTIONS = st.fixed_dictionaries({
    "step_counts": st.sampled_from(STEP_COUNTS),
    "admission": st.sampled_from([None, 2, 0.5]),
    "initializer": st.sampled_from(["zeros", "normal(0, 0.01)", "uniform(-1, 1)"]),
    "on_nonfinite": st.sampled_from(["raise", "skip"]),
    "eviction": st.sampled_from([Eviction(when_full=True), Eviction(older_than_steps=2, rows_a_step=40)]),
})  # fmt: skip


@settings(max_examples=settings().max_examples // 5)
@example(
    options={"eviction": Eviction(when_full=True)},
    operations=[("lookup", [-9, -8]), ("evict", 1)],  # once it was evicted one row too few after these
)
@given(options=OPTIONS, operations=st.lists(OPERATIONS, max_size=14))
def test_a_chain_is_a_full_save_byte_for_byte(options, operations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "PIECE_BYTES", 64)  # many pieces
        patch.setattr(row_files, "GRAIN_BYTES", 40)
        room = 12 if options["eviction"].when_full else 40  # for more ids than there are
        options = {**options, "capacity": room, "admission_bytes": 64}
        table = make(**options)
        chain = [folder / "0"]
        checkpoint.save(chain[0], table)
        for operation, given_to in [*operations, ("lookup", [1, 2]), ("save", True)]:
            if operation != "save":
                do(table, operation, given_to)
                continue
            chain.append(folder / str(len(chain)))
            checkpoint.save(chain[-1], table, len(chain), base=chain[-2])
            if given_to:  # a full save beside it is of the same moment, and changes nothing
                checkpoint.save(folder / "full", table, len(chain))
                checkpoint.compact(chain, folder / "compact")
                assert files_in(folder / "compact") == files_in(folder / "full")
                assert without_names(folder / "compact") == without_names(folder / "full")
        again = make(**options)
        assert checkpoint.restore(chain, again) == len(chain)
        others = [checkpoint.load(chain)[0], checkpoint.load(folder / "compact")[0], again]
    for other in others:
        other.num_threads = 1
        assert content(other) == content(table)
        for operation in (("lookup", [1, 5, 77, 77, 78]), ("update", [5, 77, 1]), ("evict", 4)):
            do(other, *operation)
    for operation in (("lookup", [1, 5, 77, 77, 78]), ("update", [5, 77, 1]), ("evict", 4)):
        do(table, *operation)
    for other in others:
        assert content(other) == content(table)
    shutil.rmtree(folder)


@pytest.mark.parametrize("options", [
    {}, {"dtype": np.float64}, {"admission": 2, "admission_bytes": 256}, {"admission": 0.3},
    {"step_counts": "element"}, {"capacity": 14, "eviction": Eviction(when_full=True)},
], ids=str)  # fmt: skip
def test_interrupted_training_goes_on_with_the_same_bits(options, tmp_path):
    table = through = trained(0, **options)
    through = trained(0, **options)
    for k in range(9):
        step(through, k)
        step(table, k)
        checkpoint.save(tmp_path / str(k), table, base=tmp_path / str(k - 1) if k else None)
        if k % 3 == 2:
            table, _ = checkpoint.load([tmp_path / str(each) for each in range(k + 1)])
            table.num_threads = 1
    if "capacity" not in options:  # which row is the oldest, a clock says that a save moves on
        assert content(table) == content(through)
    assert len(table) == len(through)
    assert table.stats()["steps"] == 9


def test_counts_beyond_int32_come_back(tmp_path):
    table = trained(step_counts="element")
    checkpoint.save(tmp_path / "0", table)
    state = table._store.table
    state._widen()
    state.arrays.steps[: len(table)] = 2**40
    step(table, 4)
    checkpoint.save(tmp_path / "1", table)
    again, _ = checkpoint.load(tmp_path / "1")
    assert content(again)["steps"] == content(table)["steps"]
    assert again.state([again.ids()[0]]).steps.dtype == np.int64
    again.num_threads = 1
    for each in (again, table):
        step(each, 5)
    assert content(again) == content(table)
    assert again.state(again.ids()).steps.max() > 2**40


def test_several_tables_are_saved_at_one_moment(tmp_path):
    def both():
        return {"user": make(name="u"), "item": make(name="i", step_counts="global")}

    def steps(given, k):
        ids = np.arange(k, k + 4)
        for table in given.values():
            table.lookup(ids)
        gradient = RowGradient(ids, np.full((4, DIM), k, np.float32))
        EmbeddingTable.update_together(dict.fromkeys(given.values(), gradient))

    saved, again = both(), both()
    steps(saved, 1)
    checkpoint.save(tmp_path / "0", saved, "a")
    steps(saved, 3)
    checkpoint.save(tmp_path / "1", saved, "b", base=tmp_path / "0")
    loaded, extra = checkpoint.load([tmp_path / "0", tmp_path / "1"])
    assert checkpoint.restore([tmp_path / "0", tmp_path / "1"], again) == extra == "b"
    for given_tables in (loaded, again):
        assert list(given_tables) == ["user", "item"]
        for name, table in given_tables.items():
            table.num_threads = 1
            assert content(table) == content(saved[name])
    before = {name: content(table) for name, table in again.items()}
    for wrong in (again["user"], {"user": again["user"]}, {"user": again["item"], "item": again["user"]}):
        with pytest.raises(CheckpointError, match="expected"):
            checkpoint.restore([tmp_path / "0", tmp_path / "1"], wrong)
        with pytest.raises(CheckpointError, match="is of other tables"):
            checkpoint.save(tmp_path / "2", wrong, base=tmp_path / "1")
    assert {name: content(table) for name, table in again.items()} == before
    with pytest.raises(OptionError, match="one table by several"):
        checkpoint.save(tmp_path / "2", {"a": again["user"], "b": again["user"]})
    with pytest.raises(OptionTypeError, match="expected names and EmbeddingTables"):
        checkpoint.save(tmp_path / "2", {"a": SparseAdam(np.ones((2, 2)))})


# --- chains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "message"), [
    ([0, 2], "second is an increment of save .*, which is missing; expected one of save .*full"),
    ([0, 1, 3], "third is an increment of save .*, which is missing"),
    ([0, 1, 1], "first holds save .* holds too: expected each save once"),
    ([0, 2, 1, 3], "second is an increment of save .*, which is in .*first: the order is wrong"),
    ([1, 0], "first is an increment, based on save .*, which is in .*full: the order is wrong"),
    ([2, 3], "second is an increment, based on save .*, which is missing"),
    ([1], "first is an increment, based on save"),
    ([0, 0], "full holds save"),
    ([], "path is an empty list"),
], ids=str)  # fmt: skip
def test_a_wrong_chain_is_refused_by_name(order, message, chain, tmp_path):
    table, folders = chain
    before = content(table)
    given_folders = [folders[k] for k in order]
    for work in (
        lambda: checkpoint.load(given_folders),
        lambda: checkpoint.restore(given_folders, table),
        lambda: checkpoint.compact(given_folders, tmp_path / "into"),
    ):
        with pytest.raises((CheckpointError, OptionError), match=message):
            work()
    assert content(table) == before
    assert not (tmp_path / "into").exists()


def test_saves_of_others_are_refused_by_name(chain, tmp_path):
    table, folders = chain
    other = trained()
    checkpoint.save(tmp_path / "other", other)
    step(other, 9)
    checkpoint.save(tmp_path / "more", other, base=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"more is of other tables than .*full"):
        checkpoint.load([folders[0], tmp_path / "more"])
    with pytest.raises(CheckpointError, match=r"other is a full save, expected an increment of save .*full"):
        checkpoint.load([folders[0], tmp_path / "other"])
    with pytest.raises(CheckpointError, match=r"base .*other is of other tables"):
        checkpoint.save(tmp_path / "new", table, base=tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds the base itself"):
        checkpoint.save(folders[3], table, base=folders[3])
    with pytest.raises(CheckpointError, match=r"nothing.manifest\.json is missing"):
        checkpoint.save(tmp_path / "new", table, base=tmp_path / "nothing")
    optimizer = SparseAdam(np.ones((3, 2)))
    checkpoint.save(tmp_path / "dense", optimizer)
    for work, message in (
        (lambda: checkpoint.load([folders[0], tmp_path / "dense"]), "dense is a checkpoint of a SparseAdam"),
        (lambda: checkpoint.restore(tmp_path / "dense", table), "dense is a checkpoint of a SparseAdam"),
        (lambda: checkpoint.restore(folders[0], optimizer), "full is a checkpoint of EmbeddingTables"),
        (lambda: checkpoint.save(tmp_path / "n", table, base=tmp_path / "dense"), "base .*dense is a check"),
    ):
        with pytest.raises(CheckpointError, match=message):
            work()
    for work, message in (
        (lambda: checkpoint.save(tmp_path / "new", optimizer, base=folders[0]), "only EmbeddingTables have"),
        (lambda: checkpoint.load(tmp_path / "dense", keep=lambda ids: ids > 0), "keep or initializer"),
        (lambda: checkpoint.load(folders[0], mmap=True), "mmap=True"),
        (lambda: checkpoint.load(folders[0], verify=False), "verify=False"),
    ):
        with pytest.raises(OptionError, match=message):
            work()
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_two_that_go_on_from_one_save_do_not_take_each_others_increments(chain, tmp_path):
    _, folders = chain
    (a, _), (b, _) = checkpoint.load(folders), checkpoint.load(folders)
    step(a, 50)
    step(b, 51)
    checkpoint.save(tmp_path / "a", a, base=folders[3])
    checkpoint.save(tmp_path / "b", b, base=folders[3])
    with pytest.raises(CheckpointError, match="is not after, or does not remember"):
        checkpoint.save(tmp_path / "c", b, base=tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"expected one of save .*a, which is before it"):
        checkpoint.load([*folders, tmp_path / "a", tmp_path / "b"])
    assert content(checkpoint.load([*folders, tmp_path / "b"])[0])["values"] == content(b)["values"]


def test_increments_go_on_from_what_was_compacted_into_one_of_its_folders(chain, tmp_path):
    table, folders = chain
    checkpoint.compact(folders[:3], folders[0])
    checkpoint.compact([folders[0], folders[3]], folders[3])
    step(table, 60)
    checkpoint.save(tmp_path / "more", table, base=folders[3])
    assert content(checkpoint.load([folders[3], tmp_path / "more"])[0]) == content(table)
    assert [len(list(folder.iterdir())) for folder in (folders[0], folders[3])] == [2, 2]


def test_a_base_that_is_too_old_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "LEAST_IDS", 8)
    monkeypatch.setattr(history, "MOST_SAVES", 3)
    table = make()
    for k in range(5):
        table.lookup([k])
        checkpoint.save(tmp_path / str(k), table)
    for k in (2, 3, 4):
        checkpoint.save(tmp_path / "i", table, base=tmp_path / str(k))
    for k in (0, 1, 2):  # one more has been saved
        with pytest.raises(CheckpointError, match="does not remember"):
            checkpoint.save(tmp_path / "j", table, base=tmp_path / str(k))
    for k in range(9):
        table.lookup([100 + k])
        table.evict(down_to=4)
    with pytest.raises(CheckpointError, match="does not remember"):  # more have gone than are kept
        checkpoint.save(tmp_path / "j", table, base=tmp_path / "4")
    checkpoint.save(tmp_path / "0", table)
    table.evict(down_to=1)
    checkpoint.save(tmp_path / "1", table, base=tmp_path / "0")
    assert content(checkpoint.load([tmp_path / "0", tmp_path / "1"])[0]) == content(table)
    assert manifest_of(tmp_path / "1")["tables"][0]["gone"] == 3


def test_what_went_is_kept_within_bounds_and_only_after_a_save(tmp_path):
    table = make(initializer="zeros")
    ids = np.arange(1000)
    table.lookup(ids)
    table.evict(down_to=0)
    kept = table._history
    assert not kept._gone
    checkpoint.save(tmp_path, table)
    for k in range(1, 100):
        kept.note_gone(table._store.clock + k, ids, 0)
    assert kept._ids == sum(len(each) for _, each in kept._gone) <= history.LEAST_IDS
    assert not kept.saves
    assert not kept._gone


# --- keep, and functions ------------------------------------------------------------------------------------


def test_shards_are_masks_of_ids(chain, tmp_path):
    table, folders = chain
    shards = [checkpoint.load(folders, keep=lambda ids, k=k: ids % 3 == k)[0] for k in range(3)]
    found = {}
    for k, shard in enumerate(shards):
        ids, values = shard.export()
        assert (ids % 3 == k).all()
        assert ids.tolist() == [each for each in table.ids().tolist() if each % 3 == k]  # in their order
        found |= dict(zip(ids.tolist(), values.tolist(), strict=True))
        np.testing.assert_array_equal(shard.state(ids).exp_avg, table.state(ids).exp_avg)
        with pytest.raises(CheckpointError, match="is of other tables"):
            checkpoint.save(tmp_path / "new", shard, base=folders[3])
        step(shard, 70)
        checkpoint.save(tmp_path / "shard", shard)
        assert content(checkpoint.load(tmp_path / "shard")[0])["values"] == content(shard)["values"]
    assert found == dict(zip(*(each.tolist() for each in table.export()), strict=True))
    assert len(checkpoint.load(folders, keep=lambda ids: np.zeros(len(ids), bool))[0]) == 0
    for wrong, error in ((lambda ids: ids, OptionTypeError), (lambda ids: ids[:1] > 0, OptionError)):
        with pytest.raises(error, match="keep returned"):
            checkpoint.load(folders, keep=wrong)


def test_a_function_of_ids_is_given_again(tmp_path):
    def ones(ids):
        return np.ones((len(ids), DIM), np.float32)

    table = trained(initializer=ones)
    checkpoint.save(tmp_path / "0", table)
    with pytest.raises(CheckpointError, match=r"no file holds; pass load\(\.\.\., initializer=\.\.\.\)"):
        checkpoint.load(tmp_path / "0")
    with pytest.raises(CheckpointError, match="or restore into a table that was made with it"):
        checkpoint.restore(tmp_path / "0", make())
    again, restored = checkpoint.load(tmp_path / "0", initializer=ones)[0], make(initializer=ones)
    checkpoint.restore(tmp_path / "0", restored)
    for each in (again, restored):
        each.num_threads = 1
    for each in (table, again, restored):
        each.lookup([999])
        assert content(each) == content(table)
    checkpoint.save(tmp_path / "1", trained())
    with pytest.raises(OptionError, match="expected None: those of the tables"):
        checkpoint.load(tmp_path / "1", initializer=ones)
