# SPDX-License-Identifier: Apache-2.0
"""A table that is changed in place after an optimizer was given it: refused by name wherever it is used."""

import copy
import pickle
import warnings

import numpy as np
import pytest

from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam.errors import TableError


def reshaped(table):
    table.shape = (3, 8)


def flattened(table):
    table.shape = (24,)


def grown(table):
    table.resize((300, 4), refcheck=False)


def shrunk(table):
    table.resize((3, 4), refcheck=False)


def moved(table):
    """Of the old shape, and elsewhere."""
    table.resize((1 << 18, 4), refcheck=False)
    kept = np.zeros(1 << 16)  # where the memory was, perhaps
    table.resize((6, 4), refcheck=False)
    assert kept.size


def of_another_dtype(table):
    table.dtype = np.float64


def of_the_same_size(table):
    table.dtype = np.int32


def of_other_strides(table):
    table.strides = (4, 24)


CHANGES = [reshaped, flattened, grown, shrunk, of_another_dtype, of_the_same_size, of_other_strides]


def change_in_place(change, table):
    with warnings.catch_warnings():  # newer versions of NumPy ask not to
        warnings.simplefilter("ignore", DeprecationWarning)
        change(table)


def gradient(seed=0):
    return RowGradient([0, 2, 2], np.random.default_rng(seed).normal(size=(3, 4)))


def optimizer(name="t"):
    table = np.ones((6, 4), np.float32)
    other = np.ones((3, 4), np.float32)
    opt = SparseAdam({"other": other, name: table}, step_counts="row", on_nonfinite="skip")
    opt.step({name: gradient(), "other": gradient()})
    return opt, table, other


def lend(opt):
    with opt.kernel_table("t"):
        pass


USES = {
    "step": lambda opt, _: opt.step({"other": gradient(1), "t": gradient(1)}),
    "step of that table": lambda opt, _: opt.step({"t": gradient(1)}),
    "save": lambda opt, folder: checkpoint.save(folder, opt),
    "restore": lambda opt, folder: checkpoint.restore(folder, opt),
    "kernel_table": lambda opt, _: lend(opt),
    "pickle": lambda opt, _: pickle.dumps(opt),
    "copy": lambda opt, _: copy.copy(opt),
    "deepcopy": lambda opt, _: copy.deepcopy(opt),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_was_changed_in_place_is_refused_by_name(change, use, tmp_path):
    opt, table, other = optimizer()
    checkpoint.save(tmp_path, opt)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    opt.step({"other": gradient(2)})
    state, of_other = opt.state_dict(), other.copy()
    change_in_place(change, table)
    after = table.tobytes()
    with pytest.raises(TableError, match=r"table 't' is .*, expected \(6, 4\) float32"):
        use(opt, tmp_path)
    assert table.tobytes() == after
    np.testing.assert_array_equal(other, of_other)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert_same_state(opt.state_dict(), state)  # what was learned is not lost
    opt.step({"other": gradient(1)})


def assert_same_state(got, expected):
    for name, saved in expected["tables"].items():
        for key in ("exp_avg", "exp_avg_sq", "steps"):
            np.testing.assert_array_equal(got["tables"][name][key], saved[key], strict=True)


def test_a_table_that_comes_back_elsewhere_is_refused():
    opt, table, _ = optimizer()
    address = table.ctypes.data
    moved(table)
    if table.ctypes.data == address:
        pytest.skip("the system put it where it was")
    with pytest.raises(TableError, match=r"table 't' is .* at address"):
        opt.step({"t": gradient()})


def test_a_table_that_is_changed_back_steps_on():
    opt, table, _ = optimizer()
    expected, same, _ = optimizer()
    change_in_place(reshaped, table)
    with pytest.raises(TableError):
        opt.step({"t": gradient()})
    change_in_place(lambda given: setattr(given, "shape", (6, 4)), table)
    table.flags.writeable = False
    with pytest.raises(TableError, match="read-only"):
        opt.step({"t": gradient()})
    assert pickle.loads(pickle.dumps(opt)).tables["t"].flags.writeable  # as before: nothing writes to it
    table.flags.writeable = True
    for each in (opt, expected):
        each.step({"t": gradient()})
    np.testing.assert_array_equal(table, same)


@pytest.mark.parametrize("change", [grown, shrunk])
def test_rows_that_were_added_or_cut_in_place_go_on_when_rearranged(change):
    opt, table, _ = optimizer()
    expected = opt.state_dict()["tables"]["t"]["exp_avg"]
    change_in_place(change, table)
    source = np.where(np.arange(len(table)) < 6, np.arange(len(table)), -1)
    opt.rearrange(table, source, "t")
    kept = min(len(table), 6)
    np.testing.assert_array_equal(opt.state["t"].exp_avg[:kept], expected[:kept])
    assert not opt.state["t"].exp_avg[6:].any()
    opt.step({"t": gradient()})
    checked, _, _ = optimizer()
    checked.step({"t": gradient()})
    np.testing.assert_array_equal(table[:3], checked.tables["t"][:3])


@pytest.mark.parametrize("change", [reshaped, of_another_dtype])
def test_what_no_longer_fits_is_refused_as_a_new_table_too(change):
    opt, table, _ = optimizer()
    change_in_place(change, table)
    with pytest.raises(TableError, match=r"expected \(rows, 4\) float32"):
        opt.rearrange(table, np.full(len(table), -1), "t")


def test_one_dimension(tmp_path):
    table = np.ones(6)
    opt = SparseAdam(table)
    opt.step(RowGradient([1], np.ones(1)))
    change_in_place(lambda given: setattr(given, "shape", (6, 1)), table)
    with pytest.raises(TableError, match=r"\(6, 1\) float64 .* expected \(6,\) float64"):
        opt.step(RowGradient([1], np.ones(1)))
    assert opt.state["table"].exp_avg.shape == (6,)
    with pytest.raises(TableError, match=r"\(6, 1\) float64"):
        checkpoint.save(tmp_path, opt)


@pytest.mark.gpu
def test_a_table_on_a_gpu_that_says_where_it_is():
    from backends import foreign

    given = foreign(np.ones((6, 4), np.float32))
    elsewhere = foreign(np.ones((6, 4), np.float32))
    gradient_there = RowGradient(foreign(np.array([1])), foreign(np.ones((1, 4), np.float32)))
    opt = SparseAdam(given)
    opt.step(gradient_there)
    was = given.__cuda_array_interface__
    for now in (elsewhere.__cuda_array_interface__, was | {"shape": (4, 6)}, was | {"typestr": "<i4"}):
        given.__cuda_array_interface__ = now
        with pytest.raises(TableError, match=r"table 'table' is .*changed in place"):
            opt.step(gradient_there)
    given.__cuda_array_interface__ = was
    opt.step(gradient_there)


@pytest.mark.gpu
def test_a_table_on_a_gpu_that_does_not_say_where_it_is_any_more():
    """As a tensor of torch's that requires a gradient by now."""
    from backends import foreign

    class Tensor:
        requires_grad = False

        def __init__(self, array):
            self._there = foreign(array)

        def data_ptr(self):
            return self._there.__cuda_array_interface__["data"][0]

        @property
        def __cuda_array_interface__(self):
            if self.requires_grad:
                raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")
            return self._there.__cuda_array_interface__

    given = Tensor(np.ones((6, 4), np.float32))
    opt = SparseAdam(given)
    gradient_there = RowGradient(foreign(np.array([1])), foreign(np.ones((1, 4), np.float32)))
    given.requires_grad = True
    opt.step(gradient_there)
    assert opt.state_dict()["tables"]["table"]["steps"].max() == 1
