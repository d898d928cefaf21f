from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.solvers.convergence import Diverged, Monitor, estimated_error


@given(st.floats(0.01, 0.9), st.floats(1e-6, 10), st.integers(1, 5))
def test_the_estimate_bounds_the_error_of_a_geometric_sequence(ratio: float, first: float, iteration: int) -> None:
    """x_p = x + c r^p: the change is c r^(p-1) (1 - r), the error c r^p."""
    change = [first * ratio**p * (1 - ratio) for p in range(iteration + 1)]
    error = first * ratio ** (iteration + 1)
    estimate = estimated_error(change[-2:])
    assert estimate >= error
    if 0.15 < ratio < 0.25:
        assert estimate <= 4 * error, "a bound, not a guess at the worst"


def test_a_change_that_does_not_shrink_promises_nothing() -> None:
    assert estimated_error([1.0, 1.0]) == estimated_error([1.0, 2.0]) == estimated_error([0.0, 1.0]) == math.inf
    assert estimated_error([1.0, 0.0]) == estimated_error([0.0]) == 0.0
    assert estimated_error([1.0, 1e-6]) > 1e-8, "one lucky iteration promises no miracle"


def test_each_sample_is_judged_alone() -> None:
    monitor = Monitor(3, tolerance=1e-2, bitwise=False)
    assert monitor.judge(1, (0, 1, 2), [1.0, 1e-3, 1.0], exact=False, stationary=[False] * 3) == (0, 2)
    assert monitor.judge(2, (0, 2), [0.5, 0.01], exact=False, stationary=[False] * 2) == (0,)
    assert monitor.judge(3, (0,), [0.4], exact=True, stationary=[False]) == ()
    assert monitor.converged == [True] * 3
    assert monitor.iterations == [3, 1, 2]
    assert monitor.change == [[1.0, 1e-3, 1.0], [0.5, None, 0.01], [0.4, None, None]]


def test_bits_only_waits_for_bits() -> None:
    monitor = Monitor(2, tolerance=1.0, bitwise=True)
    assert monitor.judge(1, (0, 1), [0.0, 0.0], exact=False, stationary=[False, True]) == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_diverged(bad: float) -> None:
    with pytest.raises(Diverged):
        Monitor(2, 1e-2, False).judge(1, (0, 1), [1.0, bad], exact=False, stationary=[False] * 2)


def test_growth_is_divergence_only_when_a_tolerance_waits_for_it_to_settle() -> None:
    patient, strict = Monitor(1, 1e-2, True), Monitor(1, 1e-2, False)
    for monitor in (patient, strict):
        monitor.judge(1, (0,), [1.0], exact=False, stationary=[False])
    assert patient.judge(2, (0,), [1e4], exact=False, stationary=[False]) == (0,)
    with pytest.raises(Diverged, match="thousandfold"):
        strict.judge(2, (0,), [1e4], exact=False, stationary=[False])
