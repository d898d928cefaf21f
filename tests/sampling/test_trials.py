"""Calls that time other plans: on a clock that network calls advance, so that nothing depends on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import fields

import pytest
import torch
from problems import GaussianMixture, noise, scheduler, sequential_by_scheduler
from torch import Tensor

import srds_fast
from srds_fast import Report
from srds_fast.planner.predictions import turns_to_time
from srds_fast.sampling.trials import TurnClock
from srds_fast.solvers.registry import BY_NAME, Method

Seconds = Callable[[int, int, bool], float]
MIXTURE = GaussianMixture.random()
N = 40


class TimedNetwork:
    """A network whose calls advance the clock: `seconds(call, rows, stock)`, by default 1 for any number of rows."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int, bool], float] | None = None
    ) -> None:
        self.now, self.calls, self._seconds = 0.0, 0, seconds or (lambda call, rows, stock: 1.0)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        stock = t.stride() == (0,)  # the stock loop expands the timestep
        self.now += self._seconds(self.calls, len(x), stock)
        return MIXTURE(x, t)

    def call(self, seed: int = 0, steps: int = N, **settings: object) -> tuple[Report, float]:
        """The report of a call with method="auto", whose sample is checked, and its seconds."""
        x, begun = noise(1, 64, seed=seed), self.now
        found = srds_fast.sample(self, x, scheduler(), steps, method="auto", **settings)  # type: ignore[arg-type]
        took = self.now - begun
        expected = sequential_by_scheduler(MIXTURE, x, steps)
        assert float((found.sample - expected).abs().mean()) < 0.05
        return found.report, took


def test_rows_for_nothing_are_explored_within_the_budget_then_the_fastest_plan_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "srds_fast")
    network = TimedNetwork(monkeypatch)
    first = [network.call(seed) for seed in range(3)]
    assert first[0][0].plan_state == "exploring"
    assert sum(took for _, took in first) <= 4 * 3 * N
    assert sum(report.exploring_seconds for report, _ in first) <= 3 * N * (1 + 1e-5)
    assert caplog.text.count("The first 3 calls of this kind") == 1
    assert caplog.text.count("Plan chosen for calls of") >= 1, "by predictions"
    told = [each.getMessage() for each in caplog.records if " for calls of " in each.getMessage()]
    assert [", frozen: " in each for each in told] == [False] * (len(told) - 1) + [True], "for good in the end"
    for seed in range(3, 10):
        report, took = network.call(seed)
        assert report.plan_state == "frozen"
        assert took == report.seconds == report.waves < N / 2
        assert "times faster than the sequential loop" in report.plan_reason
        assert "frozen" in str(report)


def test_where_rows_cost_in_full_no_call_after_the_third_is_slower_than_the_stock_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = TimedNetwork(monkeypatch, lambda call, rows, stock: float(rows))
    assert sum(network.call(seed)[1] for seed in range(3)) <= 4 * 3 * N
    for seed in range(3, 8):
        report, took = network.call(seed)
        assert (report.plan_state, took) == ("frozen", N)


def test_costs_measured_at_a_good_moment_cost_one_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are free while they are measured; in the run a wave takes longer than all steps."""
    measured = TimedNetwork(monkeypatch)
    measured.call(explore=0)
    waves = measured.calls
    probing = TimedNetwork(monkeypatch)
    report, _ = probing.call(explore=0)
    measuring = waves - report.waves
    network = TimedNetwork(monkeypatch, lambda call, rows, stock: 1.0 if call <= measuring or rows == 1 else 2.0 * N)
    report, took = network.call()
    assert "was stopped" in report.fallback_reason
    assert report.method == "sequential"
    assert report.waves == 1 + N, "the wave that came too late to begin is not counted"
    assert report.seconds <= (1 + 2 + 2) * N, "what came before the first wide wave, that wave, and the steps"
    for seed in range(1, 6):
        report, took = network.call(seed)
        assert report.fallback_reason is None
    # the two loops take the same time here, and ours copies a scheduler less
    assert (report.plan_state, report.method, took) == ("frozen", "sequential", N)


def test_the_stock_loop_is_taken_where_it_is_faster_than_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    network = TimedNetwork(monkeypatch, lambda call, rows, stock: 0.5 if stock else float(rows))
    for seed in range(5):
        report, took = network.call(seed)
    assert (report.method, report.plan_state, took) == ("stock", "frozen", N / 2)
    assert report.fallback_reason is None
    seen: list[int] = []
    report, took = network.call(observer=lambda checkpoint: seen.append(checkpoint.iteration))
    assert (report.method, took) == ("sequential", N), "the stock loop has no checkpoints"
    assert seen


def test_an_observer_sees_the_run_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = TimedNetwork(monkeypatch)
    seen: list[int] = []
    report, _ = network.call(observer=lambda checkpoint: seen.append(checkpoint.iteration))
    assert report.exploring_seconds > 0
    assert seen == list(range(seen[0], report.iterations + 1))


def test_a_plan_that_fails_when_it_is_timed_fails_no_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: set[int] = set()

    def seconds(call: int, rows: int, stock: bool) -> float:
        seen.add(rows)
        return 1.0

    network = TimedNetwork(monkeypatch, seconds)
    network.call(explore=0)
    own = set(seen)  # widths that are measured, and those of the call's own plan

    def fail(call: int, rows: int, stock: bool) -> float:
        if rows not in own:
            raise RuntimeError("no kernel for this shape")
        return 1.0

    network = TimedNetwork(monkeypatch, fail)
    reports = [network.call()[0] for _ in range(5)]
    assert "failed when it was timed: no kernel for this shape" in caplog.text
    assert [report.fallback_reason for report in reports] == [None] * 5
    assert reports[-1].plan_state == "frozen"


@pytest.mark.parametrize("turns", [2, 5, 10, 100])
def test_a_loop_is_timed_by_its_first_turns_without_what_the_very_first_one_takes(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    network = TimedNetwork(monkeypatch)  # its clock
    done: list[int] = []
    clock = TurnClock(turns, torch.device("cpu"))

    def loop() -> None:
        for turn in range(turns):
            network.now += 50.0 if turn == 0 else 2.0
            done.append(turn)
            clock.turned()

    assert clock.seconds(loop) == 2.0 * turns
    assert len(done) == turns_to_time(turns) <= max(5, turns / 4)


def test_a_loop_of_fewer_turns_than_were_expected_has_no_time() -> None:
    clock = TurnClock(20, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="it took 3 turns where 20 were expected"):
        clock.seconds(lambda: [clock.turned() for _ in range(3)])


def test_two_threads_explore_one_kind_and_get_right_samples() -> None:
    network, errors = MIXTURE, list[BaseException]()
    xs = [noise(1, 64, seed=seed) for seed in range(8)]
    expected = [sequential_by_scheduler(MIXTURE, x, N) for x in xs]

    def serve(numbers: range) -> None:
        try:
            for number in numbers:
                found = srds_fast.sample(network, xs[number], scheduler(), N, method="auto")
                assert float((found.sample - expected[number]).abs().mean()) < 0.05
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(range(first, 8, 2),)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def explicit(report: Report) -> Method:
    """The options of the method that a report tells of."""
    kind = BY_NAME[report.method]
    told = report.options or {field.name: getattr(report, field.name) for field in fields(kind)}
    return kind(**told)


def test_threads_with_changing_shapes_and_plans_that_are_dropped_get_the_bits_of_the_reported_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turned_slow: list[bool] = []
    network = TimedNetwork(monkeypatch, lambda call, rows, stock: 2.0 * N if turned_slow and rows > 2 else 1.0)
    found: list[tuple[Tensor, int, srds_fast.SampleResult]] = []
    errors: list[BaseException] = []

    def call(number: int) -> None:
        x, steps = noise(1 + number % 2, 64, seed=number), (N, 25, 30)[number // 2 % 3]
        found.append((x, steps, srds_fast.sample(network, x, scheduler(), steps, method="auto")))

    def work(numbers: Iterable[int]) -> None:
        try:
            for number in numbers:
                call(number)
        except BaseException as error:
            errors.append(error)

    def in_two_threads() -> None:
        threads = [threading.Thread(target=work, args=(range(first, 12, 2),)) for first in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    four_kinds = [number for number in range(24) if number % 6 < 4]
    work(four_kinds)
    assert {result.report.plan_state for *_, result in found[-4:]} == {"frozen"}
    in_two_threads()  # the other two kinds explore
    turned_slow.append(True)
    work(four_kinds)
    assert {result.report.plan_state for *_, result in found[-4:]} == {"dropped"}
    in_two_threads()
    assert not errors
    for x, steps, result in found:
        told = expected = sequential_by_scheduler(MIXTURE, x, steps)
        if result.report.method != "stock":
            told = srds_fast.sample(MIXTURE, x, scheduler(), steps, method=explicit(result.report)).sample
        assert torch.equal(result.sample, told)
        assert float((result.sample - expected).abs().mean()) < 0.05


@pytest.mark.parametrize("strict", [False, True])
def test_a_method_that_diverges_is_an_error_only_if_strict(strict: bool) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return -30 * x

    x, picard = noise(2, 8), srds_fast.methods.ParaTAA(data_std=None, history=0)
    if strict:
        with pytest.raises(srds_fast.DivergenceError):
            srds_fast.sample(denoiser, x, scheduler(), 60, method=picard, tolerance=1e-9, strict=True)
        return
    found = srds_fast.sample(denoiser, x, scheduler(), 60, method=picard, tolerance=1e-9)
    assert "one after another" in found.report.fallback_reason
    expected = srds_fast.sample(denoiser, x, scheduler(), 60, method="sequential").sample
    torch.testing.assert_close(found.sample, expected, rtol=0, atol=0)
