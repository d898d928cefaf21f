from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.solvers.convergence import (
    BLOCKS,
    LOOSEST,
    MOST_SLOWING,
    SECANTS,
    Diverged,
    Monitor,
    Signs,
    estimated_error,
)


def signs(*changes: float) -> list[Signs]:
    return list(map(Signs, changes))


@given(st.floats(0.01, 0.9), st.floats(1e-6, 10), st.integers(1, 5))
def test_the_estimate_bounds_the_error_of_a_geometric_sequence(ratio: float, first: float, iteration: int) -> None:
    """x_p = x + c r^p: the change is c r^(p-1) (1 - r), the error c r^p."""
    change = [first * ratio**p * (1 - ratio) for p in range(iteration + 1)]
    error = first * ratio ** (iteration + 1)
    estimate = estimated_error(change)
    assert estimate >= error
    if 0.2 < ratio < 0.3:
        assert estimate <= 4 * error, "a bound, not a guess at the worst"


def test_a_change_that_does_not_shrink_promises_nothing() -> None:
    assert estimated_error([1.0, 1.0]) == estimated_error([1.0, 2.0]) == estimated_error([0.0, 1.0]) == math.inf
    assert estimated_error([1.0, 0.0]) == estimated_error([0.0]) == 0.0
    assert estimated_error([1.0, 1e-6]) == pytest.approx(0.05), "one lucky iteration promises no miracle"


def test_after_one_change_that_of_parareal_is_taken_for_a_third_of_the_error() -> None:
    assert estimated_error([0.1]) == pytest.approx(0.3)
    assert math.isinf(estimated_error([1e-9], BLOCKS._replace(fewest=2)))


def test_where_noise_is_added_estimates_count_twice_and_no_tolerance_is_loose() -> None:
    noisy = BLOCKS.where_noise_is_added()
    assert estimated_error([0.1], noisy) == 2 * estimated_error([0.1])
    assert estimated_error([1.0, 0.0], noisy, 0.3) == 0.6, "a doubt, too"
    assert Monitor(1, tolerance=0.5, bitwise=False, contraction=noisy).tolerance == LOOSEST
    assert Monitor(1, tolerance=1e-3, bitwise=False, contraction=noisy).tolerance == 1e-3


def test_a_change_that_did_not_shrink_is_remembered_for_one_more_iteration() -> None:
    """Alternating changes, as Parareal has them where a clip is entered and left: 1, 1, r, r, r^2, .."""
    assert math.isinf(estimated_error([1.0, 1.0, 0.1])), "the next change is as large"
    assert estimated_error([1.0, 1.0, 0.1, 0.01]) == pytest.approx(0.01)


def test_a_small_change_behind_a_boundary_that_still_moves_is_one_by_chance() -> None:
    """Flow matching, 8 blocks: the sample moved by 3.0e-3 in iteration 2 and by 4.1e-3 in iteration 3."""
    changes = [17.6e-3, 3.0e-3]
    assert estimated_error(changes, boundary=16.3e-3) >= 4.1e-3 > estimated_error(changes)
    assert estimated_error(changes, boundary=3.0e-3) == estimated_error(changes), "no more than the sample"
    assert estimated_error([1.0, 0.0], boundary=1.0) == 0.0, "both terms of the correction are the same"


def test_a_doubt_counts_more_where_changes_shrink_less_than_before() -> None:
    steady = [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5]
    assert estimated_error(steady, SECANTS, 1e-3) == pytest.approx(1e-3, rel=1e-3)
    # the fourth wave shrinks three times less than the third did
    rough = [1.0, 0.1, 1e-2, 3e-3, 3e-4, 3e-5]
    assert estimated_error(rough, SECANTS, 1e-3) == pytest.approx(9e-3, rel=1e-3)
    rests = [1.0, 0.1, 0.0, 3e-3, 3e-4, 3e-5]
    assert estimated_error(rests, SECANTS, 1e-3) >= MOST_SLOWING**2 * 1e-3


def test_each_sample_is_judged_alone() -> None:
    monitor = Monitor(3, tolerance=1e-2, bitwise=False)
    assert monitor.judge(1, (0, 1, 2), signs(1.0, 1e-3, 0.02), exact=False, stationary=[False] * 3) == (0, 2)
    assert monitor.judge(2, (0, 2), signs(0.5, 0.005), exact=False, stationary=[False] * 2) == (0,)
    assert monitor.judge(3, (0,), signs(0.4), exact=True, stationary=[False]) == ()
    assert monitor.converged == [True] * 3
    assert monitor.iterations == [3, 1, 2]
    assert monitor.change == [[1.0, 1e-3, 0.02], [0.5, None, 0.005], [0.4, None, None]]


def test_bits_only_waits_for_bits() -> None:
    monitor = Monitor(2, tolerance=1.0, bitwise=True)
    assert monitor.judge(1, (0, 1), signs(0.0, 0.0), exact=False, stationary=[False, True]) == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_diverged(bad: float) -> None:
    with pytest.raises(Diverged):
        Monitor(2, 1e-2, False).judge(1, (0, 1), signs(1.0, bad), exact=False, stationary=[False] * 2)


def test_growth_is_divergence_only_when_a_tolerance_waits_for_it_to_settle() -> None:
    patient, strict = Monitor(1, 1e-2, True), Monitor(1, 1e-2, False)
    for monitor in (patient, strict):
        monitor.judge(1, (0,), signs(1.0), exact=False, stationary=[False])
    assert patient.judge(2, (0,), signs(1e4), exact=False, stationary=[False]) == (0,)
    with pytest.raises(Diverged, match="thousandfold"):
        strict.judge(2, (0,), signs(1e4), exact=False, stationary=[False])
