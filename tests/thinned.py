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


def by_pairs(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any], share: int = 1) -> list[Any]:
    """Cases of three columns: every pair of values of the first two, and the values of the third in turn.

    So a value of the third column meets every value of another one that is at least as long as the third. The default
    command takes one case in `share`.
    """
    turns = len(third)
    return [
        pytest.param(
            a, b, third[(i + j) % turns], marks=() if (i + j) // turns % share == 0 else pytest.mark.exhaustive
        )
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]
