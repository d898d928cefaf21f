"""Exploration, with times that are given: it decides by them, within its budget, and for good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import srds_fast
from srds_fast.planner.choose import candidates, choose, plan_of
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.exploration import CALLS, DROPPED, EXPLORING, FROZEN, MEASURED, STOCK, WORTH, Exploration
from srds_fast.planner.plan import Candidate, Plan, Prediction
from srds_fast.planner.search import Known, Pricing, compare
from srds_fast.planner.settings import Settings
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.srds import SRDS

CURVE = CostCurve((1,), (1e-3,))
N = 50
SEQUENTIAL = choose(N, Settings(method="sequential"))
OTHERS = [plan_of(options, N, Settings(), stochastic=False) for options in (SRDS(), SRDS(num_blocks=7), ParaTAA())]
PLANS = [SEQUENTIAL, *OTHERS]


def predicted(seconds: Mapping[Plan, float]) -> list[Plan]:
    """The plans, predicted to take so many seconds."""
    found = {plan: Candidate(plan.short(), 1, 1, 1, 1, each, each) for plan, each in seconds.items()}
    return [
        replace(plan, prediction=Prediction(found[plan], tuple(found.values()), "cheap", CURVE)) for plan in seconds
    ]


def explored(seconds: Mapping[Plan, float], budget: float = 3.0, *, stock: bool = True) -> Exploration:
    exploration, plans = Exploration(budget), predicted(seconds)
    exploration.predict(plans, min(plans, key=lambda plan: plan.prediction.chosen.seconds), version=0)
    if stock:
        exploration.offer_stock()
    return exploration


def one_call(exploration: Exploration, took: Mapping[Plan | str, float], work: float = 1.0) -> None:
    plan = exploration.plan
    explores = exploration.begin()
    if explores:
        exploration.record(plan, min(took[plan], 9.0), ended=took[plan] < math.inf, work=work)
        while (way := exploration.due()) is not None:
            exploration.record(way, min(took[way], 9.0), ended=took[way] < math.inf)
            exploration.spend(min(took[way], 9.0))
    exploration.end(plan, took[plan], explored=explores, work=work)


times = st.floats(0.2, 5.0)


@given(st.tuples(*[times] * 4), st.tuples(*[times] * 5), st.sampled_from([0.5, 1.0, 3.0, 20.0]))
@example((3.0, 1.0, 0.5, 0.5), (1.0,) * 5, 0.5)
def test_the_fastest_that_was_timed_is_kept_within_the_budget(
    guesses: tuple[float, ...], real: tuple[float, ...], budget: float
) -> None:
    """However wrong the predictions are: no call after exploring is slower than both loops, if it could time them."""
    exploration = explored(dict(zip(PLANS, guesses, strict=True)), budget)
    took = dict(zip([*PLANS, STOCK], real, strict=True))
    for _ in range(CALLS):
        assert exploration.state == EXPLORING or exploration.calls < CALLS
        one_call(exploration, took)
    assert exploration.state == FROZEN
    last = max(real)  # what is not known may take longer than predicted
    assert exploration.spent <= budget * max(guesses[0], real[0]) * (1 + 1e-5) + last
    chosen = STOCK if exploration.chose_stock else exploration.plan
    timed = set(exploration._seconds)
    if SEQUENTIAL.signature in timed:
        loops = [took[SEQUENTIAL]] + ([took[STOCK]] if STOCK in timed else [])
        assert took[chosen] <= min(loops) / (WORTH if chosen in (STOCK, SEQUENTIAL) else 1.0)
        if chosen not in (STOCK, SEQUENTIAL):
            assert took[chosen] == min(took[plan] for plan in OTHERS if plan.signature in timed)
    if budget >= 20 * CALLS * max(real) / real[0]:
        assert timed == {*(plan.signature for plan in PLANS), STOCK}
    before = exploration.plan
    for _ in range(20):
        one_call(exploration, took)
    assert exploration.plan == before or exploration.state == DROPPED


def test_a_wrong_prediction_costs_one_look() -> None:
    """The case of the issue: predicted at 0.6 of sequential, it takes 1.9 times as long."""
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.6})
    took = {SEQUENTIAL: 1.0, OTHERS[0]: 1.9, STOCK: 1.1}
    one_call(exploration, took)
    assert exploration.plan == SEQUENTIAL
    for _ in range(2):
        one_call(exploration, took)
    assert (exploration.state, exploration.plan, exploration.chose_stock) == (FROZEN, SEQUENTIAL, False)
    assert "nothing else took less than 93% of its time" in exploration.plan.prediction.why
    assert ": 1.90 s" in exploration.plan.prediction.why


def test_the_reason_tells_measured_times_only_after_they_were_taken() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.6})
    took = {SEQUENTIAL: 2.0, OTHERS[0]: 1.0, STOCK: 2.2}
    while exploration.state == EXPLORING:
        assert exploration.plan.prediction.why == "predicted, and not timed yet: cheap"
        one_call(exploration, took)
    why = exploration.plan.prediction.why
    assert "2.00 times faster than the sequential loop and 2.20 times faster than the loop without srds_fast" in why


def test_the_reason_tells_the_ratios_that_decided() -> None:
    """Of two calls that ran both, one says 0.70 times faster, as the plan was interrupted, and one twice as fast."""
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5})
    for seconds in 1 / 0.7, 0.5:
        assert exploration.begin()
        exploration.record(SEQUENTIAL, 1.0)
        exploration.record(OTHERS[0], seconds)
        exploration.record(STOCK, 9.0, ended=False)
        exploration.end(exploration.plan, seconds, explored=True)
    exploration.freeze()
    assert exploration.plan == OTHERS[0]
    assert exploration.why.startswith("2.00 times faster than the sequential loop, timed in 2 calls")


def test_the_stock_loop_is_taken_where_it_is_the_fastest() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.9})
    for _ in range(CALLS):
        one_call(exploration, {SEQUENTIAL: 1.0, OTHERS[0]: 1.3, STOCK: 0.9})
    assert exploration.chose_stock
    assert exploration.plan == SEQUENTIAL, "for calls that the stock loop cannot serve"


def test_a_plan_whose_calls_turn_slow_is_dropped_for_good() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5})
    fast = {SEQUENTIAL: 1.0, OTHERS[0]: 0.5, STOCK: 1.0}
    slow, slower = fast | {OTHERS[0]: 1.6}, fast | {OTHERS[0]: 2.1}
    for took in (fast, fast, fast, slow, fast, fast, slow, fast, fast, fast, fast):
        one_call(exploration, took)
    assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0]), "two were slow, the five saved time"
    for took in (slower, fast, slow):
        one_call(exploration, took)
    assert (exploration.state, exploration.plan) == (FROZEN, SEQUENTIAL), "its call times that loop again"
    assert "This call times the sequential loop again" in exploration.plan.prediction.why
    one_call(exploration, fast)
    assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0]), "and the call after it times the plan again"
    assert "The sequential loop took 1.00 s. This call times the plan again" in exploration.plan.prediction.why
    one_call(exploration, slow)
    assert (exploration.state, exploration.plan) == (DROPPED, SEQUENTIAL)
    assert "2 of its last 5 calls" in exploration.plan.prediction.why
    assert "It was dropped: it takes 1.60 s a call now, its baseline 1.00 s" in exploration.plan.prediction.why
    for _ in range(5):
        one_call(exploration, fast)
    assert (exploration.state, exploration.plan) == (DROPPED, SEQUENTIAL)


def test_a_plan_stays_where_the_whole_machine_turned_slow() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5})
    fast = {SEQUENTIAL: 1.0, OTHERS[0]: 0.5, STOCK: 1.0}
    slow = {way: 3.0 * seconds for way, seconds in fast.items()}
    for took in (fast, fast, fast, slow, slow, slow):
        one_call(exploration, took)
    assert exploration.plan == SEQUENTIAL
    for _ in range(2):
        one_call(exploration, slow)
        assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0])
    assert "was kept" in exploration.plan.prediction.why
    for _ in range(9):
        one_call(exploration, slow)
    assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0])


@pytest.mark.parametrize("slow_calls", [2, 3])
def test_a_burst_of_other_work_does_not_drop_a_plan(slow_calls: int) -> None:
    """It ends before the sequential loop is timed again, or while it is."""
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.8})
    fast = {SEQUENTIAL: 1.0, OTHERS[0]: 0.8, STOCK: 1.0}
    slow = {way: 2.5 * seconds for way, seconds in fast.items()}
    for took in (fast, fast, fast, slow, slow, *[slow] * (slow_calls - 2), fast, fast, fast):
        one_call(exploration, took)
    assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0])
    assert "It was kept: it takes 0.80 s a call now" in exploration.plan.prediction.why
    for _ in range(30):
        one_call(exploration, fast)
        assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0]), "what was judged is not doubted again"


@pytest.mark.parametrize("other_work", [False, True])
def test_a_plan_that_gains_little_is_dropped_when_some_inputs_take_all_of_it(other_work: bool) -> None:
    """What counts is what calls take together: some inputs need more iterations, all calls meet other work."""
    took = {SEQUENTIAL: 1.0, OTHERS[0]: 0.92, STOCK: 1.0}
    gains_much = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5})
    gains_little = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.92})
    for exploration, usual in (gains_little, 0.92), (gains_much, 0.5):
        for seconds in (usual, usual, usual, usual, 1.9, usual, usual):
            one_call(exploration, took | {OTHERS[0]: seconds}, work=1.0 if other_work else seconds / usual)
    assert (gains_little.state == DROPPED) != other_work
    assert "times as long as its baseline in total" in gains_little.plan.prediction.why
    assert (gains_much.state, gains_much.plan) == (FROZEN, OTHERS[0])


def test_of_plans_that_nobody_has_run_the_one_that_may_be_fastest_is_timed_first() -> None:
    first, second, other = OTHERS
    plans = predicted({SEQUENTIAL: 1.0, first: 0.5, second: 0.6, other: 0.9})
    for hope, following in (1.0, first), (0.7, second):
        exploration = Exploration(budget=3.0)
        exploration.predict(plans, plans[-1], version=0, hope={second.signature: hope})
        assert exploration.begin()
        exploration.record(other, 0.9)
        exploration.record(SEQUENTIAL, 1.0)
        assert exploration.due() == following


def test_a_method_that_nobody_has_run_is_not_timed_first_where_it_could_only_lose() -> None:
    first, second, other = OTHERS
    assert first.method == second.method != other.method
    for seconds, following in (1.3, first), (0.7, other):
        exploration = Exploration(budget=3.0)
        plans = predicted({SEQUENTIAL: 1.0, second: 0.5, first: 0.6, other: seconds})
        exploration.predict(plans, plans[1], version=0)
        assert exploration.begin()
        exploration.record(second, 0.5)
        exploration.record(SEQUENTIAL, 1.0)
        assert exploration.due() == following


def test_a_plan_is_held_against_the_faster_of_both_loops() -> None:
    """The sequential loop was timed while the machine was busy."""
    for stock, timed in (None, True), (1.0, False):
        exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 1.6}, budget=9.0, stock=stock is not None)
        assert exploration.begin()
        exploration.record(SEQUENTIAL, 1.2)
        if stock is not None:
            exploration.record(STOCK, stock)
        assert (exploration.due() == OTHERS[0]) == timed


@pytest.mark.parametrize("on_a_tie", [True, False])
def test_on_a_tie_the_loop_is_taken_that_costs_calls_less_beside_its_turns(on_a_tie: bool) -> None:
    for stock in (0.9, 0.99, 1.01, 1.1):
        exploration = explored({SEQUENTIAL: 1.0}, stock=False)
        exploration.offer_stock(on_a_tie=on_a_tie)
        one_call(exploration, {SEQUENTIAL: 1.0, STOCK: stock})
        exploration.freeze()
        assert exploration.chose_stock == (stock == 0.9 or (on_a_tie and stock < 1.1))


def test_a_plan_whose_iterations_depend_on_the_input_is_judged_by_their_mean() -> None:
    """Every other input takes 1.3 times the work: 0.93 of the loop at best, 1.07 of it in the mean."""
    for worked, taken in ((True, False), (False, True)):
        exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.9}, stock=False)
        for work in (1.0, 1.3, 1.0):
            if not exploration.begin():
                break
            exploration.record(SEQUENTIAL, 1.0)
            exploration.record(OTHERS[0], 0.925 * work, work=work if worked else 1.0)
            exploration.end(exploration.plan, 1.0, explored=True)
        assert (exploration.plan == OTHERS[0]) == taken


def test_one_slow_run_does_not_keep_other_plans_from_being_timed() -> None:
    first, second, other = OTHERS
    exploration = explored({SEQUENTIAL: 1.0, first: 0.6, second: 0.65, other: 0.7}, budget=9.0, stock=False)
    assert exploration.begin()
    exploration.record(SEQUENTIAL, 1.0)
    exploration.record(first, 2.4)
    assert exploration.due() == other, "of a method that nobody has run"


def test_a_plan_is_timed_though_costs_were_measured_while_the_machine_was_slow() -> None:
    """All was 1.5 times as slow, up to the first run of the stock loop."""
    first, _, other = OTHERS
    exploration = explored({SEQUENTIAL: 1.5, first: 1.35, other: 1.6}, budget=9.0)
    assert exploration.begin()
    exploration.record(first, 1.65)
    exploration.record(SEQUENTIAL, 1.5)
    exploration.record(STOCK, 1.0)
    assert exploration.due() == other


def test_one_interrupted_run_does_not_decide_against_a_plan() -> None:
    """Only one call had time for the stock loop, and the plan was interrupted in it."""
    for seconds, taken in ([2.0, 0.5, 0.5], True), ([2.0, 1.1, 1.1], False):
        exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5}, budget=9.0)
        for number, each in enumerate(seconds):
            if not exploration.begin():
                break
            exploration.record(OTHERS[0], each)
            exploration.record(SEQUENTIAL, 1.0)
            if number == 0:
                exploration.record(STOCK, 1.0)
            exploration.end(exploration.plan, each, explored=True)
        assert (exploration.plan == OTHERS[0]) == taken


@pytest.mark.parametrize(("seconds", "taken"), [((0.6, 0.55), 0), ((0.7, 0.4), 1)])
def test_of_plans_that_beat_the_loops_a_prediction_helps_to_tell_the_faster(
    seconds: tuple[float, float], taken: int
) -> None:
    """A single run of each, in calls of their own, says a little less than the prediction, or clearly more."""
    plans = OTHERS[0], OTHERS[2]
    exploration = explored({SEQUENTIAL: 1.0, plans[0]: 0.4, plans[1]: 0.6}, stock=False)
    for plan, each in zip(plans, seconds, strict=True):
        assert exploration.begin()
        exploration.record(SEQUENTIAL, 1.0)
        exploration.record(plan, each)
        exploration.end(plan, each, explored=True)
    exploration.freeze()
    assert exploration.plan == plans[taken]


def test_iterations_that_were_not_expected_say_nothing_of_costs() -> None:
    """A run that took twice the iterations takes twice the time; other plans are not predicted to take longer."""
    for work, corrected in (1.0, 1.5), (2.0, 1.0):  # between the loop, which took what was predicted, and the run
        exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5, OTHERS[1]: 0.6})
        assert exploration.begin()
        exploration.record(SEQUENTIAL, 1.0)
        exploration.record(OTHERS[0], 1.0, work=work)
        assert exploration._estimate(OTHERS[1].signature) == pytest.approx(0.6 * corrected)


@pytest.mark.parametrize("stock", [0.8, 1.0, 1.2])
def test_the_next_best_follows_a_dropped_plan(stock: float) -> None:
    """After the last of them calls take the faster of the two loops: in a tie that of the pipeline."""
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5, OTHERS[1]: 0.6})
    took = {SEQUENTIAL: 1.0, OTHERS[0]: 0.5, OTHERS[1]: 0.6, STOCK: stock}
    for _ in range(CALLS):
        one_call(exploration, took)
    for plan, following in (OTHERS[0], OTHERS[1]), (OTHERS[1], None):
        assert exploration.plan == plan
        took[plan] = 3.0
        for _ in range(4):
            one_call(exploration, took)
        assert exploration.state == DROPPED
        assert exploration.plan == (following or SEQUENTIAL)
        assert plan.short() in exploration.plan.prediction.why
    assert exploration.chose_stock == (stock <= 1.0)


def test_a_run_that_was_cut_off_while_plans_were_timed_is_no_reason_to_doubt_the_plan() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5}, stock=False)
    fast = {SEQUENTIAL: 1.0, OTHERS[0]: 0.5}
    for took in (fast, fast | {OTHERS[0]: math.inf}, fast, *[fast] * 9):
        one_call(exploration, took)
        assert exploration.state == EXPLORING or exploration.plan == OTHERS[0]
    assert exploration.state == FROZEN


def test_what_did_not_come_to_its_end_is_never_taken() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5, OTHERS[1]: 0.6})
    for _ in range(CALLS):
        one_call(exploration, {SEQUENTIAL: 1.0, OTHERS[0]: math.inf, OTHERS[1]: math.inf, STOCK: math.inf})
    assert exploration.plan == SEQUENTIAL
    assert not exploration.chose_stock


def test_calls_at_once_are_not_timed() -> None:
    """They slow each other down."""
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5})
    assert exploration.begin()
    assert not exploration.begin()
    exploration.record(OTHERS[0], 9.0)
    assert exploration.due() is None
    exploration.end(OTHERS[0], 9.0, explored=True)
    exploration.end(OTHERS[0], 9.0, explored=False)
    assert (exploration.state, exploration.plan) == (EXPLORING, OTHERS[0])
    assert exploration.begin(), "alone again"
    exploration.record(OTHERS[0], 0.5)
    assert exploration.due() == SEQUENTIAL


def test_calls_that_may_not_explore_decide_nothing() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5})
    for _ in range(2 * CALLS):
        assert not exploration.begin(may_explore=False)
        exploration.end(OTHERS[0], 9.0, explored=False)
    assert (exploration.state, exploration.plan) == (EXPLORING, OTHERS[0])


def test_without_a_budget_predictions_decide() -> None:
    exploration = explored({SEQUENTIAL: 1.0, OTHERS[0]: 0.5}, budget=0)
    assert not exploration.begin()
    assert exploration.due() is None
    assert (exploration.state, exploration.plan.prediction.why) == (MEASURED, "cheap")
    exploration.freeze()
    assert (exploration.state, exploration.plan) == (FROZEN, OTHERS[0])


@pytest.mark.parametrize("explore", [-1, math.inf, math.nan, "3", True, None])
def test_a_budget_that_is_none_is_refused(explore: object) -> None:
    with pytest.raises(srds_fast.InvalidArgument, match="explore"):
        Settings(explore=explore)  # type: ignore[arg-type]


def growing(share: float) -> Pricing:
    """Costs of a network where each row beyond the first takes this share of the first."""
    rows = (1, 2, 4, 8, 16, 32, 64)
    curve = CostCurve(rows, tuple(1e-3 * (1.0 + share * (each - 1)) for each in rows))
    return Pricing(Known(curve), lambda plan: 0.0, Context("a device", "2.0", "0.1", None, "steps"))


@pytest.mark.parametrize("steps", [25, 50, 100])
@pytest.mark.parametrize("slower", ["srds", "collocation", "none"])
@pytest.mark.parametrize(("measured", "real"), [(0.05, 0.02), (0.05, 0.3), (0.1, 0.2), (0.3, 0.02), (0.3, 0.6)])
def test_costs_measured_at_a_bad_moment_do_not_hide_the_fastest_plan(
    steps: int, slower: str, measured: float, real: float
) -> None:
    """Another process slowed the measurement, or calls; and one method takes 1.2 times as long as predicted."""
    settings, true_costs = Settings(), growing(real)
    fastest, compared = compare(steps, settings, False, growing(measured))
    exploration = Exploration(budget=3.0)
    exploration.predict(compared, fastest, version=0)
    every = list(candidates(steps, settings, stochastic=False))
    took = {plan: true_costs.expected_network(plan) * (1.2 if plan.method == slower else 1.0) for plan in every}
    for _ in range(CALLS):
        one_call(exploration, took)
    assert exploration.state == FROZEN
    assert took[exploration.plan] <= 1.08 * min(took.values())


def took() -> dict[Plan | str, float]:
    return {SEQUENTIAL: 1.0, STOCK: 1.0, **dict.fromkeys(OTHERS, 0.5), OTHERS[0]: 0.4}


@pytest.mark.parametrize("calls", [0, 1, CALLS])
def test_a_choice_that_is_held_stays_whatever_later_calls_take(calls: int) -> None:
    exploration = explored(dict.fromkeys(PLANS, 1.0) | {OTHERS[0]: 0.5})
    for _ in range(calls):
        one_call(exploration, took())
    exploration.hold()
    assert exploration.state == FROZEN
    chosen = exploration.plan.signature
    for _ in range(10):
        one_call(exploration, took() | dict.fromkeys(OTHERS, 5.0))
        assert exploration.plan.signature == chosen
    assert exploration.state == FROZEN, "without `hold` it would be dropped"


def test_a_plan_in_doubt_is_kept_when_it_is_held() -> None:
    exploration = explored(dict.fromkeys(PLANS, 1.0) | {OTHERS[0]: 0.5})
    for _ in range(CALLS):
        one_call(exploration, took())
    chosen = exploration.plan.signature
    while not exploration.plan.is_sequential:
        one_call(exploration, took() | dict.fromkeys(OTHERS, 5.0))
    exploration.hold()
    assert exploration.plan.signature == chosen


def test_a_call_is_told_when_the_one_before_took_another_way() -> None:
    exploration = explored(dict.fromkeys(PLANS, 1.0))
    srds, sequential = OTHERS[0], SEQUENTIAL
    assert exploration.taken(sequential) is None, "the first one"
    assert exploration.taken(sequential) is None
    assert exploration.taken(srds) == "sequential"
    assert exploration.taken(STOCK) == srds.short()
    assert exploration.taken(STOCK) is None
    exploration.hold()
    assert exploration.taken(srds) is None, "calls after a warm-up are compared with each other"
    after = explored(dict.fromkeys(PLANS, 1.0))
    after.replace(exploration)
    assert after.held
    assert after.taken(sequential) == srds.short(), "in place of one whose waves did not fit into memory"


def test_calls_are_compared_with_the_stock_loop_or_with_ours_if_that_was_timed() -> None:
    exploration = explored(dict.fromkeys(PLANS, 1.0) | {OTHERS[0]: 0.5})
    assert exploration.baseline is None
    for _ in range(CALLS):
        one_call(exploration, took() | {STOCK: 0.9})
    assert exploration.baseline == ("stock", 0.9)
    for _ in range(10):
        one_call(exploration, took() | dict.fromkeys(OTHERS, 5.0) | {SEQUENTIAL: 2.0})
    assert exploration.baseline == ("sequential", 2.0), "the stock loop was not timed since the machine slowed down"
    without = explored(dict.fromkeys(PLANS, 1.0), stock=False)
    one_call(without, took())
    assert without.baseline == ("sequential", 1.0)
