"""What iteration 2 says of the sample that iteration 1 gives."""

from __future__ import annotations

import math

import pytest
from cores import feed, table
from hypothesis import given
from hypothesis import strategies as st
from problems import GaussianMixture, noise
from torch import Tensor

from srds_fast.solvers import program
from srds_fast.solvers.ahead import BOUNDARIES, SMALLEST, Ahead, watched
from srds_fast.solvers.contract import SolverInputs, Trajectory
from srds_fast.solvers.convergence import Monitor, Signs, estimated_error
from srds_fast.solvers.program import Boundary
from srds_fast.solvers.srds import srds


class EveryState(Trajectory):
    """All states at each position of the grid; at a boundary one of each iteration, from the coarse sweep on."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.arrived: dict[int, list[Tensor]] = {}

    def record(self, position: int, x: Tensor, samples: tuple[int, ...]) -> None:
        self.arrived.setdefault(position, []).append(x)


@given(st.integers(1, 60), st.data())
def test_what_tells_is_known_when_it_is_asked(num_steps: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, num_steps))
    iterations = data.draw(st.integers(0, num_blocks))
    pipelined = data.draw(st.booleans())
    in_flight = data.draw(st.sampled_from([None, 1, 2])) if pipelined else None
    waves = program.srds(num_steps, num_blocks, iterations, pipelined, in_flight=in_flight)
    waves = waves.limited_to(data.draw(st.sampled_from([None, 1, 3])))
    found = watched(waves)
    if iterations < 2 or not pipelined or in_flight == 1:
        assert found is None, "iteration 2 has not begun"
    if found is not None:
        done: list[Boundary] = []
        for wave in waves:
            done += wave.boundaries
            if Boundary(1, num_blocks) in wave.boundaries:
                break
        tell = [each for each in done if found.includes(each)]
        assert len(tell) == 2 * BOUNDARIES, "so many of each iteration"
        assert found.last == max(each.boundary for each in done if each.iteration == 2)
        assert found.blocks == num_blocks - found.last


def test_it_is_made_of_the_changes_at_the_last_boundaries_that_both_iterations_have_passed() -> None:
    waves = program.srds(100, 20, 3)
    tells, grid = watched(waves), table(100)
    assert tells is not None
    mixture, x = GaussianMixture.random(dimensions=8), noise(32, 8)
    kept = EveryState(100)
    core = srds(x, grid, waves, inputs=SolverInputs(trajectory=kept, scaled=True))
    _, _, checkpoints = feed(core, mixture, grid)
    found = next(each for each in checkpoints if each.iteration == 1)
    assert found.told is not None
    assert [each.told and each.told.ahead for each in checkpoints if each.iteration != 1] == [None] * 3

    def change(iteration: int, boundary: int) -> Tensor:
        of_iterations = kept.arrived[waves.bounds[boundary]]
        return (of_iterations[iteration] - of_iterations[iteration - 1]).abs().mean(1)

    known = range(tells.first, tells.last + 1)
    signs = found.signs()
    for sample, shown in enumerate(signs):
        assert shown.change == float(change(1, 20)[sample])
        now, following = ([float(change(number, each)[sample]) for each in known] for number in (1, 2))
        assert shown.ratio == pytest.approx(ahead(20 - known[-1]).ratio([*now, *following, shown.change]))
    assert any(math.isfinite(each.ratio) for each in signs)


@pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "in turn"])
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_each_iteration_tells_by_how_much_the_boundary_before_the_last_has_changed(
    num_blocks: int, pipelined: bool
) -> None:
    waves, grid = program.srds(12, num_blocks, num_blocks, pipelined), table(12)
    kept = EveryState(12)
    core = srds(noise(3, 8), grid, waves, inputs=SolverInputs(trajectory=kept, scaled=True))
    _, _, checkpoints = feed(core, GaussianMixture.random(dimensions=8), grid)
    arrived = kept.arrived.get(waves.bounds[-2], [])
    for each in checkpoints[1:]:
        iteration, moved = each.iteration, [0.0] * 3
        if iteration < num_blocks:  # later ones leave it as it is
            moved = (arrived[iteration] - arrived[iteration - 1]).abs().mean(1).tolist()
        assert [shown.boundary for shown in each.signs()] == moved
        assert [shown.change for shown in each.signs()] == each.change.tolist()


def ahead(blocks: int) -> Ahead:
    """Of changes in this order: of one iteration, of the next one, of the sample."""
    entries = tuple(range(2 * BOUNDARIES + 1))
    return Ahead(entries[:BOUNDARIES], entries[BOUNDARIES:-1], entries[-1], blocks)


def ratio_of(now: list[float], following: list[float], last: float, blocks: int = 1) -> float:
    """Of changes in hundredths."""
    return ahead(blocks).ratio([0.01 * each for each in (*now, *following, last)])


def test_ratios_that_stay_are_expected_to_stay() -> None:
    assert ratio_of([1.0] * 3, [0.2] * 3, 1.0) == pytest.approx(0.32), "with some caution"
    assert ratio_of([1.0] * 3, [1e-6] * 3, 1.0) == SMALLEST, "what is not seen is not zero"


def test_ratios_that_grow_are_expected_to_go_on() -> None:
    growing = ratio_of([1.0] * 3, [3e-3, 9e-3, 27e-3], 1.0, blocks=2)
    assert growing == pytest.approx(1.6 * 27e-3 * 3**5)
    assert growing > 1.0, "nothing is promised"
    assert math.isinf(ratio_of([1.0] * 3, [0.0, 0.0, 1e-9], 1.0))


def test_a_last_change_beyond_all_that_was_compared_says_less() -> None:
    assert ratio_of([1.0] * 3, [0.1] * 3, 3.0) == pytest.approx(0.16)
    assert ratio_of([0.5] * 3, [0.05] * 3, 3.0) == pytest.approx(0.16 * 2**4)
    assert math.isinf(ratio_of([4.0] * 3, [0.1] * 3, 4.1)), "it may be another mode"


@pytest.mark.parametrize(
    ("now", "following"),
    [([0.0] * 3, [0.0] * 3), ([0.0] * 3, [1.0] * 3), ([1.0] * 3, [0.0] * 3), ([1.0] * 3, [math.nan] * 3)],
)
def test_without_changes_nothing_is_said(now: list[float], following: list[float]) -> None:
    assert math.isinf(ratio_of(now, following, 1.0))


def test_a_sample_stops_after_its_first_change_if_the_next_iteration_promises_that() -> None:
    assert estimated_error([0.01], ratio=0.2) == pytest.approx(0.0025)
    assert estimated_error([0.01], ratio=math.inf) == estimated_error([0.01]), "else as without"
    assert estimated_error([1.0, 0.1], ratio=0.1) == estimated_error([1.0, 0.1]), "its own ratio is better"
    monitor = Monitor(2, tolerance=4e-3, bitwise=False)
    signs = [Signs(0.01, ratio=0.2), Signs(0.01, ratio=0.5)]
    assert monitor.judge(1, (0, 1), signs, exact=False, stationary=[False] * 2) == (1,)
