# SPDX-License-Identifier: Apache-2.0
"""What the person who measures has chosen."""

from __future__ import annotations

from typing import NamedTuple


class Settings(NamedTuple):
    """What the person who measures has chosen.

    Attributes
    ----------
    peers : tuple of str
        Keys of `peers.PEERS`, all of them installed.
    threads : int
    quick : bool
        Small tables, few repeats.
    interactions : str or None
        A file of interactions, for the line that trains on one.
    """

    peers: tuple[str, ...]
    threads: int
    quick: bool
    interactions: str | None = None
