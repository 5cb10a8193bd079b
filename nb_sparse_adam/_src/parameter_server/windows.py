# SPDX-License-Identifier: Apache-2.0
"""Which pushes have been applied: so that one that is sent again is acknowledged, and not applied again.

Each *incarnation* of a client has a number, larger than that of any before it, and counts its pushes from 1:
the sequence. Pushes of one client may overtake each other, but for those that are `WINDOW` or more apart,
which is for the client to see to. So of each incarnation the highest sequence is kept, and a bit for each
of the `WINDOW` below it.

Memory is bounded: of more than `MOST` incarnations those that have not pushed for longest are forgotten.
What comes from an incarnation that is not known, and is not younger than all that were ever forgotten, may
have been applied: it is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from nb_sparse_adam.errors import StaleClientError

WINDOW = 1024
MOST = 4096

_BITS = (1 << WINDOW) - 1


class Windows:
    """The pushes that a shard has applied.

    Parameters
    ----------
    most : int
        How many incarnations are kept.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._of: OrderedDict[int, tuple[int, int]] = OrderedDict()  # highest sequence; bit k: that minus k
        self._forgotten = 0  # incarnations up to this one, unless they are known

    def __len__(self) -> int:
        return len(self._of)

    def has(self, incarnation: int, sequence: int) -> bool:
        """Say whether a push has been applied.

        Raises
        ------
        StaleClientError
            If nobody can tell any more.
        """
        found = self._of.get(incarnation)
        if found is None:
            if incarnation <= self._forgotten:
                raise StaleClientError(
                    f"push {sequence} of client {incarnation} is refused: of clients up to {self._forgotten} "
                    "it is not known any more which pushes were applied. Make another client; whether "
                    "this push was applied, its look-up shows"
                )
            return False
        highest, applied = found
        if sequence <= highest - WINDOW:
            raise StaleClientError(
                f"push {sequence} of client {incarnation} is refused: push {highest} has been applied, and "
                f"whether one was that is {WINDOW} or more before it is not known any more"
            )
        return sequence <= highest and bool(applied >> (highest - sequence) & 1)

    def highest(self, incarnation: int) -> int:
        """Return the highest sequence of an incarnation that has been applied, 0 if none is known."""
        return self._of.get(incarnation, (0, 0))[0]

    def note(self, incarnation: int, sequence: int) -> None:
        """Note that a push, of which `has` said that it was not, is applied."""
        highest, applied = self._of.pop(incarnation, (0, 0))
        if sequence > highest:
            ahead = sequence - highest
            applied = (applied << ahead if ahead < WINDOW else 0) & _BITS
            highest = sequence
        self._of[incarnation] = highest, applied | 1 << (highest - sequence)
        while len(self._of) > self._most:
            gone, _ = self._of.popitem(last=False)
            self._forgotten = max(self._forgotten, gone)

    def forget_all(self, up_to: int) -> None:
        """Forget all incarnations, and refuse those up to a number."""
        self._forgotten = max(self._forgotten, up_to, *self._of, 0)
        self._of.clear()

    def to_json(self) -> dict[str, Any]:
        """Give all of it, as JSON holds it."""
        of = [[incarnation, highest, f"{bits:x}"] for incarnation, (highest, bits) in self._of.items()]
        return {"of": of, "forgotten": self._forgotten}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Windows:
        """Make what `to_json` gave."""
        made = cls()
        made._forgotten = int(given["forgotten"])
        for incarnation, highest, bits in given["of"]:
            made._of[int(incarnation)] = int(highest), int(bits, 16)
        return made
