# SPDX-License-Identifier: Apache-2.0
"""Files of interactions for tests of reading; the fixture `write` is in conftest.py."""

INTEGERS = [(1, 10), (1, 30), (2, 10), (12, 7)]
TEXT = b"1,10\n1,30\n2,10\n12,7\n"


def pairs_of(interactions):
    """The interactions as a sorted list of (user id, item id)."""
    users = interactions.user_ids[interactions.pairs.users()].tolist()
    return sorted(zip(users, interactions.item_ids[interactions.pairs.indices].tolist(), strict=True))


def lines_of(pairs, separator=","):
    return "".join(f"{separator.join(map(str, pair))}\n" for pair in pairs)
