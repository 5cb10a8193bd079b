# SPDX-License-Identifier: Apache-2.0
"""Every error and warning of the library, on one screen.

::

    SparseAdamError                       base class: ``except SparseAdamError`` catches everything below
    ├── OptionError          ValueError   a hyper-parameter or option is out of its domain, or unknown
    │   └── OptionTypeError  TypeError    ... or of the wrong type
    ├── TableError           ValueError   a parameter table cannot be updated in place, or its name is unknown
    │   └── TableTypeError   TypeError    ... it is no array of a supported dtype
    ├── GradientError        ValueError   a gradient does not fit its table, or is malformed
    │   ├── GradientTypeError   TypeError   ... it, or one of its arrays, has an unsupported type
    │   │   └── DenseGradientError  RuntimeError  ... torch's gradient of a parameter is dense
    │   ├── GradientIndexError  IndexError  ... an id, column or offset is out of range
    │   └── NonFiniteGradientError          ... it holds NaN or infinity, or a sum in it overflows
    ├── StateError           ValueError   a state dict, or a source of rows, does not fit the optimizer
    │   └── StateTypeError   TypeError    ... it, or an entry of it, has the wrong type
    ├── CheckpointError      ValueError   a checkpoint is missing, damaged, or does not fit
    │   └── LogError         OSError      ... a write-ahead log is damaged, not to be written, or held
    ├── InteractionsError    ValueError   the recommender's input cannot be read or used
    │   └── UnknownIdError   KeyError     ... a user or an item was not there in training
    ├── NotFittedError       ValueError, AttributeError  a model is asked for what only training gives
    ├── ServerError          RuntimeError a parameter server is not there, is there already, or has failed
    │   ├── ServerTimeout    TimeoutError ... a shard did not answer before the deadline
    │   ├── StepTimeout      TimeoutError ... a worker did not push in time: the step of all was given up
    │   └── StaleClientError              ... a push comes from a client that another one has replaced
    └── MissingExtraError    ImportError  an optional dependency is not installed

    SparseAdamWarning        UserWarning  base class of the library's warnings

A class inherits from everything above it, and from the built-in class beside it, so that
``except ValueError`` in existing code keeps working. All input errors are raised before the first
write: the tables and the optimizer's state hold the bits that they held before the call.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DenseGradientError",
    "GradientError",
    "GradientIndexError",
    "GradientTypeError",
    "InteractionsError",
    "LogError",
    "MissingExtraError",
    "NonFiniteGradientError",
    "NotFittedError",
    "OptionError",
    "OptionTypeError",
    "ServerError",
    "ServerTimeout",
    "SparseAdamError",
    "SparseAdamWarning",
    "StaleClientError",
    "StateError",
    "StateTypeError",
    "StepTimeout",
    "TableError",
    "TableTypeError",
    "UnknownIdError",
]


class SparseAdamError(Exception):
    """Base class of every error that this library raises on purpose."""


class OptionError(SparseAdamError, ValueError):
    """A hyper-parameter or option is outside its domain, or there is no option of that name."""


class OptionTypeError(OptionError, TypeError):
    """A hyper-parameter or option has a type that it cannot have."""


class TableError(SparseAdamError, ValueError):
    """A parameter table cannot be updated in place, or no table has the name that was given."""


class TableTypeError(TableError, TypeError):
    """A parameter table is not an array of a supported dtype."""


class GradientError(SparseAdamError, ValueError):
    """A gradient does not fit its table, or is malformed."""


class GradientTypeError(GradientError, TypeError):
    """A gradient, or an array in it, has an unsupported type or dtype."""


class DenseGradientError(GradientTypeError, RuntimeError):
    """A gradient that PyTorch computed is dense; torch.optim.SparseAdam raises a RuntimeError for it."""


class GradientIndexError(GradientError, IndexError):
    """An id, a column or an offset of a gradient is out of range."""


class NonFiniteGradientError(GradientError):
    """A gradient holds NaN or infinity, or a per-row sum of it (or that sum's square) overflows."""


class StateError(SparseAdamError, ValueError):
    """A state dict does not fit the optimizer that should load it, or a source of rows its table."""


class StateTypeError(StateError, TypeError):
    """A state dict, or an entry of one, has the wrong type."""


class CheckpointError(SparseAdamError, ValueError):
    """A checkpoint is missing, incomplete, damaged or of something else, or does not fit the optimizer."""


class LogError(CheckpointError, OSError):
    """A parameter server's write-ahead log is damaged, cannot be written, or is another process's."""


class InteractionsError(SparseAdamError, ValueError):
    """The interactions given to the recommender cannot be read or used."""


class UnknownIdError(InteractionsError, KeyError):
    """A user or an item was not there when the model was trained."""

    __str__ = Exception.__str__  # KeyError shows its message in quotes


class NotFittedError(SparseAdamError, ValueError, AttributeError):
    """A model is asked for what only training gives it; scikit-learn's class has the same bases."""


class ServerError(SparseAdamError, RuntimeError):
    """A parameter server is not there, or is there already; or one of its processes has failed."""


class ServerTimeout(ServerError, TimeoutError):  # noqa: N818 (as `TimeoutError`, it is one)
    """A shard has not answered before the deadline; the message says which, and what is known of the push."""


class StepTimeout(ServerError, TimeoutError):  # noqa: N818
    """A worker has not pushed in time: the step was ended for all workers, and nothing of it applied."""


class StaleClientError(ServerError):
    """A push comes from a client in whose place there is another one, or which has been forgotten."""


class MissingExtraError(SparseAdamError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""


class SparseAdamWarning(UserWarning):
    """Base class of the library's warnings."""
