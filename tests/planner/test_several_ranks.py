"""The plan for several ranks, which share the rows of every wave: known answers, on costs in proportion to the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import srds_fast
from srds_fast.planner.choose import candidates, plan_of, plans_of, replicated
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.search import Known, Pricing, compare
from srds_fast.planner.settings import Settings
from srds_fast.solvers.srds import SRDS

IN_PROPORTION = CostCurve((1, 256), (1.0, 256.0))
CONTEXT = Context("devices", "2.0", "0.1", None, "steps")
# of srds alone
LOOSE, USUAL = Settings(coarse_solver="2m", tolerance=2e-2), Settings(coarse_solver="2m")


def pricing(ranks: int, gather: float = 0.0, units: int = 1, replicated: CostCurve | None = None) -> Pricing:
    """One unit of work takes a second. gather: seconds of each; units: guidance branches of a row."""
    curve = replace(IN_PROPORTION.shared(ranks, units, lambda _: gather, 128), replicated=replicated)
    return Pricing(Known(curve), lambda plan: 0.0, CONTEXT)


def fastest(steps: int, settings: Settings, *given: float, **more: Any) -> srds_fast.Plan:
    return compare(steps, settings, False, pricing(*given, **more))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "blocks"), [(50, 9), (100, 13)])
def test_several_ranks_take_a_plan_that_one_device_does_not_even_compare(steps: int, blocks: int) -> None:
    """One iteration: S steps of the last block after the B - 1 jumps before it. Sixteen ranks have a row each."""
    assert fastest(steps, LOOSE, 1).is_sequential
    waves = math.ceil(steps / blocks) + blocks - 1
    for ranks in (2, 4, 8, 16):
        plan = fastest(steps, LOOSE, ranks)
        assert (plan.num_blocks, plan.prediction.chosen.waves) == (blocks, waves)
        assert plan.prediction.chosen.seconds == pytest.approx(
            sum(math.ceil(rows / ranks) for rows in plan.widths(1)[:waves])
        )
    assert plan.prediction.chosen.seconds == pytest.approx(waves)
    assert blocks not in {each.num_blocks for each in candidates(steps, LOOSE, False)}
    assert blocks in {each.num_blocks for each in candidates(steps, LOOSE, False, ranks=2)}


@pytest.mark.parametrize("ranks", [2, 6, 16])
@pytest.mark.parametrize("units", [1, 2])
def test_no_number_of_blocks_is_much_faster_than_the_ones_compared(ranks: int, units: int) -> None:
    priced = pricing(ranks, units=units)
    every = [
        priced.expected_network(plan_of(SRDS(num_blocks=blocks, in_flight=held), 50, USUAL, False))
        for blocks in range(4, 26)
        for held in (1, 2, None)
    ]
    best = min(*every, 50 * math.ceil(units / ranks))
    assert fastest(50, USUAL, ranks, units=units).prediction.chosen.seconds <= 1.1 * best


def test_one_device_takes_what_it_took() -> None:
    for calibrated in (False, True):
        of_one = list(candidates(100, Settings(), False, calibrated=calibrated))
        assert list(candidates(100, Settings(), False, calibrated=calibrated, ranks=1)) == of_one
    assert {plan.num_blocks for plan in of_one if plan.method == "srds"} == {10, 14, 20, 28, 40}


def test_working_ahead_pays_where_ranks_would_be_idle() -> None:
    few, many = (fastest(100, USUAL, ranks) for ranks in (8, 64))
    assert few.options.in_flight == 2
    assert many.options.in_flight is None
    assert many.prediction.chosen.waves < few.prediction.chosen.waves
    assert many.program().peak_rows <= 64


def test_a_gather_counts_in_every_wave() -> None:
    """Both loops gather: fewer waves then win by as much as they are fewer."""
    cheap, dear = (fastest(100, LOOSE, 4, gather).prediction.chosen for gather in (0.0, 100.0))
    assert cheap.seconds == pytest.approx(51.0)
    assert dear.waves <= cheap.waves
    assert dear.seconds == pytest.approx(100.0 * dear.waves, rel=0.05)


def test_chords_have_a_core_for_each_rank() -> None:
    """They are compared where iterations are measured."""
    cores = [
        plan.options.num_cores
        for plan in candidates(50, Settings(), False, calibrated=True, ranks=12)
        if plan.method == "chords"
    ]
    assert cores == [4, 8, 6, 12]


def test_plans_of_a_prediction_are_found_again() -> None:
    plan = fastest(50, Settings(tolerance=2e-2), 4)
    found = plans_of(plan.prediction, 50, {"tolerance": 2e-2}, stochastic=False)
    assert found.keys() == set(plan.prediction.candidates)


FREE = CostCurve((1, 256), (1.0, 1.0))


@pytest.mark.parametrize("alone", [FREE, IN_PROPORTION], ids=["free rows", "rows in proportion"])
def test_ranks_are_never_predicted_slower_than_one_process(alone: CostCurve) -> None:
    """A gather takes a hundred times as long as a row: each rank evaluates all rows by itself."""
    of_one = compare(50, USUAL, False, Pricing(Known(alone), lambda plan: 0.0, CONTEXT))[0]
    dear = compare(50, USUAL, False, pricing(2, 100.0, replicated=alone))[0]
    assert dear.replicated
    assert replace(dear, replicated=False) == of_one
    assert dear.prediction.chosen.seconds == of_one.prediction.chosen.seconds
    assert dear.prediction.chosen.name == f"{of_one.short()}, replicated"
    assert "each rank evaluates all rows by itself" in dear.prediction.why
    assert {plan.replicated for plan in plans_of(dear.prediction, 50, {"coarse_solver": "2m"}, False).values()} == {
        True,
        False,
    }


def test_rows_are_shared_where_the_gather_is_cheap() -> None:
    assert not compare(50, USUAL, False, pricing(4, 0.0, replicated=IN_PROPORTION))[0].replicated


def test_a_replicated_plan_has_no_wave_that_one_rank_has_no_memory_for() -> None:
    def widest(most: int | None) -> int:
        plan = fastest(50, USUAL, 2, 100.0, replicated=replace(FREE, most_rows=most))
        assert plan.replicated
        return int(plan.program().peak_rows)

    assert widest(4) <= 4 < widest(None)


def test_windows_that_slide_are_not_replicated() -> None:
    settings = Settings(method="paradigms")
    assert {plan.method for plan in replicated(50, settings, False)} == {"sequential"}
    assert all(plan.replicated for plan in replicated(50, Settings(), False))


def test_a_replicated_plan_is_saved_as_one(tmp_path: Path) -> None:
    plan = compare(50, USUAL, False, pricing(2, 100.0, replicated=FREE))[0]
    plan.save(tmp_path / "plan.json")
    found = srds_fast.Plan.load(tmp_path / "plan.json")
    assert (found, found.prediction) == (plan, plan.prediction)
