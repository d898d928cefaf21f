"""Stops judged from recordings are the product's; what is told of them follows from what was recorded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.quality import stops
from bench.quality.recordings import Cost, Recording, Sample, Stop, recorded
from bench.workloads import demonstrations, untuned
from bench.workloads.problems import difference, mixture
from srds_fast.solvers.convergence import BLOCKS, Signs

STEPS = 12


@pytest.mark.parametrize("method", stops.METHODS)
def test_a_recording_is_stopped_where_the_product_stops(method: str) -> None:
    problem, plan = mixture(5), stops.plan_of(method, STEPS)
    reference = problem.sequential(STEPS)
    found = recorded(problem, method, plan, reference)
    stopped = found.stops(plan.tolerance, plan.options.contraction)
    for sample, stop in enumerate(stopped):
        alone = problem.one(sample).sampled(STEPS, plan=plan)
        assert (stop.waves, stop.rows, stop.told) == (alone.report.waves, alone.report.rows, alone.report.converged[0])
        assert stop.error == pytest.approx(float(difference(alone.sample, reference[sample, None])), rel=1e-3, abs=1e-6)
    # a looser tolerance is judged from the same recording
    if not plan.slides:
        loose = found.stops(10 * plan.tolerance, plan.options.contraction)
        assert all(early.waves <= stop.waves for early, stop in zip(loose, stopped, strict=True))


def recording(*errors: list[float], changes: list[float | None] | None = None) -> Recording:
    """Iterations 0, 1, .. of 3, 4, .. waves if one is stopped there, and of a wave less if it is planned."""
    most = max(len(each) for each in errors)
    costs = [Cost(3 + number, 30 + number) for number in range(most)]
    shown = [each and Signs(each) for each in (None, *(changes or [1.0] * most))]
    samples = [Sample(shown[: len(each)], each) for each in errors]
    planned = [Cost(waves - 1, rows - 10) for waves, rows in costs]
    return Recording("a problem", 20, "srds", list(range(most)), [False] * most, costs, planned, samples)


def test_fixed_and_oracle_ask_that_samples_stay_within() -> None:
    found = recording([0.4, 0.6, 0.3, 0.2], [0.9, 0.4, 0.1])
    assert found.fixed() == Cost(4, 22)
    assert found.oracle() == Cost((4 + 3) / 2, (22 + 21) / 2)
    never = recording([0.9, 0.8])
    assert never.fixed() is None
    assert never.oracle() == Cost(20, 20), "as many as the sequential sampler"


def test_one_that_diverges_takes_the_sequential_steps_then() -> None:
    for far in (2000.0, math.nan):
        found = recording([9.0, 8.0, math.inf, 0.0], changes=[1.0, far, 1e-9])
        assert found.stops(4e-3, BLOCKS) == [Stop(5 + 20, 32 + 20, 0.0)]


def test_what_was_recorded_is_read_and_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, networks = tmp_path / "stops.json", tmp_path / "networks"
    problems = ["digits-guided", "narrow-mixture", "patches", "policy", "other-policy"]
    some = ["--smoke", "--networks", str(networks)]
    stops.main([*some, "--problems", *problems, "--json", str(path)])
    printed = capsys.readouterr()
    assert {each.stem for each in networks.iterdir()} == set(stops.TRAINED)
    table = [line.split() for line in printed.out.splitlines()]
    assert sum(line[-3:-2] == ["2"] for line in table) == len(problems) * len(stops.METHODS)
    stops.main(["--from", str(path)])
    # above the table of the first run training tells its loss
    table_alone = capsys.readouterr().out
    assert "collocation" in table_alone
    assert printed.out.endswith(table_alone)
    # networks that are there are not trained again
    stops.main([*some, "--problems", "patches", "other-policy", "--methods", "srds"])
    again = capsys.readouterr()
    assert "trains" in printed.err
    assert "trains" not in again.err
    assert all(line in table for line in (line.split() for line in again.out.splitlines()) if "patches" in line)


def test_more_steps_than_a_network_was_trained_for_are_left_out() -> None:
    networks = stops.Networks(None, steps=1)
    found = stops.recordings(["policy"], [8, 101], ["srds"], 2, 2, networks)
    assert [each.steps for each in found] == [8]


def test_what_the_other_networks_learn_is_other_data() -> None:
    torch.manual_seed(0)
    which = torch.tensor([0, 1] * 20)
    parts = untuned.patches(untuned.photographs(), which)
    assert parts.shape == (40, 3, 16, 16)
    assert float(parts.abs().max()) <= 1
    temple, flower = parts[::2].mean((0, 2, 3)), parts[1::2].mean((0, 2, 3))
    assert float((temple - flower).abs().max()) > 0.2
    generator = torch.Generator().manual_seed(0)
    seen = demonstrations.observations(200, generator)
    ways = untuned.other_demonstrations(seen, generator)
    assert ways.shape == (200, demonstrations.ACTIONS, demonstrations.HORIZON)
    # it begins at rest and ends near the goal
    goal = seen[:, : demonstrations.ACTIONS]
    assert float(ways[:, :, 0].abs().mean()) < 0.1
    assert float((ways[:, :, -1] - goal).abs().mean()) < 0.3
    assert float(ways.abs().max()) <= 1.1
