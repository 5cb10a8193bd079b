# SPDX-License-Identifier: Apache-2.0
"""Interactions in JSON lines: an object on each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from nb_sparse_adam._src.recommender.codes import Found, Ids
from nb_sparse_adam._src.recommender.columns import ReadOptions, find_columns, shown, what_was_taken
from nb_sparse_adam._src.recommender.further import Further
from nb_sparse_adam._src.recommender.lines import CARRIAGE_RETURN, Lines
from nb_sparse_adam.errors import InteractionsError


class JsonLines:
    """The objects of a file, read once; after that `taken` says which of their keys were used."""

    def __init__(self, name: str, blocks: Iterable[Lines], options: ReadOptions, further: Further) -> None:
        self._name, self._blocks, self._options, self._further = name, blocks, options, further
        self.taken = ""

    def pairs(self, users: Ids, items: Ids) -> Iterator[Found]:
        """Yield interactions, a block of lines at a time."""
        keys: dict[str, str] | None = None
        for first, text in self._blocks:
            numbers: list[int] = []
            columns: dict[str, list[str]] = {}
            for number, line in enumerate(text.replace(CARRIAGE_RETURN, "\r").split("\n"), first):
                if not line or line.isspace():
                    continue
                found = self._object(number, line)
                if keys is None:
                    keys = self._keys(number, found)
                numbers.append(number)
                for kind, key in keys.items():
                    value = (self._id if kind in ("user", "item") else self._plain)(number, found, key)
                    columns.setdefault(kind, []).append(value)
            if numbers:
                who, what = columns.pop("user"), columns.pop("item")
                yield self._further.of_text(numbers, columns).of(who, what, users, items)

    def _object(self, number: int, line: str) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also of a number of too many digits
            reason = getattr(error, "msg", None) or str(error) or "it is nested too deeply"
            raise InteractionsError(
                f"{self._name}, line {number}: is no JSON ({reason}), got {line[:60]!r}; expected an object "
                f"on each line"
            ) from error
        if not isinstance(found, dict):
            raise InteractionsError(
                f"{self._name}, line {number}: expected a JSON object with a user and an item, got "
                f"{line[:60]!r}"
            )
        return found

    def _keys(self, number: int, found: dict[str, Any]) -> dict[str, str]:
        names = list(found)
        where = f"{self._name}, line {number}"
        columns = find_columns(where, self._options, names, len(names), ordered=False)
        self.taken = what_was_taken(columns, names)
        kinds = ("user", "item", *columns.further)
        return {kind: names[column] for kind, column in zip(kinds, columns.all(), strict=True)}

    def _value(self, number: int, found: dict[str, Any], key: str) -> Any:
        if found.get(key) is None:
            got = "null for" if key in found else "no"
            raise InteractionsError(
                f"{self._name}, line {number}: has {got} key {shown(key)}; expected one in each object, "
                f"mend or remove the line"
            )
        return found[key]

    def _plain(self, number: int, found: dict[str, Any], key: str) -> str:
        value = self._value(number, found, key)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self._wrong(number, key, value, "a number or a string")
        return str(value)

    def _id(self, number: int, found: dict[str, Any], key: str) -> str:
        value = self._value(number, found, key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self._wrong(number, key, value, "an integer or a string")
        name = value.strip()
        if (
            not name
            or any(one in name for one in "\n\r\0")
            or any("\ud800" <= one <= "\udfff" for one in name)
        ):
            raise self._wrong(number, key, value, "text of one line without surrogates")
        return name

    def _wrong(self, number: int, key: str, value: Any, expected: str) -> InteractionsError:
        kind = "a nested value" if isinstance(value, dict | list) else json.dumps(value)[:60]
        return InteractionsError(
            f"{self._name}, line {number}: {shown(key)} is {kind}; expected {expected}, mend or "
            f"remove the line"
        )
