"""What calls are predicted to take, and what the metrics say of them."""

from __future__ import annotations

import pytest

from srds_fast.planner.choose import choose, until
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.plan import Plan
from srds_fast.planner.search import Known, Pricing, compare
from srds_fast.planner.settings import Settings
from srds_fast.serving.batching import PARALLEL, SEQUENTIAL, CallCosts, Warmed, costs_of
from srds_fast.serving.contract import Usage
from srds_fast.serving.kinds import Kind
from srds_fast.serving.metrics import CLIENT_LEFT, MEASURES, MOST_VALUES, Metrics
from srds_fast.serving.predictions import LAST, Predictions

STEPS = 50
CURVE = CostCurve((1, 8, 64), (0.01, 0.012, 0.096))
KIND = Kind(STEPS, None, None, 3.0, False)
COSTS = CallCosts(CURVE, (5,) * 10, STEPS)


def chosen(method: str) -> Plan:
    pricing = Pricing(Known(CURVE), lambda plan: 0.0, Context("none", "none", "none", None, "none"))
    plan, _ = compare(STEPS, Settings(method=method), False, pricing)
    return plan


def test_costs_follow_from_the_curve_and_the_waves_of_the_plan() -> None:
    plan = chosen("auto")
    assert plan.prediction is not None
    iterations = plan.prediction.chosen.iterations
    costs = costs_of(plan, STEPS, seconds=1.0)
    assert costs.widths == tuple(until(plan, iterations).widths(iterations))
    assert costs.seconds(PARALLEL, 1) == pytest.approx(1.0), "as measured, with what is outside the network"
    in_network = sum(CURVE(width) for width in costs.widths)
    in_network_of_two = sum(CURVE(2 * width) for width in costs.widths)
    assert costs.seconds(PARALLEL, 2) == pytest.approx(in_network_of_two + 2 * (1.0 - in_network))
    assert costs.seconds(SEQUENTIAL, 4) == pytest.approx(STEPS * CURVE(4) + 4 * (1.0 - in_network))


def test_a_sequential_plan_costs_the_same_in_both_ways() -> None:
    costs = costs_of(chosen("sequential"), STEPS, seconds=0.6)
    assert costs.seconds(PARALLEL, 3) == costs.seconds(SEQUENTIAL, 3)


@pytest.mark.parametrize("plan", [None, choose(STEPS, Settings(method="srds"))])
def test_where_no_curve_is_known_every_row_costs_as_the_first(plan: Plan | None) -> None:
    costs = costs_of(plan, STEPS, seconds=2.0, measured=[(SEQUENTIAL, 2, 0.7)])
    assert costs.seconds(PARALLEL, 1) == pytest.approx(2.0)
    assert costs.seconds(PARALLEL, 4) == pytest.approx(8.0)
    assert costs.seconds(SEQUENTIAL, 2) == 0.7, "but for what was timed"


def test_the_last_calls_tell_what_the_next_one_takes() -> None:
    assert Predictions(Warmed()).seconds(KIND, PARALLEL, 1) == 0, "nothing is known"
    known = Predictions(Warmed((1, 2, 4), ((KIND, COSTS),)))
    assert known.seconds(KIND, PARALLEL, 4) == COSTS.seconds(PARALLEL, 4)
    for number in range(100):
        known.record(KIND, PARALLEL, 4, float(number))
    assert known.seconds(KIND, PARALLEL, 4) == 100 - LAST + 0.9 * LAST
    assert known.seconds(KIND, PARALLEL, 2) == COSTS.seconds(PARALLEL, 2), "of others nothing was seen"


def test_images_that_no_call_is_prepared_for_are_made_by_several() -> None:
    known = Predictions(Warmed((1, 2, 4), ((KIND, COSTS),)))
    parts = [COSTS.seconds(SEQUENTIAL, images) for images in (4, 2, 1)]
    assert known.seconds(KIND, SEQUENTIAL, 7) == pytest.approx(sum(parts))


def test_metrics_are_counted_once_a_call_and_once_a_request() -> None:
    pytest.importorskip("prometheus_client")
    metrics = Metrics()
    usage = Usage(2.0, 0.5, waves=12, rows=90, plan="srds", batch=2, fallback="no loop", missed=1)
    metrics.made(usage, SEQUENTIAL, first=True)
    metrics.made(usage, SEQUENTIAL, first=False)
    metrics.answered(200, 2.0)
    metrics.answered(CLIENT_LEFT, 0.1)
    metrics.queue(3, 1, 2)
    metrics.warmed(4.0, 1.5)
    lines = metrics.text().splitlines()
    for line in (
        'srds_fast_requests_total{status="200"} 1.0',
        'srds_fast_requests_total{status="499"} 1.0',
        "srds_fast_request_seconds_sum 2.1",
        "srds_fast_queue_seconds_count 2.0",
        'srds_fast_calls_total{plan="srds",way="sequential"} 1.0',
        "srds_fast_batch_sum 2.0",
        "srds_fast_waves_sum 12.0",
        "srds_fast_rows_sum 90.0",
        'srds_fast_fallbacks_total{reason="no loop"} 1.0',
        "srds_fast_tolerance_misses_total 1.0",
        "srds_fast_queue_length 3.0",
        "srds_fast_running_calls 1.0",
        "srds_fast_slots 2.0",
        'srds_fast_warmup_seconds{images="one"} 4.0',
        'srds_fast_warmup_seconds{images="several"} 1.5',
    ):
        assert line in lines
    for name in MEASURES:
        assert any(line.startswith(f"# TYPE {name}") for line in lines)


def test_plans_and_reasons_do_not_fill_the_memory() -> None:
    pytest.importorskip("prometheus_client")
    metrics = Metrics()
    for number in range(10 * MOST_VALUES):
        metrics.made(Usage(1.0, 0.0, 1, 1, plan=f"plan {number}"), PARALLEL, first=True)
    found = [line for line in metrics.text().splitlines() if line.startswith("srds_fast_calls_total")]
    assert len(found) == MOST_VALUES + 1
    assert any('plan="other"' in line for line in found)
