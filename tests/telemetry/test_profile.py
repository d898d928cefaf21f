"""Who looks at calls, when, what it costs, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import profiled
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from ranges import in_a_trace
from torch import Tensor
from waiting import until

import srds_fast
from srds_fast import Report, telemetry
from srds_fast.errors import DivergenceError, InvalidArgument
from srds_fast.solvers.contract import Core, Evaluate


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (t / 1000).view(-1, *[1] * (x.ndim - 1))


def sampled(network: Any = denoiser, **settings: Any) -> srds_fast.SampleResult:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    return srds_fast.sample(network, x, DDIMScheduler(), 16, **settings)


def counts(report: Report) -> dict[str, Any]:
    assert report.timeline is not None
    return {phase: each["count"] for phase, each in report.timeline.items()}


@pytest.mark.parametrize("traced", [False, True])
def test_looking_changes_nothing(tmp_path: Path, traced: bool) -> None:
    plain = sampled()
    with srds_fast.profile(tmp_path / "trace.json" if traced else None):
        watched = sampled()
    assert torch.equal(plain.sample, watched.sample)
    assert plain.report.timeline is None
    assert watched.report.timeline is not None
    assert sampled().report.timeline is None


def a_wave() -> Core:
    """A core that hands out one wave."""
    yield Evaluate(torch.zeros(1, 1), ((0,),), (0,), 0)
    return torch.zeros(1)


def test_nobody_looks_and_nothing_is_made() -> None:
    program = srds_fast.program.srds(16, 4, 1)
    off = telemetry.span("network", "network", 1)
    assert telemetry.recording() is off
    assert telemetry.ranged(core := a_wave(), program, lambda: False) is core
    with srds_fast.profile():  # looked at are calls only
        assert telemetry.span("network", "network", 1) is off


def test_costs_are_measured_in_the_plan(tmp_path: Path) -> None:
    fast = srds_fast.compile(tiny.stable_diffusion())
    with srds_fast.profile(tmp_path / "trace.json"):
        fast(**{**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": 12})
    (made,) = in_a_trace(tmp_path / "trace.json")
    made.check()
    (plan,) = [each for each in made.inside if each.kind == "plan"]
    assert "network" in {each.kind for each in plan.walk()}
    assert ("explore" in {each.kind for each in made.inside}) == (fast.report.exploring_seconds > 0)
    assert len(made.of("wave")) == len(made.of("network")) == fast.report.waves == counts(fast.report)["network"]


def test_a_wave_that_was_left_is_not_counted() -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return given

    fast = srds_fast.compile(tiny.stable_diffusion(), **profiled.EXACT)
    call = {**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": profiled.STEPS}
    with srds_fast.profile():
        fast(**call, callback_on_step_end=interrupt)
    assert fast.report.interrupted
    found = counts(fast.report)
    assert found["wave"] == found["network"] == fast.report.waves < 9
    assert found["decode"] == 1


@pytest.mark.parametrize("leaves", [True, False])
def test_a_call_is_counted_whole_or_not_at_all(tmp_path: Path, leaves: bool) -> None:
    """Whether the profile ends while the call runs, or begins then."""
    path, began, go_on = tmp_path / "trace.json", threading.Event(), threading.Event()

    def waiting(x: Tensor, t: Tensor) -> Tensor:
        began.set()
        assert until(go_on.wait)
        return denoiser(x, t)

    with ThreadPoolExecutor(1) as pool, ExitStack() as watching:
        if leaves:
            watching.enter_context(srds_fast.profile(path))
        call = pool.submit(sampled, waiting, exact=True)
        assert until(began.wait)
        if leaves:
            watching.close()
        else:
            watching.enter_context(srds_fast.profile(path))
        go_on.set()
        report = call.result().report
    assert [each.name for each in in_a_trace(path)] == (["call"] if leaves else []), "up to here"
    if leaves:
        assert counts(report)["network"] == counts(report)["wave"] == report.waves
    else:
        assert report.timeline is None


@pytest.mark.parametrize("method", ["srds", "auto", "collocation"])
def test_a_failing_call_ends_its_ranges(tmp_path: Path, method: str) -> None:
    with srds_fast.profile(tmp_path / "trace.json"):
        with pytest.raises(DivergenceError) as failed:
            sampled(lambda x, t: x * torch.nan, method=method)
        sampled()
    assert counts(failed.value.report)["wave"] == failed.value.report.waves
    first, second = in_a_trace(tmp_path / "trace.json")
    first.check()
    second.check()
    assert first.stopped <= second.started


def test_a_call_within_a_call_has_ranges_of_its_own() -> None:
    inner: list[Report] = []

    def calling(x: Tensor, t: Tensor) -> Tensor:
        if not inner:
            inner.append(sampled().report)
        return denoiser(x, t)

    with srds_fast.profile():
        alone = sampled().report
        outer = sampled(calling, exact=True).report
    assert counts(inner[0]) == counts(alone)
    assert counts(outer)["call"] == 1
    assert counts(outer)["network"] == outer.waves


def test_a_trace_has_all_threads_and_streams_and_operations(tmp_path: Path) -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), **profiled.EXACT)
    with srds_fast.profile(tmp_path / "trace.json"), ThreadPoolExecutor(1) as pool:
        pool.submit(sampled).result(60)
        list(fast.stream(**tiny.PIPELINES["stable_diffusion"][1], num_inference_steps=profiled.STEPS))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    found = in_a_trace(tmp_path / "trace.json")
    for call in found:
        call.check()
    assert len(found) == 2
    assert len(found[1].of("wave")) == fast.report.waves == counts(fast.report)["wave"]
    names = {each["name"] for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"aten::tanh", "call (denoiser)"} <= names


def test_one_trace_at_a_time(tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(InvalidArgument, match="has one at a time"), srds_fast.profile(tmp_path / "inner.json"):
            pytest.fail("it was opened")

    with srds_fast.profile(tmp_path / "trace.json"):
        refused()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(refused).result(60)
        with srds_fast.profile():
            sampled()
        assert sampled().report.timeline is not None, "the outer one goes on"
    assert len(in_a_trace(tmp_path / "trace.json")) == 2


def test_a_torch_profiler_that_runs_is_shown_the_ranges(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with pytest.raises(InvalidArgument, match="without a file"), srds_fast.profile(tmp_path / "trace.json"):
            pytest.fail("it was opened")
        with srds_fast.profile():
            sampled()
    profiler.export_chrome_trace(str(tmp_path / "theirs.json"))
    (call,) = in_a_trace(tmp_path / "theirs.json")
    call.check()


def test_a_trace_that_another_profiler_ended_is_lost_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with srds_fast.profile(tmp_path / "trace.json"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            sampled()
        assert sampled().report.timeline is not None
    assert "is lost: another torch profiler" in caplog.text
    assert list(tmp_path.iterdir()) == []
    with srds_fast.profile(tmp_path / "again.json"):
        sampled()
    assert len(in_a_trace(tmp_path / "again.json")) == 1


def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused before anything runs; or, if its folder has gone meanwhile, the first error is raised."""
    for path, why in ((tmp_path / "none" / "trace.json", "there is no folder"), (tmp_path, "it is a folder")):
        with pytest.raises(InvalidArgument, match=why), srds_fast.profile(path):
            pytest.fail("it was opened")
    assert sampled().report.timeline is None
    folder = tmp_path / "folder"
    for inside, expected in ((None, InvalidArgument), (ValueError("its own"), ValueError)):
        folder.mkdir()
        with pytest.raises(expected), srds_fast.profile(folder / "trace.json"):  # noqa: PT012
            folder.rmdir()
            if inside is not None:
                raise inside
    assert "The trace was not written" in caplog.text


def test_a_trace_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("srds_fast.telemetry.watch.MOST_CALLS", 2)
    with srds_fast.profile(tmp_path / "trace.json"):
        reports = [sampled().report for _ in range(5)]
    assert len(in_a_trace(tmp_path / "trace.json")) == 2
    assert all(report.timeline is not None for report in reports)
    assert caplog.text.count("is full") == 1


@pytest.mark.parametrize(("word", "looks"), [("", False), ("0", False), ("Off", False), ("1", True), ("NVTX", True)])
def test_a_word_says_whether_to_look(word: str, looks: bool) -> None:
    with telemetry.profile_as(word):
        assert (sampled().report.timeline is not None) == looks


ENVIRONMENT = """
import os, torch, srds_fast
from diffusers import DDIMScheduler
def waves():
    layer = torch.nn.Linear(5, 5)
    return srds_fast.sample(lambda x, t: layer(x), torch.ones(1, 5), DDIMScheduler(), 16, exact=True).report.waves
torch.zeros(1).sinh()
for _ in range(2):
    try: waves()
    except srds_fast.InvalidArgument as why: print(why)
os.environ["SRDS_FAST_PROFILE"] = os.environ["CORRECTED"]
print(waves(), waves())
"""


def test_the_environment_is_asked_at_the_first_call(tmp_path: Path) -> None:
    """What it asks for and cannot have fails the calls; a file is written when the process exits."""
    environment = {
        **os.environ,
        "SRDS_FAST_PROFILE": str(tmp_path / "none" / "trace.json"),
        "CORRECTED": str(tmp_path / "trace-{pid}.json"),
    }
    program = [sys.executable, "-c", ENVIRONMENT]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=True)
    *refused, waves = ran.stdout.splitlines()
    assert len(refused) == 2
    assert all("there is no folder" in each for each in refused)
    (written,) = tmp_path.iterdir()
    assert re.fullmatch(r"trace-\d+\.json", written.name)
    assert [len(call.of("wave")) for call in in_a_trace(written)] == [int(each) for each in waves.split()]
    assert "aten::sinh" not in written.read_text(), "nothing begins before"


class Clock:
    """A CUDA device, as far as events see it: each event comes 5 ms after the one before."""

    def __init__(self) -> None:
        self.capturing = self.failed = False
        self.waited, self.now = 0, 0.0  # waits of the host; milliseconds

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, 0.0

    def record(self, stream: Any) -> None:
        if self.clock.failed:
            raise RuntimeError("device-side assert triggered")
        self.clock.now = self.at = self.clock.now + 5.0

    def synchronize(self) -> None:
        self.clock.waited += 1

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: clock.capturing)
    return clock


def on_a_device(timeline: telemetry.Timeline) -> Any:
    return telemetry.call("net", lambda: torch.device("cuda", 0), timeline)


def test_ranges_on_a_device_are_timed_there(clock: Clock, tmp_path: Path) -> None:
    timeline = telemetry.Timeline()
    with srds_fast.profile(tmp_path / "trace.json"), on_a_device(timeline):
        core = telemetry.ranged(a_wave(), srds_fast.program.srds(6, 3, 1), lambda: False)
        # iteration 0 and wave_update begin, at 5 and 10 ms; wave_update ends at 15, the wave begins at 20
        next(core)
        for _ in range(2):
            with telemetry.span("network", "network", 1):  # 25 to 30, 35 to 40
                pass
        assert clock.waited == 0, "nothing waits between the waves"
        telemetry.phase("record")  # the wave ends at 45, the iteration at 50
        clock.capturing = True
        with telemetry.span("network", "network", 1):
            pass
        clock.capturing = False
    assert timeline.sums is not None
    seconds = {phase: each["device_seconds"] for phase, each in timeline.sums.items()}
    assert seconds == {
        "call": None,
        "iteration": pytest.approx(0.045),
        "wave_update": pytest.approx(0.005),
        "wave": pytest.approx(0.025),
        "network": pytest.approx(0.010),
        "record": None,
    }


@pytest.mark.parametrize("early", [True, False])
def test_a_device_that_fails_does_not_hide_why(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, early: bool
) -> None:
    timeline = telemetry.Timeline()
    watched = srds_fast.profile(tmp_path / "trace.json")
    with watched, pytest.raises(ValueError, match="its own"), on_a_device(timeline):  # noqa: PT012
        clock.failed = early
        with telemetry.span("network", "network", 1):
            clock.failed = True
            raise ValueError("its own")
    assert timeline.sums is not None
    assert timeline.sums["network"]["device_seconds"] is None
    assert "have no device times: device-side assert triggered" in caplog.text


def test_without_a_trace_no_device_is_waited_for(clock: Clock) -> None:
    timeline = telemetry.Timeline()
    with srds_fast.profile(), on_a_device(timeline), telemetry.span("network", "network", 1):
        pass
    assert clock.waited == 0
    assert timeline.sums is not None
    assert timeline.sums["network"]["device_seconds"] is None
