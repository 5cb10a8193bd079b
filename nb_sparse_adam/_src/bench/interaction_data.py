# SPDX-License-Identifier: Apache-2.0
"""What recommenders of the comparison are trained on: a fixed generated set, or a file that is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nb_sparse_adam._src.bench.cases import compact
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems, generate
from nb_sparse_adam._src.recommender.reading import read_interactions


@dataclass(frozen=True)
class Data:
    """Interactions: those of a file or, without one, generated ones, the same for ever.

    Attributes
    ----------
    name : str
        Its key in `DATA`.
    users, items : int
        Of what is generated. Items that nobody takes are none.
    mean_items : float
        As `generate` takes it.
    seed : int
        Of what is generated.
    of_file : bool
        Whether a file is read; the others say nothing then.
    """

    name: str
    users: int = 0
    items: int = 0
    mean_items: float = 0.0
    seed: int = 0
    of_file: bool = False

    @property
    def sizes(self) -> dict[str, str]:
        """Sizes for titles."""
        return {"users": compact(self.users), "items": compact(self.items), "file": "a file of yours"}

    def smaller(self) -> Data:
        """Give data that are quick to generate and to train on; a file stays as it is."""
        return self if self.of_file else replace(self, users=self.users // 50, items=self.items // 50)

    def read(self, file: str | None) -> Interactions:
        """Read the file, or generate.

        Raises
        ------
        InteractionsError, OSError
            If the file cannot be used.
        """
        if self.of_file:
            assert file is not None
            return read_interactions(file)
        return generate(self.users, self.items, self.mean_items, self.seed)


FILE = "file"
DATA = {
    data.name: data
    for data in (
        # As many users and items as the set of check-ins "Gowalla" that LightGCN is measured on, and as many
        # interactions to train on, 810k, when a fifth is held out.
        Data("generated", users=30_000, items=40_000, mean_items=34.0, seed=20260101),
        Data(FILE, of_file=True),
    )
}
"""Key -> what recommenders are trained on."""


def save_split(split: Split, path: Path) -> None:
    """Write the rows of a split into a file, for other processes."""
    train, test = split.train, split.test
    np.savez(
        path,
        n_items=train.n_items,
        train_indptr=train.indptr,
        train_indices=train.indices,
        test_indptr=test.indptr,
        test_indices=test.indices,
    )


def load_split(path: Path) -> Split:
    """Read what `save_split` wrote. Ids are rows."""
    with np.load(path) as arrays:
        n_items = int(arrays["n_items"])
        train, test = (
            UserItems(arrays[f"{name}_indptr"], arrays[f"{name}_indices"], n_items)
            for name in ("train", "test")
        )
    return Split(train, test, np.arange(train.n_users), np.arange(n_items), "as saved")
