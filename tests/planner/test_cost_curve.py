"""What a call of the network costs, by the number of its rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import srds_fast
from srds_fast.planner.cost_curve import CostCurve

curves = st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 1.0)), min_size=1, max_size=6, unique_by=lambda x: x[0])


@given(curves, st.integers(1, 100), st.integers(1, 100))
def test_more_rows_never_cost_less(points: list[tuple[int, float]], one: int, other: int) -> None:
    points.sort()
    curve = CostCurve(tuple(rows for rows, _ in points), tuple(seconds for _, seconds in points))
    few, many = sorted((one, other))
    assert 0 < curve(few) <= curve(many)
    for rows, seconds in points:
        assert curve(rows) >= seconds * (1 - 1e-12)


def test_a_curve_is_exact_where_it_was_measured_and_straight_between() -> None:
    curve = CostCurve((1, 4, 8), (1.0, 2.0, 4.0), nbytes=(100, 400, 800))
    assert [curve(rows) for rows in (1, 4, 6, 8, 16)] == [1.0, 2.0, 3.0, 4.0, 8.0]
    assert [curve.memory(rows) for rows in (1, 6, 16)] == [100, 600, 1600]


@pytest.mark.parametrize(
    "broken", [((), ()), ((1, 1), (1.0, 1.0)), ((1,), (float("nan"),)), ((2, 1), (1.0, 1.0)), ((1,), (1.0, 2.0))]
)
def test_a_broken_curve_is_refused(broken: tuple[Any, Any]) -> None:
    with pytest.raises(srds_fast.InvalidArgument):
        CostCurve(*broken)


def test_a_shared_call_costs_what_the_busiest_rank_evaluates_and_the_gather() -> None:
    of_rank = CostCurve((1, 2, 4, 8), (1.0, 2.0, 4.0, 8.0))
    found = of_rank.shared(ranks=4, units=2, gather=lambda units: 0.01 * units, most=8)
    assert found.ranks == 4
    for rows in range(1, 9):
        assert found(rows) == pytest.approx(of_rank(math.ceil(2 * rows / 4)) + 0.02 * rows)
