"""Products of cases that take minutes: some by default, all of them with `pytest -m exhaustive` after that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def thinned(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, those that the default command leaves out marked as exhaustive.

    By default there is one case for every value of the first column: the one whose other values were taken least
    often so far. Values are told apart by their `repr`.
    """
    rows = [tuple(case) for case in cases]
    taken: Counter[tuple[int, str]] = Counter()
    chosen = set()
    for value in dict.fromkeys(repr(row[0]) for row in rows):
        others = [
            (number, [(column, repr(entry)) for column, entry in enumerate(row) if column > 0])
            for number, row in enumerate(rows)
            if repr(row[0]) == value
        ]
        number, entries = min(others, key=lambda each: sum(taken[entry] for entry in each[1]))
        chosen.add(number)
        taken.update(entries)
    return [
        pytest.param(*row, marks=() if number in chosen else pytest.mark.exhaustive) for number, row in enumerate(rows)
    ]


def thinned_product(*columns: Iterable[Any]) -> list[Any]:
    """The product of the columns, thinned."""
    return thinned(product(*columns))
