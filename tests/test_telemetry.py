"""Ranges: what a tool is told through NVTX, what a trace holds, what the report sums up, what it costs to look."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import profiled
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from ranges import Range, in_a_trace, told_to_a_tool
from torch import Tensor

import srds_fast
from srds_fast import Report, telemetry
from srds_fast.engine import marks
from srds_fast.errors import DivergenceError, InvalidArgument
from srds_fast.trace import Event, Trace

EAGER = ("srds", "collocation", "sequential", "recorded", "widths recorded", "sample")
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Range]], list[Report]]:
    """What a tool was told of in another process, by thread, and the reports of the calls in its first one."""
    if COMPILER is None:
        pytest.skip("needs a C compiler, to build a tool that NVTX loads")
    folder = tmp_path_factory.mktemp("nvtx")
    tool, recording = folder / "recorder.so", folder / "ranges.jsonl"
    source = Path(__file__).with_name("nvtx_recorder.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", tool, source], check=True, timeout=60)
    environment = {
        **os.environ,
        "NVTX_INJECTION64_PATH": str(tool),
        "NVTX_RECORDING": str(recording),
        "SRDS_FAST_PROFILE": "nvtx",
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, Path(profiled.__file__)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return told_to_a_tool(recording), [Report(**_fields(json.loads(line))) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def told(process: tuple[list[list[Range]], list[Report]]) -> dict[str, tuple[Range, Report]]:
    """By name of the call: its ranges as a tool was told of them, and its report."""
    (calls, *_), reports = process
    return _by_name(calls, reports)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Range, Report]]:
    """The same, of a trace that this process wrote."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    with srds_fast.profile(path):
        reports = list(profiled.calls())
    return _by_name(in_a_trace(path), reports)


@pytest.fixture(params=["told", "traced"])
def found(request: pytest.FixtureRequest) -> dict[str, tuple[Range, Report]]:
    ranges: dict[str, tuple[Range, Report]] = request.getfixturevalue(request.param)
    return ranges


def _by_name(calls: list[Range], reports: list[Report]) -> dict[str, tuple[Range, Report]]:
    pairs = list(zip(calls, reports, strict=True))
    return dict(zip(profiled.NAMES, pairs, strict=True))


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "iterations"}


def test_ranges_lie_where_they_belong(found: dict[str, tuple[Range, Report]]) -> None:
    for call, _ in found.values():
        assert (call.name, call.category) == ("call", "call")
        call.check()
    phases = [each.kind for each in found["srds"][0].inside]
    assert phases == ["encode", "trace", "plan", *["iteration"] * 4, "decode"]
    assert [each.kind for each in found["stock"][0].inside] == ["stock"]


@pytest.mark.parametrize("name", EAGER)
def test_waves_are_those_of_the_report(found: dict[str, tuple[Range, Report]], name: str) -> None:
    call, report = found[name]
    waves = call.of("wave")
    assert len(waves) == report.waves > 0
    assert [wave.name for wave in waves] == [f"wave {number}" for number in range(report.waves)]
    assert sum(wave.payload or 0 for wave in waves) == report.rows
    assert max(wave.payload or 0 for wave in waves) == report.peak_rows
    for wave in waves:
        network, update = wave.inside[:2]
        assert (network.name, network.payload) == ("network", wave.payload)
        assert update.name == "wave_update"
    # one more, which brings the starting noise to the network
    assert len(call.of("wave_update")) == report.waves + 1


def test_iterations_end_with_their_checkpoint(found: dict[str, tuple[Range, Report]]) -> None:
    for name, first in (("srds", 0), ("collocation", 1), ("replayed", 0)):
        call, report = found[name]
        iterations = call.of("iteration")
        numbers = list(range(first, report.iterations + 1))
        assert [each.name for each in iterations] == [f"iteration {number}" for number in numbers]
        for iteration in iterations:
            last = [each for each in iteration.walk() if not each.inside][-1]
            assert (last.name, last.payload) == ("checkpoint", iteration.payload)


def test_waves_are_coarse_or_fine_or_both(found: dict[str, tuple[Range, Report]]) -> None:
    program = srds_fast.program.srds(profiled.STEPS, 3, 3)
    for wave, range_ in zip(program, found["srds"][0].of("wave"), strict=True):
        coarse, fine = any(row.coarse for row in wave.rows), any(row.fine for row in wave.rows)
        assert range_.category == ("mixed" if coarse and fine else "coarse" if coarse else "fine")
    assert {wave.category for wave in found["sequential"][0].of("wave")} == {"fine"}


def test_lanes_share_the_rows_of_a_wave(found: dict[str, tuple[Range, Report]]) -> None:
    call, report = found["lanes"]
    assert report.overlap == "streams"
    parted = 0
    for wave in call.of("wave"):
        lanes = [each for each in wave.inside if each.kind == "lane"]
        calls = [each for each in wave.walk() if each.kind == "network"]
        assert sum(each.payload or 0 for each in calls) == wave.payload
        assert [lane.name for lane in lanes] == (["coarse", "fine"] if lanes else [])
        parted += bool(lanes)
    assert parted > 0


@pytest.mark.parametrize("name", ["replayed", "widths replayed"])
def test_replays_tell_launches_instead_of_waves(found: dict[str, tuple[Range, Report]], name: str) -> None:
    call, report = found[name]
    assert not call.of("wave", "network", "wave_update")
    replays = call.of("replay")
    assert sum(each.payload or 0 for each in replays) == report.waves + report.dropped_waves
    if name == "replayed":
        assert len(replays) == report.iterations + 1
    else:  # and one that begins
        assert len(replays) == report.waves + 1


def test_every_thread_has_its_own_stack(process: tuple[list[list[Range]], list[Report]]) -> None:
    _, *others = process[0]
    assert [len(calls) for calls in others] == [2, 2, 2]
    for calls in others:
        for call in calls:
            call.check()
            assert len(call.of("wave")) == len(call.of("network")) == srds_fast.program.srds(6, 3, 3).num_waves


def test_what_is_recorded_in_the_middle_of_a_replay_is_no_part_of_the_call(
    found: dict[str, tuple[Range, Report]],
) -> None:
    call, report = found["recorded on"]
    assert found["short"][1].iterations < report.iterations
    assert report.engine == "loop graph"
    assert not call.of("wave", "network")
    assert sum(each.payload or 0 for each in call.of("replay")) == report.waves
    assert len(call.of("iteration")) == report.iterations + 1
    records = call.of("record")
    assert len(records) == report.iterations - found["short"][1].iterations
    assert all(each.kind == "wave" for record in records for each in record.inside[0].inside)


def test_sweeps_are_counted_from_one_wherever_they_run(tmp_path: Path) -> None:
    graphs, layer = srds_fast.Graphs(), profiled.Linear()
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    with srds_fast.profile(tmp_path / "trace.json"):
        for _ in range(2):
            settings: dict[str, Any] = {"method": "collocation", "tolerance": 1e-30, "max_iterations": 3}
            srds_fast.sample(layer, x, DDIMScheduler(), 20, **settings, engine="graph", graphs=graphs)
    eager, replayed = in_a_trace(tmp_path / "trace.json")
    expected = [f"iteration {number}" for number in (1, 2, 3)]
    assert [each.name for each in eager.of("iteration")] == expected
    (record,) = [each for each in eager.inside if each.kind == "record"]
    assert [each.name for each in record.inside if each.kind == "iteration"] == expected
    assert [each.name for each in replayed.of("iteration")] == expected
    assert [each.name for each in replayed.of("replay")] == ["replay 1", "replay 2", "replay 3"]


def test_a_replay_tells_its_iteration_wherever_it_is_launched(found: dict[str, tuple[Range, Report]]) -> None:
    call, _ = found["replayed"]
    # exact: what comes next is launched before it is known whether it will be needed
    iterations = call.of("iteration")
    assert [each.name for each in call.of("replay")] == [f"replay {number}" for number in range(len(iterations))]
    assert [len(each.of("replay")) for each in iterations] == [2, 1, 1, 0]


@pytest.mark.parametrize("name", ["recorded", "widths recorded"])
def test_what_is_recorded_is_told_wave_by_wave(found: dict[str, tuple[Range, Report]], name: str) -> None:
    """So that a node of a graph, made in one of these ranges, can be told to be of its wave."""
    call, _ = found[name]
    (record,) = [each for each in call.inside if each.kind == "record"]
    waves = [each for each in record.walk() if each.kind == "wave"]
    program = srds_fast.program.srds(profiled.STEPS, 3, 3)
    for wave in waves:
        number = int(wave.name.split()[1])
        assert wave.payload == len(program.waves[number].rows)
        assert any(each.kind == "network" and each.payload == wave.payload for each in wave.walk())
        assert [each.kind for each in wave.inside][-1:] == ["wave_update"]
    if name == "recorded":
        assert [wave.name for wave in waves] == [f"wave {number}" for number in range(len(program))]
    else:
        assert sorted(wave.payload or 0 for wave in waves) == sorted({len(wave.rows) for wave in program})


def test_a_driven_loop_makes_its_first_call_in_its_first_turn(found: dict[str, tuple[Range, Report]]) -> None:
    call, report = found["driven"]
    assert report.path == "drive"
    assert len(call.of("network")) == report.waves
    (trace,) = [each for each in call.inside if each.kind == "trace"]
    assert [each.payload for each in trace.inside] == [1]


@pytest.mark.parametrize("name", [name for name in profiled.NAMES if name != "stock"])
def test_the_report_sums_up_what_the_ranges_say(traced: dict[str, tuple[Range, Report]], name: str) -> None:
    call, report = traced[name]
    assert report.timeline is not None
    for phase, kinds in (("iteration", ("iteration",)), ("wave", ("wave",)), ("network", ("network",))):
        ranges = call.of(*kinds)
        summed = report.timeline.get(phase, {"count": 0, "seconds": 0.0, "device_seconds": None})
        assert summed["count"] == len(ranges)
        assert summed["seconds"] == pytest.approx(1e-6 * sum(each.stopped - each.started for each in ranges), abs=1e-6)
        assert summed["device_seconds"] is None
    assert report.timeline["call"]["seconds"] == pytest.approx(1e-6 * (call.stopped - call.started), abs=1e-6)
    assert "time went" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["timeline"] == report.timeline


def test_costs_are_measured_in_the_plan(tmp_path: Path) -> None:
    pipe, call = tiny.stable_diffusion(), {**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": 12}
    fast = srds_fast.compile(pipe)
    with srds_fast.profile(tmp_path / "trace.json"):
        fast(**call)
    (made,) = in_a_trace(tmp_path / "trace.json")
    made.check()
    (plan,) = [each for each in made.inside if each.kind == "plan"]
    assert len([each for each in plan.walk() if each.kind == "network"]) > 10
    assert len(made.of("wave")) == len(made.of("network")) == fast.report.waves
    assert len(made.of("iteration")) == fast.report.iterations + 1
    assert fast.report.timeline["network"]["count"] == fast.report.waves


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (t / 1000).view(-1, *[1] * (x.ndim - 1))


def sampled(**settings: Any) -> srds_fast.SampleResult:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    return srds_fast.sample(denoiser, x, DDIMScheduler(), 16, **settings)


def test_looking_changes_nothing() -> None:
    plain = sampled()
    with srds_fast.profile():
        watched = sampled()
    assert torch.equal(plain.sample, watched.sample)
    assert plain.report.timeline is None
    assert watched.report.timeline is not None
    assert sampled().report.timeline is None
    assert not telemetry.active


def test_a_wave_that_was_left_is_not_counted() -> None:
    pipe, seen = tiny.stable_diffusion(), []

    def interrupt(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = True
        return given

    fast = srds_fast.compile(pipe, **profiled.EXACT)
    call = {**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": profiled.STEPS}
    with srds_fast.profile():
        fast(**call, callback_on_step_end=interrupt)
    assert seen
    assert fast.report.interrupted
    timeline = fast.report.timeline
    assert timeline["wave"]["count"] == timeline["network"]["count"] == fast.report.waves < 9
    assert timeline["decode"]["count"] == 1


def test_a_call_is_looked_at_whole_or_not_at_all(tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()
    reports: list[Report] = []

    def waiting(x: Tensor, t: Tensor) -> Tensor:
        began.set()
        go_on.wait(60)
        return denoiser(x, t)

    def call() -> None:
        x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
        reports.append(srds_fast.sample(waiting, x, DDIMScheduler(), 16, exact=True).report)

    def in_the_middle(leave: bool) -> None:
        thread = threading.Thread(target=call)
        if leave:
            with srds_fast.profile(tmp_path / "left.json"):
                thread.start()
                assert began.wait(60)
        else:
            thread.start()
            assert began.wait(60)
            with srds_fast.profile(tmp_path / "come.json"):
                go_on.set()
                thread.join()
        go_on.set()
        thread.join()
        began.clear()
        go_on.clear()

    in_the_middle(leave=True)
    in_the_middle(leave=False)
    whole, unseen = reports
    assert whole.timeline["network"]["count"] == whole.timeline["wave"]["count"] == whole.waves
    assert unseen.timeline is None
    assert in_a_trace(tmp_path / "left.json") == in_a_trace(tmp_path / "come.json") == []


@pytest.mark.parametrize("method", ["srds", "auto", "collocation"])
def test_a_failing_call_ends_its_ranges(tmp_path: Path, method: str) -> None:
    def failing(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.nan

    with srds_fast.profile(tmp_path / "trace.json"):
        with pytest.raises(DivergenceError) as failed:
            srds_fast.sample(failing, torch.randn(1, 4), DDIMScheduler(), 16, method=method)
        sampled()
    assert failed.value.report.timeline["wave"]["count"] == failed.value.report.waves
    first, second = in_a_trace(tmp_path / "trace.json")
    first.check()
    second.check()
    assert first.stopped <= second.started
    assert not telemetry._calls.open


def test_a_call_within_a_call_has_ranges_of_its_own() -> None:
    inner: list[Report] = []

    def calling(x: Tensor, t: Tensor) -> Tensor:
        if not inner:
            inner.append(sampled().report)
        return denoiser(x, t)

    with srds_fast.profile():
        alone = sampled().report
        outer = srds_fast.sample(calling, torch.randn(1, 5), DDIMScheduler(), 16, exact=True).report
    assert {name: each["count"] for name, each in inner[0].timeline.items()} == {
        name: each["count"] for name, each in alone.timeline.items()
    }
    assert outer.timeline["call"]["count"] == 1
    assert outer.timeline["network"]["count"] == outer.waves


def test_threads_have_tracks_of_their_own(tmp_path: Path) -> None:
    with srds_fast.profile(tmp_path / "trace.json"):
        threads = [threading.Thread(target=sampled, name=f"server {number}") for number in range(3)]
        for thread in threads:  # one after another: the system gives the next one the number of the last
            thread.start()
            thread.join()
        sampled()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {each["tid"]: each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["host, MainThread", "host, server 0", "host, server 1", "host, server 2"]
    calls = in_a_trace(tmp_path / "trace.json")
    assert len(calls) == 4
    for call in calls:
        call.check()


def test_looking_twice_at_once(tmp_path: Path) -> None:
    with srds_fast.profile(tmp_path / "outer.json"):
        with srds_fast.profile(tmp_path / "inner.json"):
            sampled()
        sampled()
    assert len(in_a_trace(tmp_path / "inner.json")) == 1
    assert len(in_a_trace(tmp_path / "outer.json")) == 2


def test_a_stream_is_looked_at(tmp_path: Path) -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), **profiled.EXACT)
    with srds_fast.profile(tmp_path / "trace.json"):
        for _ in fast.stream(**tiny.PIPELINES["stable_diffusion"][1], num_inference_steps=profiled.STEPS):
            pass
    (call,) = in_a_trace(tmp_path / "trace.json", "host, srds_fast.pipelines.stream")
    call.check()
    assert len(call.of("wave")) == fast.report.waves == fast.report.timeline["wave"]["count"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidArgument, match="there is no folder"),
        srds_fast.profile(tmp_path / "none" / "trace.json"),
    ):
        pytest.fail("it was opened")
    with pytest.raises(InvalidArgument, match="it is a folder"), srds_fast.profile(tmp_path):
        pytest.fail("it was opened")
    assert not telemetry.active


def test_a_trace_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srds_fast.trace.MOST_EVENTS", 100)
    with srds_fast.profile(tmp_path / "trace.json"):
        for _ in range(5):
            sampled()
    written = json.loads((tmp_path / "trace.json").read_text())
    kept = [each for each in written["traceEvents"] if each["ph"] == "X"]
    assert 0 < len(kept) <= 100, "calls are kept whole"
    assert len(in_a_trace(tmp_path / "trace.json")) == len([each for each in kept if each["name"] == "call"])
    assert written["otherData"]["dropped_events"] > 0


def test_a_trace_may_be_written_while_calls_end(tmp_path: Path) -> None:
    trace, ended = Trace(tmp_path / "trace.json"), threading.Event()

    def calls() -> None:
        while not ended.is_set():
            threading.Thread(target=trace.take, args=([Event("call", "call", 0, 1, 0, {})],)).start()

    thread = threading.Thread(target=calls)
    thread.start()
    for _ in range(20):
        trace.write()
        in_a_trace(trace.path)
    ended.set()
    thread.join()


@pytest.mark.parametrize(("setting", "looks"), [("", False), ("0", False), ("Off", False), ("1", True), ("NVTX", True)])
def test_the_environment_says_whether_to_look(setting: str, looks: bool) -> None:
    assert _in_a_process("print(telemetry.active)", setting) == str(looks)


def test_the_environment_names_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace-{pid}.json"
    code = "import test_telemetry; print(test_telemetry.sampled().report.waves)"
    waves = int(_in_a_process(code, str(path)))
    (written,) = tmp_path.iterdir()
    assert re.fullmatch(r"trace-\d+\.json", written.name)
    (call,) = in_a_trace(written)
    assert len(call.of("wave")) == waves


def _in_a_process(code: str, setting: str) -> str:
    environment = {**os.environ, "SRDS_FAST_PROFILE": setting, "PYTHONPATH": str(Path(__file__).parent)}
    program = f"from srds_fast import telemetry; {code}"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def microseconds_of_ranges(waves: int = 2000) -> float:
    """What a wave's ranges take: all that is asked, or done, for one wave of a run."""
    program = srds_fast.program.srds(100, 20, 1)
    ranges = telemetry.waves_of(program)
    started = time.perf_counter()
    for number in range(waves):
        if ranges is not None:
            ranges.advance()
        if ranges is not None:
            ranges.wave(number % 20)
        with telemetry.span("network", "network", 6):
            pass
    return 1e6 * (time.perf_counter() - started) / waves


def test_not_looking_costs_less_than_a_microsecond_a_wave() -> None:
    assert min(microseconds_of_ranges() for _ in range(20)) < 1.0


class Clock:
    """A CUDA device, as far as marks see it: idle at first, later it comes to what it is given after 5 ms.

    Attributes:
        failed: from now on it raises.
    """

    def __init__(self) -> None:
        self.capturing = self.failed = False
        self.stream = 7
        self.waited = 0
        self.behind = 0.0

    def cuda(self) -> SimpleNamespace:
        return SimpleNamespace(
            Event=self._event,
            current_stream=lambda device: SimpleNamespace(cuda_stream=self.stream),
            is_current_stream_capturing=lambda: self.capturing,
        )

    def _synchronize(self) -> None:
        self.waited += 1

    def _event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=0.0)

        def record(stream: Any) -> None:
            if self.failed:
                raise RuntimeError("device-side assert triggered")
            event.at, self.behind = Event.now() + self.behind, 5e6

        event.record = record
        event.synchronize = self._synchronize
        event.elapsed_time = lambda other: 1e-6 * (other.at - event.at)
        return event


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(marks, "torch", SimpleNamespace(cuda=clock.cuda()))
    return clock


def test_ranges_on_a_device_are_timed_there(clock: Clock, tmp_path: Path) -> None:
    device, program, timeline = SimpleNamespace(type="cuda"), srds_fast.program.srds(6, 3, 1), telemetry.Timeline()
    with srds_fast.profile(tmp_path / "trace.json"), telemetry.call("net", lambda: device, timeline):
        ranges = telemetry.waves_of(program)
        assert ranges is not None
        before = clock.waited
        ranges.advance()
        ranges.wave(0)
        clock.stream = 8
        with telemetry.span("coarse", "coarse", 1), telemetry.span("network", "network", 1):
            time.sleep(0.002)
        clock.stream = 7
        ranges.advance()
        assert clock.waited == before, "nothing waits between the waves"
        telemetry.phase("record")
        clock.capturing = True
        with telemetry.span("network", "network", 1):
            pass
        clock.capturing = False
    assert timeline.sums is not None
    network = timeline.sums["network"]
    assert network["count"] == 1
    assert network["device_seconds"] == pytest.approx(network["seconds"], abs=1e-3)
    assert timeline.sums["record"]["device_seconds"] is None
    (iteration,) = in_a_trace(tmp_path / "trace.json", "device, stream 0x7")
    (coarse,) = in_a_trace(tmp_path / "trace.json", "device, stream 0x8")
    assert [each.kind for each in coarse.inside] == ["network"]
    (on_host,) = in_a_trace(tmp_path / "trace.json")[0].of("iteration")
    assert [each.kind for each in iteration.inside] == ["wave_update", "wave"]
    # the marks say when the device came to it
    assert 3000 < iteration.started - on_host.started < 7000


def test_a_device_that_fails_does_not_hide_why(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timeline = telemetry.Timeline()

    def failing() -> None:
        with (
            telemetry.call("net", lambda: SimpleNamespace(type="cuda"), timeline),
            telemetry.span("network", "network", 1),
        ):
            clock.failed = True
            raise ValueError("its own")

    with srds_fast.profile(tmp_path / "trace.json"), pytest.raises(ValueError, match="its own"):
        failing()
    assert timeline.sums is not None
    assert timeline.sums["network"]["device_seconds"] is None
    assert "is not timed: device-side assert triggered" in caplog.text
    (call,) = in_a_trace(tmp_path / "trace.json")
    assert [each.name for each in call.inside] == ["network"]


def test_without_a_trace_no_device_is_waited_for(clock: Clock) -> None:
    timeline = telemetry.Timeline()
    with srds_fast.profile(), telemetry.call("net", lambda: SimpleNamespace(type="cuda"), timeline):
        telemetry.phase("decode")
    assert clock.waited == 0
    assert timeline.sums is not None
    assert timeline.sums["decode"]["device_seconds"] is None


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path)
    trace.take([Event("call", "call", 0, 1, 0, {"of": object()})])
    with pytest.raises(TypeError):
        trace.write()
    assert not path.exists()
