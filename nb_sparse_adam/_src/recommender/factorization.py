# SPDX-License-Identifier: Apache-2.0
"""`MatrixFactorization`: a recommender as an estimator, from interactions to what a user should see next."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields, replace
from typing import Any

import numpy as np

from nb_sparse_adam._src.annotations import StepCounts
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.recommender.given import Columns, given, validation_split
from nb_sparse_adam._src.recommender.ids import Ids
from nb_sparse_adam._src.recommender.interactions import Split, UserItems, random_stream
from nb_sparse_adam._src.recommender.options import BPROptions, LossName
from nb_sparse_adam._src.recommender.progress import Progress
from nb_sparse_adam._src.recommender.saved import Saved, read_model, write_model
from nb_sparse_adam._src.recommender.serving import Serving, check_k
from nb_sparse_adam._src.recommender.training import BPRModel, EpochRecord, initial_vectors
from nb_sparse_adam.errors import OptionError


@public("nb_sparse_adam.recommender")
class MatrixFactorization(Serving):
    """A recommender: a vector for each user and each item, whose inner product ranks items for a user.

    Parameters are those of `BPROptions`, which says what each is; they are checked when `fit` is called, as
    scikit-learn's estimators do.

    Parameters
    ----------
    dim : int, default 64
        Length of the vectors.
    loss : {"softmax", "bpr"}, default "softmax"
        A sampled softmax, over the items of the batch if nothing else is said, or Bayesian personalized
        ranking.
    epochs : int, default 28
        Passes over the interactions, at most.
    batch_size, lr, reg
        Of the training and of its `SparseAdam`; a `reg` of None is what suits the loss.
    negatives, popularity, temperature, in_batch
        What interactions are compared with, and how. None is what suits the loss.
    init_std : float, default 0.01
        Standard deviation of the initial vectors.
    seed : int, default 0
        Same seed, same interactions: the same bits, with any number of threads.
    step_counts, eps_hat, betas, eps
        Of `SparseAdam`.
    threads : int, optional
        None for as many as are fastest.

    Attributes
    ----------
    user_factors_, item_factors_ : float32 array, shapes (n_users, dim) and (n_items, dim)
        The vectors, read-only.
    user_ids_, item_ids_ : array, shapes (n_users,) and (n_items,)
        The id of each row: int64, or strings (dtype object).
    n_epochs_ : int
        Epochs whose work the vectors hold: after early stopping, those up to the best one.
    history_ : list of EpochRecord
        One of each epoch that was finished.
    optimizer_ : SparseAdam
        Its tables ``"user"`` and ``"item"`` are the vectors.

    Examples
    --------
    >>> import numpy as np
    >>> from nb_sparse_adam.recommender import MatrixFactorization, generate
    >>> model = MatrixFactorization(dim=8, epochs=5, batch_size=256).fit(generate(200, 50, 10.0))
    >>> ids, scores = model.recommend([3, 4], k=5)
    >>> ids.shape, scores.shape
    ((2, 5), (2, 5))
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        loss: LossName = "softmax",
        epochs: int = 28,
        batch_size: int = 512,
        lr: float = 0.004,
        reg: float | None = None,
        negatives: int | None = None,
        popularity: float = 0.0,
        temperature: float = 1.0,
        in_batch: bool | None = None,
        init_std: float = 0.01,
        seed: int = 0,
        step_counts: StepCounts = "row",
        eps_hat: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        threads: int | None = None,
    ) -> None:
        self.dim = dim
        self.loss = loss
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.reg = reg
        self.negatives = negatives
        self.popularity = popularity
        self.temperature = temperature
        self.in_batch = in_batch
        self.init_std = init_std
        self.seed = seed
        self.step_counts = step_counts
        self.eps_hat = eps_hat
        self.betas = betas
        self.eps = eps
        self.threads = threads

    # --- parameters, as scikit-learn has them --------------------------------------------------------------

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002 (scikit-learn's signature)
        """Return the parameters by name, as they were given."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> MatrixFactorization:
        """Set parameters by name, for the next training, and return the model.

        Raises
        ------
        OptionError
            If there is no parameter of that name.
        """
        names = self._names()
        for name in params:
            if name not in names:
                raise OptionError(f"set_params: there is no parameter {name!r}; expected some of {names}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """Name what is not as by default."""
        defaults = inspect.signature(type(self).__init__).parameters
        given_ = (f"{n}={v!r}" for n, v in self.get_params().items() if v != defaults[n].default)
        return f"{type(self).__name__}({', '.join(given_)})"

    def _options(self, epochs: int) -> BPROptions:
        """Check the parameters."""
        ours = {field.name for field in fields(BPROptions)} & set(self._names())
        return BPROptions(**{**{name: getattr(self, name) for name in ours}, "epochs": epochs})

    # --- training ------------------------------------------------------------------------------------------

    def fit(
        self,
        interactions: Any,
        *,
        validation: float | str | None = None,
        patience: int | None = None,
        k: int = 20,
        progress: bool = False,
        user_column: str | None = None,
        item_column: str | None = None,
        time_column: str | None = None,
        weight_column: str | None = None,
        sample_weight: Any = None,
    ) -> MatrixFactorization:
        """Train from the beginning.

        Parameters
        ----------
        interactions : sparse matrix, frame, tuple of arrays, or Interactions
            Who had what. A SciPy matrix of shape (users, items): ids are row and column numbers, and what it
            holds are weights, where 0 is no interaction and 1 everywhere is none. A frame of polars, pandas,
            pyarrow or any other with ``__arrow_c_stream__``. ``(users, items)`` or ``(users, items, times)``,
            (n,) each. Ids are integers or strings.
        validation : float or "latest", optional
            Part of every user's items to hold out, at random, or the latest tenth by the times. After each
            epoch recall@k of it is measured.
        patience : int, optional
            Stop when recall@k of the validation has not risen for so many epochs, and go back to the best
            epoch. It takes memory for one more copy of vectors and state.
        k : int, default 20
            Of recall@k.
        progress : bool, default False
            Whether to show a bar.
        user_column, item_column, time_column : str, optional
            Names of a frame's columns, if they are not to be found by usual names.
        weight_column : str, optional
            Name of a frame's column with weights: finite numbers greater than 0 that multiply what an
            interaction adds to the loss, divided by their mean over all that are trained on. Those of a pair
            that comes several times are added. None: all count the same, however often they come.
        sample_weight : array_like, shape (n,), optional
            The same of ``(users, items)``.

        Returns
        -------
        MatrixFactorization
            This model. An interrupt leaves it as after some batch, without the epoch that was not finished.

        Raises
        ------
        InteractionsError
            If the interactions cannot be used; nothing has changed then.
        OptionError
            If a parameter is out of its domain.
        NonFiniteGradientError
            If the training diverges.
        """
        options = self._options(self.epochs)
        _check_patience(patience, validation)
        check_k(k)
        columns = Columns(user_column, item_column, time_column, weight_column)
        data = given(interactions, columns, validation == "latest", sample_weight)
        pairs = data.interactions.pairs
        if validation is None:
            none = pairs.select(np.zeros(len(pairs), dtype=np.bool_))
            split = Split(pairs, none, data.interactions.user_ids, data.interactions.item_ids, "all")
        else:
            split = validation_split(data, validation, options.seed)
        trainer = BPRModel(split, replace(options, top=k, eval_every=int(validation is not None)))
        self._users, self._items = Ids(split.user_ids), Ids(split.item_ids)
        self._trained, self._held_out, self._test = split.train, split.test, None
        self.optimizer_ = trainer.optimizer
        self.history_: list[EpochRecord] = []
        self.n_epochs_ = 0
        self._run(trainer, progress, patience)
        return self

    def partial_fit(
        self,
        interactions: Any,
        *,
        epochs: int = 1,
        progress: bool = False,
        user_column: str | None = None,
        item_column: str | None = None,
        weight_column: str | None = None,
        sample_weight: Any = None,
    ) -> MatrixFactorization:
        """Go on training with more interactions, together with those that there were.

        New users and items get rows behind the others, with initial vectors; the others go on where they
        were, moments and counts included, as do the count of epochs and the random stream. What `fit` held
        out for validation stays held out. A model that was not trained is trained, with `epochs` epochs.

        Parameters
        ----------
        interactions
            As for `fit`, with ids of the same kind.
        epochs : int, default 1
            Passes over all interactions, new and old.
        progress : bool, default False
            Whether to show a bar.
        user_column, item_column, weight_column : str, optional
            As for `fit`.
        sample_weight : array_like, shape (n,), optional
            As for `fit`. Weights are added to those that a pair has; in training with weights, a pair that
            comes without one counts 1.

        Returns
        -------
        MatrixFactorization
            This model.

        Raises
        ------
        InteractionsError, OptionError, NonFiniteGradientError
            As `fit` does.
        """
        options = self._options(epochs)
        if not hasattr(self, "optimizer_"):
            return self.set_params(epochs=epochs).fit(
                interactions, progress=progress, user_column=user_column, item_column=item_column,
                weight_column=weight_column, sample_weight=sample_weight,
            )  # fmt: skip
        if self.dim != self.user_factors_.shape[1]:
            raise OptionError(
                f"dim: got {self.dim}, but the vectors have {self.user_factors_.shape[1]}: "
                f"fit again for another"
            )
        new = given(
            interactions, Columns(user_column, item_column, None, weight_column), False, sample_weight
        )
        users = self._users.with_new(new.interactions.user_ids)
        items = self._items.with_new(new.interactions.item_ids)
        rows = users.find(new.interactions.user_ids, "users")[new.interactions.pairs.users()]
        columns = items.find(new.interactions.item_ids, "items")[new.interactions.pairs.indices]
        old, held = self._trained, self._held_out
        if old is None or held is None:
            raise OptionError("partial_fit: the interactions were not saved with this model; fit it again")
        size = len(users), len(items)
        held = held.resized(*size)
        test = None if self._test is None else self._test.resized(*size)
        more = UserItems.from_pairs(rows, columns, *size, new.interactions.pairs.weights)
        every = old.resized(*size).union(more)
        train = every.select(~held.contains(every))
        random = random_stream(options.seed, "init", self.n_epochs_)
        grown = {
            name: np.concatenate(
                [
                    self.optimizer_.tables[name],
                    initial_vectors(random, len(ids) - len(self.optimizer_.tables[name]), options),
                ]
            )
            for name, ids in (("user", users), ("item", items))
        }
        for name, table in grown.items():
            before = len(self.optimizer_.tables[name])
            source = np.concatenate([np.arange(before), np.full(len(table) - before, -1)])
            self.optimizer_.rearrange(table, source, name)
        self._users, self._items, self._trained, self._held_out, self._test = users, items, train, held, test
        for name in ("lr", "betas", "eps", "eps_hat"):
            setattr(self.optimizer_, name, getattr(options, name))
        options = replace(options, epochs=self.n_epochs_ + epochs, eval_every=int(len(held) > 0))
        trainer = BPRModel(Split(train, held, users.ids, items.ids, "all"), options, self.optimizer_)
        self._run(trainer, progress)
        return self

    def _run(self, trainer: BPRModel, progress: bool, patience: int | None = None) -> None:
        """Train on, and note what came of each epoch."""
        trainer.history, trainer.n_epochs = self.history_, self.n_epochs_
        try:
            with Progress(trainer, bar=progress) as shown:
                trainer.fit(shown.on_batch, shown.on_epoch, patience)
        finally:
            self.n_epochs_ = trainer.n_epochs

    # --- keeping it ----------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, interactions: bool = True) -> None:
        """Save everything in a folder, which is whole at every moment: a checkpoint, with the ids beside it.

        Parameters
        ----------
        folder : path
            Created if need be. A model that was saved there is replaced, by one atomic step.
        interactions : bool, default True
            Whether to save what it was trained with: what `exclude_seen`, `evaluate` and `partial_fit` need.

        Raises
        ------
        NotFittedError
            If the model is not trained.
        CheckpointError, OSError
            As `nb_sparse_adam.checkpoint.save` does.
        """
        self._check_fitted("save")
        kept = (self._trained, self._held_out, self._test) if interactions else (None, None, None)
        write_model(
            folder,
            Saved(
                self.optimizer_, self.get_params(), self.history_, self.n_epochs_,
                self._users.ids, self._items.ids, *kept,
            ),
        )  # fmt: skip

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MatrixFactorization:
        """Load a model that `save` has written: it goes on with the same bits.

        Raises
        ------
        CheckpointError
            If something is missing, damaged, or not such a model; it names the file.
        """
        return cls._of(read_model(folder))

    @classmethod
    def _of(cls, saved: Saved) -> MatrixFactorization:
        """Make a model of what was kept of one."""
        model = cls(**saved.params)
        model.optimizer_ = saved.optimizer
        model.history_, model.n_epochs_ = saved.history, saved.epochs
        model._users, model._items = Ids(saved.user_ids), Ids(saved.item_ids)
        model._trained, model._held_out, model._test = saved.trained, saved.held_out, saved.test
        return model


def _check_patience(patience: object, validation: object) -> None:
    if patience is None:
        return
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise OptionError(f"patience: got {patience!r}, expected an integer of at least 1, or None")
    if validation is None:
        raise OptionError("patience: needs validation=, a fraction or 'latest', to see when to stop")
