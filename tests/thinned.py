"""Products of cases that take minutes: some by default, all of them with `pytest -m exhaustive` after that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
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


def by_pairs(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[Any]:
    """The product of three columns, of which the default command takes those that have every pair of values once.

    Every value of the first column meets every one of the second, and each of both every one of the third if the
    other is at least as long as that.
    """
    return [
        pytest.param(a, b, c, marks=() if (i + j) % len(third) == k else pytest.mark.exhaustive)
        for (i, a), (j, b), (k, c) in product(enumerate(first), enumerate(second), enumerate(third))
    ]
