"""The planner: measured costs, the search over plans, what is saved, and what a call does with it."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import waiting
from hypothesis import given
from hypothesis import strategies as st
from problems import GaussianMixture, noise, scheduler

import srds_fast
from srds_fast.engine import costs as pricing_module
from srds_fast.engine.costs import Costs, price
from srds_fast.engine.graphs import device_lock as device_lock_module
from srds_fast.engine.graphs.device_lock import device_lock, replaying
from srds_fast.planner.calibration import needed
from srds_fast.planner.choose import candidates, choose, until
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.experience import MOST_RUNS, Experience
from srds_fast.planner.search import Known, Pricing, compare, explored
from srds_fast.planner.settings import Settings
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import SolverInputs
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.srds import SRDS

HERE = Context("a device", "2.0", "0.1", None, "steps")
FREE = CostCurve((1, 1000), (1e-3, 1e-3))
LINEAR = CostCurve((1, 32), (1e-3, 32e-3))
MIXTURE = GaussianMixture.random()


def pricing(curve: CostCurve, overhead: Callable[[srds_fast.Plan], float] = lambda plan: 0.0) -> Pricing:
    return Pricing(Known(curve), overhead, HERE)


def fastest(*given: Any, **more: Any) -> srds_fast.Plan:
    plan, compared = compare(*given, **more)
    assert plan in compared
    return plan


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25, 100, 400])
@pytest.mark.parametrize("curve", [FREE, LINEAR], ids=["free rows", "linear"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_choice_is_never_predicted_slower_than_sequential(steps: int, curve: CostCurve, stochastic: bool) -> None:
    priced = pricing(curve)
    plan = fastest(steps, Settings(), stochastic, priced)
    by_name = {each.name: each for each in plan.prediction.candidates}
    assert plan.prediction.chosen.seconds <= by_name["sequential"].seconds == pytest.approx(steps * 1e-3)
    assert plan.prediction.chosen.name == plan.short()
    assert list(by_name.values()) == sorted(by_name.values(), key=lambda each: each.seconds)
    chosen, spent = plan.prediction.chosen, plan.program().spent(plan.prediction.chosen.iterations)
    assert (spent.waves, spent.rows, spent.peak_rows) == (chosen.waves, chosen.rows, chosen.peak_rows)


def test_rows_for_nothing_give_the_fewest_waves_and_costly_rows_fewer_rows_or_the_sequential_sampler() -> None:
    free, costly = (fastest(50, Settings(), False, pricing(curve)) for curve in (FREE, LINEAR))
    assert free.prediction.chosen.waves == min(each.waves for each in free.prediction.candidates) < 50 / 4
    assert costly.method == "sequential"
    assert "every other plan would spend over 1.5 times as long" in costly.prediction.why
    dear, settings = CostCurve((1, 8, 32), (1e-3, 2.4e-3, 8e-3)), Settings(max_iterations=3)
    held, ahead = (fastest(50, settings, False, pricing(curve)).options.in_flight for curve in (dear, FREE))
    assert held == 2
    assert ahead is None, "iterations are held back only where rows cost something"


@pytest.mark.parametrize(("share", "method"), [(20.0, "sequential"), (0.97, "sequential"), (0.9, "srds")])
def test_a_plan_must_be_clearly_faster_with_its_overhead(share: float, method: str) -> None:
    """share: of the sequential sampler's time that the network and the overhead of SRDS take."""
    # srds and the sequential sampler alone, all runs of as many iterations
    settings, free = Settings(num_blocks=8, max_iterations=1), pricing(FREE)

    def overhead(plan: srds_fast.Plan) -> float:
        return 0.0 if plan.method == "sequential" else share * 50e-3 - free.expected_network(plan)

    assert fastest(50, settings, False, pricing(FREE, overhead)).method == method


def test_settings_narrow_the_search() -> None:
    def methods(**settings: Any) -> set[str]:
        return {plan.method for plan in candidates(50, Settings(**settings), stochastic=False)}

    assert methods() == {"sequential", "srds", "collocation", "parataa"}
    for asked in ({"num_blocks": 7}, {"coarse_solver": "ddim"}, {"max_iterations": 2}, {"exact": True}):
        assert methods(**asked) == {"sequential", "srds"}
    assert methods(method="parataa") == {"sequential", "parataa"}
    with pytest.raises(srds_fast.InvalidArgument, match="max_iterations"):
        methods(method="paradigms", max_iterations=3)
    assert {plan.method for plan in candidates(50, Settings(), stochastic=True)} == methods()


def test_iterations_are_held_back_only_where_asked_for_or_useful() -> None:
    def in_flight(*, calibrated: bool = False, **settings: Any) -> set[int | None]:
        plans = candidates(50, Settings(**settings), stochastic=False, calibrated=calibrated)
        return {plan.options.in_flight for plan in plans if isinstance(plan.options, SRDS)}

    assert in_flight(in_flight=2) == {2}
    assert in_flight() > {None}
    for settings in ({"exact": True}, {"tolerance": 0.0}, {"pipelined": False}):
        assert in_flight(**settings) == {None}
    assert in_flight(calibrated=True) == {None}, "iterations that are known to be needed are not held back"


@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n))), st.data())
def test_a_program_cut_short_has_the_same_waves_until_then(shape: tuple[int, int], data: st.DataObject) -> None:
    steps, blocks = shape
    in_flight = data.draw(st.sampled_from([None, 1, 2, 3]))
    pipelined, max_rows = in_flight is not None or data.draw(st.booleans()), data.draw(st.sampled_from([None, 3]))
    method = SRDS(num_blocks=blocks, in_flight=in_flight, pipelined=pipelined)
    plan = choose(steps, Settings(method=method, max_rows=max_rows))
    iteration = data.draw(st.integers(1, plan.max_iterations))
    short = until(plan, iteration).program()
    assert short.widths(iteration) == plan.program().widths(iteration)
    assert short.num_rows <= plan.program().num_rows


@pytest.mark.parametrize("solver", ["2m", "ddim"])
def test_runs_with_some_blocks_tell_of_runs_with_others(solver: str) -> None:
    """Nothing but runs of 10 blocks is seen: what is expected of others is held against what they take."""
    experience = Experience()

    def run(blocks: int, seed: int) -> tuple[srds_fast.Plan, srds_fast.Report]:
        plan = choose(48, Settings(method=SRDS(num_blocks=blocks, coarse_solver=solver), engine="eager"))
        return plan, srds_fast.sample(MIXTURE, noise(2, 64, seed=seed), scheduler(), 48, plan=plan).report

    for seed in range(MOST_RUNS):
        experience.record(*run(10, seed), stochastic=False)
    for blocks in (6, 10, 14, 20, 24):
        plans, reports = zip(*(run(blocks, 100 + seed) for seed in range(8)), strict=True)
        expected = sum(share * iteration for iteration, share in experience.iterations(plans[0], stochastic=False))
        assert abs(expected - sum(report.iterations for report in reports) / 8) < 1.0, f"{blocks} blocks"


def test_what_did_not_settle_is_expected_to_again() -> None:
    experience, plan = Experience(), choose(50, Settings(method="srds"))
    for _ in range(20):
        experience.record(plan, None, stochastic=False)
    shares = dict(experience.iterations(plan, stochastic=False))
    assert shares[plan.max_iterations] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    other_steps = dict(experience.iterations(choose(40, Settings(method="srds")), stochastic=False))
    assert max(other_steps) < 10


@pytest.mark.parametrize("tolerance", [4e-2, 4e-3, 4e-4, 0.0])
def test_a_tighter_tolerance_is_expected_to_take_no_fewer_iterations(tolerance: float) -> None:
    priced = pricing(FREE)
    for plan in candidates(50, Settings(tolerance=tolerance), stochastic=False):
        tighter = dataclasses.replace(plan, tolerance=tolerance / 10)
        assert 0 <= priced.expected(plan) <= priced.expected(tighter) <= plan.max_iterations


def test_the_iterations_needed_are_those_after_which_all_stay_within_the_tolerance() -> None:
    reference, one_off = torch.zeros(4, 3), torch.zeros(4, 3)
    one_off[0] = 1.0
    outputs = [(number, torch.full((4, 3), error)) for number, error in enumerate((0.5, 0.05, 0.2, 0.05, 0.01), 1)]
    assert [needed(outputs, reference, tolerance, 1.0) for tolerance in (0.1, 0.3, 0.001)] == [4, 2, None]
    assert [needed([(1, one_off)], reference, 0.1, quantile) for quantile in (0.75, 0.95)] == [1, None]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Context)])
def test_a_plan_made_elsewhere_names_what_differs(field: str) -> None:
    here = dataclasses.replace(HERE, network="a network", call="a call")
    here.check(here)
    with pytest.raises(srds_fast.PlanMismatch, match=f"another {'guidance' if field == 'call' else field}"):
        dataclasses.replace(here, **{field: "else"}).check(here)
    dataclasses.replace(here, network=None).check(here)


class Network:
    """Counts its calls and the rows of the widest; more than 8 rows raise an error from call `after` on."""

    def __init__(self, error: Exception | None = None, after: int = 0) -> None:
        self.error, self.after = error, after
        self.calls = self.widest = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls, self.widest = self.calls + 1, max(self.widest, len(x))
        if self.error is not None and len(x) > 8 and self.calls > self.after:
            raise self.error
        return MIXTURE(x, t)


def auto(network: Any, steps: int = 50, **settings: Any) -> srds_fast.Report:
    return srds_fast.sample(
        network, noise(1, 64), scheduler(), steps, method="auto", **{"explore": 0, **settings}
    ).report


def test_a_network_is_measured_once_and_not_kept_alive() -> None:
    network = Network()
    first = auto(network)
    assert network.calls > first.waves
    network.calls = 0
    second = auto(network)
    assert network.calls == second.waves, "costs are known by then"
    assert first.network_seconds is not None
    assert first.plan_reason in str(first)
    assert None not in (first.predicted_seconds, second.predicted_seconds)
    alive = weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None


def test_no_call_is_wider_than_allowed_or_than_the_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing_module, "BUDGET", math.inf)
    network = Network()
    auto(network, 20, max_rows=3)
    assert 1 < network.widest <= 3
    report = auto(Network(RuntimeError("too wide")))
    assert report.peak_rows <= 8
    assert "more than 8 rows failed" in report.plan_reason


def test_costs_go_by_code_and_networks_not_by_what_is_closed_over() -> None:
    calls = 0

    def denoiser_of(shift: torch.Tensor) -> Any:
        def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return MIXTURE(x, t) + 0 * shift

        return denoiser

    for first in (True, False, False):
        calls = 0
        report = auto(denoiser_of(torch.zeros(64)), 20)
        assert first or calls == report.waves


def test_a_wave_that_did_not_fit_bounds_the_plans_to_come() -> None:
    """And what did not fit has not diverged: its method is still compared."""
    priced = pricing(FREE)
    assert explored(100, Settings(), False, priced).plan.program().peak_rows > 8
    priced.known.experience.record_oom(9)
    narrow = explored(100, Settings(), False, priced).plan
    assert narrow.program().peak_rows <= 8
    assert narrow.method != "sequential"
    # other work has taken the memory since it was measured
    network = Network(torch.OutOfMemoryError("CUDA out of memory."), after=200)
    fallbacks = [auto(network, 60).fallback_reason is not None]
    network.calls = max(network.calls, 201)
    fallbacks += [auto(network, 60).fallback_reason is not None for _ in range(7)]
    assert sum(fallbacks) <= 3  # each bounds the width anew
    assert not fallbacks[-1]


def test_where_a_chosen_method_does_not_settle_the_steps_are_taken_one_by_one() -> None:
    """c_i = 1 on a steep problem: Picard iteration blows up before the exact prefix has come far."""

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -30 * x

    x = noise(2, 8)
    expected = srds_fast.sample(denoiser, x, scheduler(), 60, method="sequential")
    picard = Settings(method=ParaTAA(data_std=None, history=0), tolerance=1e-9)
    plan = choose(60, picard)
    with pytest.raises(srds_fast.DivergenceError):
        srds_fast.sample(denoiser, x, scheduler(), 60, plan=plan, strict=True)
    found = srds_fast.sample(denoiser, x, scheduler(), 60, plan=plan)
    report = found.report
    assert "one after another" in report.fallback_reason
    assert report.waves > 60
    assert (report.method, report.engine, report.options) == ("sequential", "eager", None)  # what gave the sample
    assert report.predicted_seconds is report.plan_reason is report.overhead is None
    torch.testing.assert_close(found.sample, expected.sample, rtol=0, atol=0)


def _priced(costs: Costs) -> Pricing:
    x, stock = noise(1, 64), scheduler()
    stock.set_timesteps(20)
    program: Any = None
    return price(costs, "a kind", program, x, noise_table(stock), SolverInputs(), x.dtype, replayed=True)


def test_nothing_is_replayed_to_be_timed_while_another_call_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a device share their memory: it would overwrite them. What is timed otherwise is known apart."""
    ways: list[bool] = []

    def measure(*given: Any, replayed: bool) -> CostCurve:
        ways.append(replayed)
        return dataclasses.replace(FREE, how="replayed" if replayed else "eager")

    monkeypatch.setattr(pricing_module, "measure", measure)
    monkeypatch.setattr(device_lock_module, "LONGEST_WAIT", 0.01)
    costs, device = Costs(), torch.device("cpu")
    with replaying(device):
        assert _priced(costs).known.curve.how == "eager"  # in the middle of this thread's own
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with device_lock(device):
            begun.set()
            waiting.until(done.wait)

    other = threading.Thread(target=hold)
    other.start()
    assert waiting.until(begun.wait)
    assert _priced(costs).known.curve.how == "eager"
    done.set()
    other.join()
    assert _priced(costs).known.curve.how == "replayed"
    assert _priced(costs).known.curve.how == "replayed"
    assert ways == [False, True]


@pytest.mark.parametrize(("slower", "stays"), [(1.03, True), (1.2, False)])
def test_a_plan_is_left_only_for_one_that_is_clearly_faster(slower: float, stays: bool) -> None:
    settings, free = Settings(num_blocks=20, max_iterations=2), pricing(FREE)  # all runs take two iterations
    plans = [plan for plan in candidates(100, settings, False) if plan.method == "srds" and plan.num_blocks == 20]
    before, other = plans[:2]
    by_options = {before.options: slower, other.options: 1.0}
    seconds = {each.options: free.expected_network(each) for each in plans}

    def overhead(plan: srds_fast.Plan) -> float:
        share = by_options.get(plan.options)
        return 1.0 if share is None else 0.05 * share - seconds[plan.options]

    priced = pricing(FREE, overhead)
    assert fastest(100, settings, False, priced).signature == other.signature
    found = fastest(100, settings, False, priced, before=before)
    assert found.signature == (before if stays else other).signature
    assert found.prediction.chosen.name == found.short()


def test_what_takes_longer_than_expected_is_weighed_anew() -> None:
    settings, priced = Settings(), pricing(FREE)
    plan = explored(100, settings, False, priced).plan
    assert plan.method != "sequential"
    report = srds_fast.Report(plan.method, "eager", "sample", 100, iterations_per_sample=[60])
    for _ in range(4):
        priced.record(plan, report)
    other = explored(100, settings, False, priced).plan
    assert other.signature != plan.signature
    for _ in range(4):
        priced.record(other, None)
    assert explored(100, settings, False, priced).plan.signature not in (plan.signature, other.signature)
    as_expected = explored(50, settings, False, priced).plan
    expected_run = dataclasses.replace(report, iterations_per_sample=[priced.expected(as_expected)])
    priced.record(as_expected, expected_run)
    assert explored(50, settings, False, priced).plan.signature == as_expected.signature
