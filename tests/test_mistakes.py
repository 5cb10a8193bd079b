# SPDX-License-Identifier: Apache-2.0
"""Likely mistakes are refused with what was meant, and what a message recommends works."""

import re
from collections import OrderedDict, deque
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from checks import refused
from needs import need
from scipy import sparse

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam.errors import (
    GradientError,
    GradientTypeError,
    TableError,
    TableTypeError,
)

ROWS, DIM = 10, 4
TORCH = "parameters of PyTorch are for nb_sparse_adam.torch.SparseAdam(params, lr=...)"
DICT = "use a dict: SparseAdam({'user': array, 'item': another})"


def table():
    return np.ones((ROWS, DIM), np.float32)


def values(*shape):
    return np.ones((*shape, DIM), np.float32)


def of_library(name, **attributes):
    """An instance of a class that is written in a module of another library, which is not installed."""
    module, _, name = name.rpartition(".")
    return type(name, (), {"__module__": module, "__qualname__": name, **attributes})()


def has_array(array=None):
    return {"__array__": lambda self, *_, **__: array, "shape": np.shape(array)}


# --- tables -----------------------------------------------------------------------------------------------

TENSOR = of_library("torch.Tensor")
PARAMETER = type("Parameter", (type(TENSOR),), {"__module__": "torch.nn.parameter"})()
OWN_MODULE = type("Model", (type(of_library("torch.nn.modules.module.Module")),), {"__module__": "mine"})()


def parameters():
    """A generator of code in torch, as ``model.parameters()`` is."""
    module = ModuleType("torch.nn.modules.module")
    exec("def parameters():\n    yield 1", vars(module))
    return module.parameters()


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (TENSOR, "table 'table' is a torch.Tensor, expected a numpy.ndarray"),
        (PARAMETER, "table 'table' is a torch.nn.parameter.Parameter"),
        (OWN_MODULE, "table 'table' is a mine.Model"),
        ({"user": PARAMETER}, "table 'user' is a torch"),
        (OrderedDict(weight=TENSOR), "table 'weight' is a torch.Tensor"),
        ([TENSOR, PARAMETER], "got a list of 2"),
        ((PARAMETER,), "got a tuple of 1"),
        ({"user": PARAMETER}.values(), "got a dict_values of 1"),
        ([("weight", PARAMETER)], "got a list of 1"),  # list(model.named_parameters())
        ([{"params": [PARAMETER], "lr": 0.1}], "got a list of 1"),
        ([{"params": PARAMETER}], "got a list of 1"),
        ({"params": [PARAMETER]}, "table 'params' is a list"),
        (parameters(), "got a generator"),
        (map(abs, [1]), "got a map"),
        (iter([PARAMETER]), "got a list_iterator"),
    ],
)
def test_what_is_of_pytorch_is_sent_to_its_optimizer(given, got):
    with refused(TableTypeError, TypeError, got, TORCH):
        SparseAdam(given)


def test_real_tensors_and_modules_are_sent_to_pytorchs_optimizer():
    torch = need("torch")
    module = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))
    weight = module[0].weight
    cases = [
        (weight, "table 'table' is a torch.nn.Parameter"),
        (weight.detach(), "table 'table' is a torch.Tensor"),
        (module, "table 'table' is a torch.nn.Sequential"),
        (module.parameters(), "got a generator"),
        (module.named_parameters(), "got a generator"),
        (list(module.parameters()), "got a list of 3"),
        (list(module.named_parameters()), "got a list of 3"),
        (torch.nn.ParameterList([weight]), "table 'table' is a torch.nn.ParameterList"),
        (module.state_dict(), "table '0.weight' is a torch.Tensor"),
        (dict(module.named_parameters()), "table '0.weight' is a torch.nn.Parameter"),
        ([{"params": module.parameters()}], "got a list of 1"),
    ]
    for given, got in cases:
        with refused(TableTypeError, TypeError, got, TORCH):
            SparseAdam(given)
    with refused(GradientTypeError, TypeError, "got a torch.Tensor of layout sparse_coo"):
        SparseAdam(np.ones((3, 2))).step(torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: [table(), table()], "got a list of 2"),
        (lambda: (table(), table(), table()), "got a tuple of 3"),
        (lambda: [table()], "got a list of 1"),
        (lambda: deque([table()]), "got a collections.deque of 1"),
        (lambda: {"user": table()}.values(), "got a dict_values of 1"),
        (lambda: list({"user": table()}.items()), "got a list of 1"),
        (list, "got a list of 0"),
        (lambda: (each for each in [table()]), "got a generator"),
    ],
)
def test_several_arrays_want_a_dict(make, got):
    with refused(TableTypeError, TypeError, got, DICT):
        SparseAdam(make())
    SparseAdam({"user": table(), "item": table()})


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], "is a list"),
        (of_library("pandas.core.frame.DataFrame", **has_array(table())), "is a pandas.core.frame.DataFrame"),
        (of_library("polars.Series", **has_array(table())), "is a polars.Series"),
        (of_library("jaxlib._jax.ArrayImpl", **has_array(table())), "is a jax.Array"),
        (of_library("tensorflow.python.x.EagerTensor", **has_array(table())), "is a tensorflow.Tensor"),
        (range(3), "is a range"),
        ([1, 2], "is a list"),
    ],
)
def test_what_can_be_copied_into_an_array_is_to_be(given, got):
    with refused(TableTypeError, TypeError, got, "which is a copy") as caught:
        SparseAdam(given)
    remedy = re.search(r"pass (np\.array\(.*?\)),", str(caught.value))[1]
    SparseAdam(eval(remedy, {"np": np, "table": given.__array__() if hasattr(given, "__array__") else given}))


class Raising(list):
    def __iter__(self):
        raise OSError("no more")


def endless():
    given = [1.0]
    given.append(given)
    return given


@pytest.mark.parametrize(
    "make",
    [
        endless,
        lambda: Raising([1.0]),
        lambda: memoryview(np.zeros((4, 2), np.float32)),
        lambda: bytearray(b"12"),
        lambda: type("Homeless", (), {"__module__": None})(),
        lambda: {"table": endless()},
    ],
)
def test_what_nobody_would_pass_is_refused_as_everything_else(make):
    with refused(TableTypeError, TypeError, "expected "):
        SparseAdam(make())
    given = table()
    optimizer = SparseAdam(given)
    with refused(GradientTypeError, TypeError, "expected a RowGradient", opt=optimizer, tables=given):
        optimizer.step({"table": make()})


def test_a_sparse_or_masked_table_is_to_be_filled():
    with refused(TableTypeError, TypeError, "is a scipy.sparse.csr_array", "pass table.toarray()"):
        SparseAdam(sparse.csr_array((3, 4)))
    SparseAdam(sparse.csr_array((3, 4)).toarray())
    with refused(TableTypeError, TypeError, "is a numpy.ma.MaskedArray", "pass table.filled(0)"):
        SparseAdam(np.ma.ones((3, 4)))
    SparseAdam(np.ma.ones((3, 4)).filled(0))


def test_an_empty_mapping_is_no_tables():
    with refused(TableError, ValueError, "empty mapping"):
        SparseAdam({})


# --- gradients --------------------------------------------------------------------------------------------


def test_arrays_without_their_form_are_told_which():
    given = table()
    optimizer = SparseAdam(given, 0.1)
    assert optimizer.lr == 0.1
    rows, data = np.arange(3), values(3)
    refusal = (GradientTypeError, TypeError, "expected one gradient")
    with refused(*refusal, "2 arguments", "pass RowGradient(rows, values)", opt=optimizer, tables=given):
        optimizer.step(rows, data)
    with refused(*refusal, "3 arguments", "CSRGradient(indptr, indices, data)", opt=optimizer, tables=given):
        optimizer.step(rows, rows, data)
    with refused(*refusal, "4 arguments", "RowGradient", opt=optimizer, tables=given):
        optimizer.step(rows, rows, data, data)
    optimizer.step(RowGradient(rows, data))


@pytest.mark.parametrize(
    ("make", "got", "remedy"),
    [
        (lambda: (np.arange(3), values(3)), "got tuple", "pass RowGradient(rows, values)"),
        (lambda: [np.arange(3), values(3)], "got list", "pass RowGradient(rows, values)"),
        (lambda: (np.arange(3), np.arange(3), values(3)), "got tuple", "BagGradient(indices, offsets, grad"),
        (lambda: [[1.0, 2.0], [3.0, 4.0]], "got list", "RowGradient(np.arange(len(g)), np.array(g, float))"),
        (
            lambda: np.ones((10, 4), int),
            "got a dense array of shape (10, 4)",
            "(np.arange(len(g)), g.astype(float))",
        ),
        (lambda: np.ma.ones((10, 4)), "got a dense numpy.ma.MaskedArray", "(np.arange(len(g)), g.filled(0))"),
        (
            lambda: of_library(
                "torch.Tensor", layout="torch.strided", requires_grad=True, **has_array(table())
            ),
            "got a dense torch.Tensor of shape (10, 4)",
            "RowGradient(np.arange(len(g)), g.detach())",
        ),
        (lambda: np.float64(3), "got a dense numpy.float64 of shape ()", "expected a RowGradient"),
        (lambda: [[RowGradient([1], values(1))]] * 2, "got list", "pass RowGradient(rows, values)"),
        (
            lambda: of_library("pandas.core.frame.DataFrame", **has_array(table())),
            "got a dense pandas.core.frame.DataFrame of shape (10, 4)",
            "RowGradient(np.arange(len(g)), g)",
        ),
        (
            lambda: of_library("jaxlib.xla_extension.ArrayImpl", **has_array(table())),
            "got a dense jax.Array of shape (10, 4)",
            "RowGradient(np.arange(len(g)), g)",
        ),
        (
            lambda: of_library("torch.Tensor", layout="torch.strided", **has_array(table())),
            "got a dense torch.Tensor of shape (10, 4)",
            "RowGradient(np.arange(len(g)), g)",
        ),
        (
            lambda: of_library("torch.Tensor", layout="torch.sparse_coo", **has_array(table())),
            "got a torch.Tensor of layout sparse_coo",
            "RowGradient(g.indices()[0], g.values())",
        ),
        (
            lambda: of_library("torch.Tensor", layout="torch.sparse_csr", **has_array(table())),
            "got a torch.Tensor of layout sparse_csr",
            "CSRGradient(g.crow_indices(), g.col_indices(), g.values())",
        ),
        (lambda: None, "got NoneType", "expected a RowGradient"),
        (lambda: SimpleNamespace(shape=(3, 4)), "got types.SimpleNamespace", "expected a RowGradient"),
    ],
)
def test_what_is_no_gradient_is_told_what_to_pass(make, got, remedy):
    given = table()
    optimizer = SparseAdam(given)
    with refused(GradientTypeError, TypeError, f"table 'table': {got}", remedy, opt=optimizer, tables=given):
        optimizer.step(make())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # torch's own
def test_what_is_said_of_pytorchs_sparse_tensors_works():
    torch = need("torch")
    dense = torch.zeros(ROWS, DIM).index_fill(0, torch.tensor([2, 5]), 1.0)
    results = []
    for g in (dense.to_sparse(1).coalesce(), dense.to_sparse_csr(), dense):
        optimizer = SparseAdam(table())
        with pytest.raises(GradientTypeError) as caught:
            optimizer.step(g)
        remedy = re.search(r"(RowGradient|CSRGradient)\((.*)\)", str(caught.value))[0]
        remedy = remedy.partition(" if ")[0]
        names = {"g": g, "np": np, "RowGradient": RowGradient, "CSRGradient": CSRGradient}
        optimizer.step(eval(remedy, names))
        results.append(optimizer.tables["table"])
    assert (results[0] != 1).any(axis=1).nonzero()[0].tolist() == [2, 5]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_a_batch_of_ids_is_to_be_flattened():
    ids, optimizer = np.arange(6).reshape(3, 2), SparseAdam(table())
    with refused(GradientError, ValueError, "(3, 2)", "rows.reshape(-1) and values.reshape(-1, 4)"):
        optimizer.step(RowGradient(ids, values(3, 2)))
    with refused(GradientError, ValueError, "(3, 2, 4)", "pass values.reshape(-1, 4)"):
        optimizer.step(RowGradient(ids.reshape(-1), values(3, 2)))
    optimizer.step(RowGradient(ids.reshape(-1), values(3, 2).reshape(-1, 4)))
    with refused(GradientError, ValueError, "rows has shape ()", "np.reshape(rows, -1)"):
        optimizer.step(RowGradient(3, values(1)))
    optimizer.step(RowGradient(np.reshape(3, -1), values(1)))


def test_bags_of_one_length_are_to_be_flattened():
    ids, optimizer = np.arange(6).reshape(3, 2), SparseAdam(table())
    for given, remedy in ((ids, "np.arange(0, 7, 2)"), (ids[:, :0], "np.zeros(4, int)")):
        words = f"indices.reshape(-1) and offsets={remedy}"
        with refused(GradientError, ValueError, str(given.shape), words):
            optimizer.step(BagGradient(given, [0, 2, 4], values(3)))
        optimizer.step(BagGradient(given.reshape(-1), eval(remedy), values(3)))
    weights = np.ones((3, 2))
    with refused(GradientError, ValueError, "weights has shape (3, 2)", "weights.reshape(-1)"):
        optimizer.step(BagGradient(ids.reshape(-1), [0, 2, 4], values(3), weights))
    optimizer.step(BagGradient(ids.reshape(-1), [0, 2, 4], values(3), weights.reshape(-1)))
    with refused(GradientError, ValueError, "grad_output has shape (3, 1, 4)", "grad_output.reshape(-1, 4)"):
        optimizer.step(BagGradient(ids.reshape(-1), [0, 2, 4], values(3, 1)))
    with refused(GradientError, ValueError, "CSRGradient.indices has shape (2, 2)", "indices.reshape(-1)"):
        optimizer.step(CSRGradient([0] * ROWS + [4], np.zeros((2, 2), int), np.ones(4)))


@pytest.mark.parametrize("mode", ["avg", "max", 1, None, ["sum"], np.array(["sum", "mean"])])
def test_a_bag_of_another_mode_cannot_be_made(mode):
    with refused(GradientError, ValueError, "mode is ", "'sum'", "'mean'"):
        BagGradient(np.arange(3), [0], values(1), mode=mode)


def test_a_weighted_mean_cannot_be_made():
    with refused(GradientError, ValueError, "mean", "weights", "mode='sum'"):
        BagGradient(np.arange(3), [0], values(1), np.ones(3), mode="mean")


# --- names of types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([], "list"),
        (None, "NoneType"),
        (np.zeros(3), "numpy.ndarray"),
        (np.ma.ones(3), "numpy.ma.MaskedArray"),
        (sparse.csr_array((3, 4)), "scipy.sparse.csr_array"),
        (RowGradient([1], [1.0]), "RowGradient"),
        (of_library("jaxlib._jax.ArrayImpl"), "jax.Array"),
        (of_library("jaxlib.xla_extension.ArrayImpl"), "jax.Array"),
        (of_library("tensorflow.python.framework.ops.EagerTensor"), "tensorflow.Tensor"),
        (of_library("not_installed.deep.Array"), "not_installed.deep.Array"),
    ],
)
def test_types_are_called_what_their_users_call_them(value, name):
    assert type_name(value) == name


@pytest.mark.gpu
def test_what_is_in_the_memory_of_the_host_is_named_too():
    from numba import cuda

    optimizer = SparseAdam(cuda.to_device(table()))
    with refused(GradientTypeError, TypeError, "rows is a jax.Array in the memory of the host"):
        optimizer.step(RowGradient(of_library("jaxlib._jax.ArrayImpl"), cuda.to_device(values(1))))
