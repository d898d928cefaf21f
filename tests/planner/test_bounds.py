"""What a plan takes is known before its program is made: rows, widths of waves, and the memory that is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import scheduler
from promises import same_law

import srds_fast
from srds_fast import InvalidArgument
from srds_fast.planner import search
from srds_fast.planner.choose import candidates, choose, until
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.plan import MOST_ROWS
from srds_fast.planner.search import Known, Pricing, compare
from srds_fast.planner.settings import MOST_STEPS, Settings
from srds_fast.solvers import program
from srds_fast.solvers.registry import BY_NAME


@given(
    st.sampled_from(list(BY_NAME)),
    st.integers(1, 40),
    st.booleans(),
    st.none() | st.integers(1, 9),
    st.data(),
)
def test_rows_and_widths_are_those_of_the_program(
    method: str, steps: int, exact: bool, max_rows: int | None, data: st.DataObject
) -> None:
    plan = choose(steps, Settings(method=method, exact=exact and not same_law(method), max_rows=max_rows))
    made = plan.program()
    assert made.num_rows <= plan.rows
    if not plan.slides:
        first = 1 if plan.is_sequential else plan.options.first_iteration
        iteration = data.draw(st.integers(first, plan.max_iterations))
        assert until(plan, iteration).widths(iteration) == until(plan, iteration).program().widths(iteration)


@given(st.integers(1, 40), st.data())
def test_widths_of_srds(steps: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, steps))
    iterations = data.draw(st.integers(0, blocks))
    pipelined = data.draw(st.booleans())
    in_flight = data.draw(st.none() | st.integers(1, 3)) if pipelined else None
    made = program.srds(steps, blocks, iterations, pipelined, in_flight=in_flight)
    assert made.num_rows <= program.srds_rows(steps, blocks, iterations)
    for iteration in range(iterations + 1):
        found = program.srds_widths(steps, blocks, iterations, pipelined, in_flight, iteration)
        assert found == made.widths(iteration)


def test_a_program_that_takes_too_much_memory_is_refused_before_it_is_made() -> None:
    """Fifty million rows, and 47 GiB."""
    sampler = scheduler(num_train_timesteps=MOST_STEPS)
    with pytest.raises(InvalidArgument, match=r"50,005,000 rows for 10,000 steps.*47\.7 GiB.*The most is 2\.0 GiB"):
        srds_fast.sample(lambda x, t: x, torch.ones(1, 2), sampler, MOST_STEPS, method="parataa", exact=True)


def test_auto_does_not_consider_such_programs() -> None:
    plans = list(candidates(MOST_STEPS, Settings(), False, calibrated=True))
    assert len(plans) > 5
    assert all(plan.rows <= MOST_ROWS for plan in plans)


@pytest.mark.parametrize(("seconds", "considered"), [(1e-6, False), (1.0, True)], ids=["free", "slow"])
def test_plans_whose_programs_take_longer_than_calls_are_not_looked_at(
    seconds: float, considered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of srds with ten thousand steps has a million rows, each with an update of its own."""
    monkeypatch.setattr(search.clock, "now", lambda: 0.0)
    known = Known(CostCurve((1, 10_000), (seconds, 1.01 * seconds)))
    pricing = Pricing(known, lambda plan: 0.0, Context("a device", "2.0", "0.1", None, "steps"))
    _, looked_at = compare(MOST_STEPS, Settings(), False, pricing)
    assert ("srds" in {plan.method for plan in looked_at}) == considered
