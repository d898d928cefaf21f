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
    names = [[(column, repr(entry)) for column, entry in enumerate(row)] for row in rows]
    taken: Counter[tuple[int, str]] = Counter()
    chosen = set()
    numbers: dict[tuple[int, str], list[int]] = {}
    for number, row_names in enumerate(names):
        numbers.setdefault(row_names[0], []).append(number)
    for of_value in numbers.values():
        number = min(of_value, key=lambda each: sum(taken[name] for name in names[each][1:]))
        chosen.add(number)
        taken.update(names[number][1:])
    return [
        pytest.param(*row, marks=() if number in chosen else pytest.mark.exhaustive) for number, row in enumerate(rows)
    ]


def thinned_product(*columns: Iterable[Any]) -> list[Any]:
    """The product of the columns, thinned."""
    return thinned(product(*columns))
