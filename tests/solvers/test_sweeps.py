"""Fixed-point methods before any network is called: options, and the program of sweeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast import InvalidArgument
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.options import FixedPoint, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point.program import Sweeps


def check_sweeps(found: Sweeps, num_steps: int) -> None:
    for positions in found.positions:
        assert list(positions) == sorted(set(positions))
        assert 0 <= positions[0] <= positions[-1] < num_steps
    assert list(found.final_steps) == sorted(found.final_steps)
    assert len(found.final_steps) == found.num_waves
    assert found.final_steps[-1] == num_steps


@given(st.integers(1, 60), st.data())
def test_sweeps_begin_where_nothing_is_exact_yet(num_steps: int, data: st.DataObject) -> None:
    iterations = data.draw(st.integers(1, num_steps))
    found = sweeps.fixed_point(num_steps, iterations)
    check_sweeps(found, num_steps)
    assert found.num_waves == iterations
    widths = [len(positions) for positions in found.positions]
    for number, positions in enumerate(found.positions):
        assert positions == tuple(range(number, num_steps))
        assert found.spent(number + 1) == (number + 1, sum(widths[: number + 1]), max(widths[: number + 1]))
    assert found.final_steps[:-1] == tuple(range(1, iterations))
    assert found.num_rows == sum(widths)


@given(st.integers(1, 60), st.integers(1, 70))
def test_windows_begin_at_every_step(num_steps: int, window: int) -> None:
    found = sweeps.windows(num_steps, window)
    check_sweeps(found, num_steps)
    for first, positions in enumerate(found.positions):
        assert positions == tuple(range(first, min(first + window, num_steps)))
    assert found.spent(num_steps).waves == num_steps


@pytest.mark.parametrize(
    ("cls", "given", "says"),
    [
        (ParaTAA, {"history": 6}, "history is 6. It must be a whole number, 0 to 5"),
        (ParaTAA, {"order": 0}, "order is 0. It must be a whole number, 1 or more"),
        (ParaTAA, {"step_tolerance": 1e-3}, "step_tolerance is 0.001, and there is no window"),
        (ParaDiGMS, {"window": None, "tolerance": 1e-3}, "tolerance is 0.001, and there is no window"),
        (ParaDiGMS, {"tolerance": -1.0}, "tolerance is -1.0. It must be a positive number"),
        (ParaTAA, {"data_std": 0}, "data_std is 0. It must be a positive number"),
        (ParaTAA, {"data_std": math.nan}, "data_std is nan"),
        (ParaTAA, {"regularisation": math.inf}, "regularisation is inf"),
        (ParaDiGMS, {"step_tolerance": 0.0}, "step_tolerance is 0.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", "says"),
)
def test_bad_options_are_named(cls: type[FixedPoint], given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        cls(**given)
