"""The load bench on a clock that is not real: known answers, and a policy that is never far from the better one."""

from __future__ import annotations

import pytest

from bench.speed import serving_load
from bench.speed.serving_load import SIZES, arrivals, capacity, nearly_free, planned, simulated
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.serving.batching import SEQUENTIAL, CallCosts, Policy


def test_requests_one_by_one_wait_for_those_before_them() -> None:
    costs = CallCosts(CostCurve((1, 100), (0.1, 0.1)), (5,) * 10, 50)  # 1 second a parallel call
    latencies, calls, refused = simulated(costs, Policy.of("never", SIZES), [0.0, 0.5, 0.6, 10.0])
    assert latencies == pytest.approx([1.0, 1.5, 2.4, 1.0])
    assert (calls, refused) == ([1, 1, 1, 1], 0)
    latencies, calls, _ = simulated(costs, Policy.of("adaptive", SIZES), [0.0, 0.5, 0.6, 10.0])
    assert latencies == pytest.approx([1.0, 1.5, 1.4, 1.0])
    assert calls == [1, 2, 1]


def test_a_full_queue_refuses() -> None:
    costs = CallCosts(CostCurve((1,), (1.0,)), (1,) * 50, 50)
    latencies, _, refused = simulated(costs, Policy.of("never", SIZES), [0.0] * 100)
    assert (len(latencies), refused) == (65, 35), "one runs, 64 wait"


def test_adaptive_is_never_far_from_the_better_of_the_two() -> None:
    costs = planned(nearly_free(8))
    for share in (0.1, 0.5, 0.9):
        times = arrivals(share * capacity(costs, SIZES) / costs.seconds(SEQUENTIAL, 1), 80, seed=0)
        mean = {}
        for name, batching in serving_load.POLICIES.items():
            latencies, _, _ = simulated(costs, Policy.of(batching, SIZES), times)
            mean[name] = sum(latencies) / len(latencies)
        others = min(mean["parallel only"], mean["batched sequential"])
        assert mean["adaptive"] <= 1.1 * others
