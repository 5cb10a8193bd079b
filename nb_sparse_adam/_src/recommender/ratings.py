# SPDX-License-Identifier: Apache-2.0
"""Which interactions are left out for their rating."""

from __future__ import annotations

import math

from nb_sparse_adam._src.recommender.columns import ReadOptions
from nb_sparse_adam.errors import InteractionsError


class AtLeast:
    """Takes interactions of the file `name` whose rating is high enough, and counts the others."""

    def __init__(self, name: str, options: ReadOptions) -> None:
        self._name = name
        self.least = -math.inf if options.min_rating is None else options.min_rating
        self.dropped = 0

    def takes(self, text: str, number: int) -> bool:
        """Say whether a rating, of this line or row, is high enough."""
        try:
            rating = float(text)
        except ValueError:
            rating = math.nan
        if math.isnan(rating):
            raise InteractionsError(
                f"{self._name}, line {number}: expected a number as rating, got {text[:60]!r}; mend or "
                f"remove the line"
            )
        self.dropped += rating < self.least
        return rating >= self.least

    def note(self) -> list[str]:
        """Say how many were left out, if any could be."""
        if math.isinf(self.least):
            return []
        return [f"{self.dropped:,} interactions left out: rated below {self.least:g}"]
