"""Which requests share a call: known answers for known costs, and properties."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.planner.cost_curve import CostCurve
from srds_fast.serving.batching import (
    PARALLEL,
    SEQUENTIAL,
    Call,
    CallCosts,
    Policy,
    Waiting,
    answered,
    batches,
    call_of,
    groupings,
    next_calls,
    sizes_that_pay,
    soonest,
)

STEPS = 50
# a plan of 10 waves and 100 rows for one image
WIDTHS = (10,) * 10
SIZES = (1, 2, 4, 8)
ROWS = tuple(range(1, 1025))


def costs(seconds: object) -> CallCosts:
    """Costs of calls whose network call of r rows takes seconds(r)."""
    return CallCosts(CostCurve(ROWS, tuple(map(seconds, ROWS))), WIDTHS, STEPS)  # type: ignore[call-overload]


FREE = costs(lambda rows: 1.0)
# the plan is then to take one step after another
IN_FULL = CallCosts(CostCurve(ROWS, tuple(map(float, ROWS))), (1,) * STEPS, STEPS)
# a device that takes 32 rows as fast as one
UP_TO_32 = costs(lambda rows: max(1.0, rows / 32))


def described(calls: list[Call]) -> list[tuple[str, int]]:
    return [(call.way, call.images) for call in calls]


def test_a_call_costs_what_its_waves_cost() -> None:
    assert UP_TO_32.seconds(PARALLEL, 1) == 10
    assert UP_TO_32.seconds(PARALLEL, 8) == pytest.approx(10 * 80 / 32)
    assert UP_TO_32.seconds(SEQUENTIAL, 8) == 50
    with_decoding = CallCosts(UP_TO_32.curve, WIDTHS, STEPS, image_seconds=2.0)
    assert with_decoding.seconds(SEQUENTIAL, 8) == 66


def test_what_was_timed_goes_before_what_is_predicted() -> None:
    timed = CallCosts(FREE.curve, WIDTHS, STEPS, measured=((SEQUENTIAL, 4, 7.0),))
    assert timed.seconds(SEQUENTIAL, 4) == 7
    assert timed.seconds(SEQUENTIAL, 2) == 50


def test_where_rows_are_free_all_that_wait_share_a_parallel_call() -> None:
    found = next_calls(FREE.seconds, Policy(sizes=SIZES), 9)
    assert described(found) == [(PARALLEL, size) for size in (1, 2, 2, 4, 4, 4, 4, 8, 8)]


def test_where_rows_cost_in_full_no_request_waits_for_another_one_in_its_call() -> None:
    assert described(next_calls(IN_FULL.seconds, Policy(sizes=SIZES), 8)) == [(PARALLEL, 1)] * 8


def test_between_them_a_long_queue_shares_calls_that_take_one_step_after_another() -> None:
    found = described(next_calls(UP_TO_32.seconds, Policy(sizes=(1, 2, 4, 8, 16, 32)), 40))
    # a parallel call takes 10 seconds for up to three images; 32 together take 50 seconds, one step after another
    assert found[0] == (PARALLEL, 1)
    assert found[-1] == (SEQUENTIAL, 32)


def test_with_batching_never_each_has_a_call_by_the_plan() -> None:
    assert described(next_calls(FREE.seconds, Policy.of("never", SIZES), 8)) == [(PARALLEL, 1)] * 8


def test_with_batching_sequential_no_call_is_parallel() -> None:
    found = next_calls(FREE.seconds, Policy.of("sequential", SIZES), 8)
    assert {call.way for call in found} == {SEQUENTIAL}
    assert found[-1].images == 8


def test_sizes_are_prepared_where_they_make_more_images_a_second() -> None:
    policy = Policy(sizes=SIZES)
    assert sizes_that_pay(FREE, policy) == SIZES
    assert sizes_that_pay(IN_FULL, policy) == (1,)
    assert sizes_that_pay(FREE, Policy.of("never", SIZES)) == (1,)
    # a parallel call takes 10 seconds for up to three images, and the device is full then
    assert sizes_that_pay(UP_TO_32, policy) == (1, 2, 4)
    hardly = replace(IN_FULL, curve=CostCurve(ROWS, tuple(0.95 * rows + 0.05 for rows in ROWS)))
    assert sizes_that_pay(hardly, policy) == (1,), "a twentieth more is not worth a warm-up"


def test_batches_are_of_prepared_sizes() -> None:
    assert batches(7, (1, 2, 4)) == [4, 2, 1]
    assert batches(9, (1, 4)) == [4, 4, 1]
    assert batches(3, (1,)) == [1, 1, 1]


def test_devices_take_calls_in_order() -> None:
    one, two, three = (Call((Waiting(number, "k", "k"),), PARALLEL) for number in range(3))
    assert answered([one, two, three], [0.0, 3.0], lambda *_: 2.0) == {0: 2.0, 1: 4.0, 2: 5.0}


def of_32_rows(_: object, way: str, images: int) -> float:
    return UP_TO_32.seconds(way, images)


requests = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(1, 3)), min_size=1, max_size=12)


@given(requests, st.sampled_from([(1,), (1, 2), (1, 2, 4, 8), (1, 3)]))
def test_groupings_keep_every_request_once_and_in_order(
    asked: list[tuple[str | None, int]], sizes: tuple[int, ...]
) -> None:
    waiting = [Waiting(number, kind, kind or "s", images) for number, (kind, images) in enumerate(asked)]
    for calls in groupings(waiting, of_32_rows, Policy(sizes=sizes)):
        members = [each for call in calls for each in call.members]
        assert sorted(each.number for each in members) == list(range(len(waiting)))
        firsts = [call.members[0].number for call in calls]
        assert firsts == sorted(firsts), "the first that waits is in the next call"
        for kind in ("a", "b"):
            of_kind = [each.number for each in members if each.kind == kind]
            assert of_kind == sorted(of_kind), "nobody overtakes another of its kind"
        for call in calls:
            assert len(call.members) == 1 or call.images in sizes
            assert len({each.kind for each in call.members}) == 1
            assert len(call.members) == 1 or call.members[0].kind is not None


def compositions(total: int) -> list[list[int]]:
    """All ways to write a number as a sum, in order."""
    return [
        [len(list(part)) for _, part in itertools.groupby(itertools.accumulate(cut, initial=0))]
        for cut in itertools.product((0, 1), repeat=total - 1)
    ]


@given(st.integers(1, 64), st.floats(0.0, 2.0), st.integers(1, 7))
def test_no_order_of_calls_is_much_better_for_those_that_wait(knee: int, slope: float, queue: int) -> None:
    """Against all ways to share out a queue over calls of any sizes: calls of one size are enough."""
    found = costs(lambda rows: 1.0 + slope * max(0, rows - knee) / knee)
    policy = Policy(sizes=tuple(range(1, queue + 1)))

    def seconds(_: object, way: str, images: int) -> float:
        return found.seconds(way, images)

    waiting = [Waiting(number, "k", "k") for number in range(queue)]
    chosen = soonest(list(groupings(waiting, seconds, policy)), [0.0], seconds, set())
    assert chosen is not None
    total = sum(answered(chosen, [0.0], seconds).values())
    best = float("inf")
    for sizes in compositions(queue):
        left, calls = iter(waiting), []
        for size in sizes:
            calls.append(call_of([next(left) for _ in range(size)], seconds, policy))
        best = min(best, sum(answered(calls, [0.0], seconds).values()))
    one_by_one = sum(answered([call_of([each], seconds, policy) for each in waiting], [0.0], seconds).values())
    assert total <= one_by_one
    assert total <= 1.15 * best
