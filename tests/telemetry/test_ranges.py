"""The ranges of calls of every kind, as an NVTX tool is told of them and as a trace has them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import profiled
import pytest
from ranges import Range, in_a_trace, told_to_a_tool

import srds_fast
from srds_fast import Report

COMPILER = shutil.which("gcc") or shutil.which("cc")
EAGER = ("srds", "collocation", "sequential", "recorded", "widths recorded", "widths replayed", "sample")
NUMBERED = ("iteration", "wave", "network", "coarse", "fine", "checkpoint", "replay")
PROGRAM = srds_fast.program.srds(profiled.STEPS, 3, 3)

Found = dict[str, tuple[Range, Report]]


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
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[2:0:-1])),
    }
    ran = subprocess.run(
        [sys.executable, profiled.__file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    fields = [json.loads(line) for line in ran.stdout.splitlines()]
    for each in fields:
        del each["iterations"], each["missed"], each["converged"], each["speedup"]
    return told_to_a_tool(recording), [Report(**each) for each in fields]


@pytest.fixture(scope="module")
def told(process: tuple[list[list[Range]], list[Report]]) -> Found:
    """By name of the call: its ranges as a tool was told of them, and its report."""
    (calls, *_), reports = process
    return dict(zip(profiled.NAMES, zip(calls, reports, strict=True), strict=True))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The same, of a trace that this process wrote."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    with srds_fast.profile(path):
        reports = list(profiled.calls())
    return dict(zip(profiled.NAMES, zip(in_a_trace(path), reports, strict=True), strict=True))


def test_a_trace_has_the_ranges_that_a_tool_is_told(told: Found, traced: Found) -> None:
    for name, (call, _) in told.items():
        assert traced[name][0].tree() == call.tree()
        for each in call.walk():
            assert each.category in (("coarse", "fine", "mixed") if each.kind == "wave" else (each.kind,))
            assert (each.payload is not None) == (each.kind in NUMBERED)


def test_ranges_lie_where_they_belong(traced: Found) -> None:
    for call, _ in traced.values():
        assert call.name == "call"
        call.check()
    phases = [each.kind for each in traced["srds"][0].inside]
    assert phases == ["encode", "trace", "plan", *["iteration"] * 4, "decode"]
    assert [each.kind for each in traced["stock"][0].inside] == ["stock"]


@pytest.mark.parametrize("name", EAGER)
def test_waves_are_those_of_the_report(told: Found, name: str) -> None:
    call, report = told[name]
    waves = call.of("wave")
    assert [wave.name for wave in waves] == [f"wave {number}" for number in range(report.waves)]
    assert sum(wave.payload or 0 for wave in waves) == report.rows
    assert max(wave.payload or 0 for wave in waves) == report.peak_rows
    assert [each.payload for each in call.of("network")] == [wave.payload for wave in waves]
    for wave in waves:
        assert [each.name for each in wave.inside[:2]] == ["network", "wave_update"]
    # one more, which brings the starting noise to the network
    assert len(call.of("wave_update")) == report.waves + 1


def test_iterations_end_with_their_checkpoint(told: Found) -> None:
    # sweeps of a fixed-point method are counted from 1
    for name, first in (("srds", 0), ("collocation", 1), ("replayed", 0)):
        call, report = told[name]
        iterations = call.of("iteration")
        assert [each.name for each in iterations] == [
            f"iteration {number}" for number in range(first, report.iterations + 1)
        ]
        for iteration in iterations:
            assert iteration.walk()[-1].tree() == ("checkpoint",)
            assert iteration.walk()[-1].payload == iteration.payload


def test_coarse_rows_beside_the_others_have_a_range_of_their_own(told: Found) -> None:
    call, report = told["lanes"]
    assert report.overlap == "streams"
    parted = 0
    for wave in call.of("wave"):
        lanes = [each for each in wave.inside if each.kind in ("coarse", "fine")]
        assert sum(each.payload or 0 for each in wave.of("network")) == wave.payload
        assert [lane.name for lane in lanes] == (["coarse", "fine"] if lanes else [])
        parted += bool(lanes)
    assert parted > 0


def test_replays_tell_launches_instead_of_waves(told: Found) -> None:
    call, report = told["replayed"]
    assert not call.of("wave", "network", "wave_update")
    replays = call.of("replay")
    assert sum(each.payload or 0 for each in replays) == report.waves + report.dropped_waves
    iterations = call.of("iteration")
    assert [each.name for each in replays] == [f"replay {number}" for number in range(len(iterations))]
    # exact: what comes next is launched before it is known whether it will be needed
    assert [len(each.of("replay")) for each in iterations] == [2, 1, 1, 0]


def test_what_is_recorded_is_told_wave_by_wave(told: Found) -> None:
    """So that a node of a graph, made in one of these ranges, can be told to be of its wave."""
    (record,) = [each for each in told["recorded"][0].inside if each.kind == "record"]
    waves = [each for each in record.walk() if each.kind == "wave"]
    for wave in waves:
        assert wave.payload == len(PROGRAM.waves[int(wave.name.split()[1])].rows)
        assert any(each.kind == "network" and each.payload == wave.payload for each in wave.walk())
        assert wave.inside[-1].kind == "wave_update"
    assert [wave.name for wave in waves] == [f"wave {number}" for number in range(len(PROGRAM))]


def test_network_graphs_are_recorded_in_the_call_of_their_width(told: Found) -> None:
    call, _ = told["widths recorded"]
    recorded = [each.payload for each in call.of("network") if each.of("record")]
    assert sorted(payload or 0 for payload in recorded) == sorted({len(wave.rows) for wave in PROGRAM})
    assert not told["widths replayed"][0].of("record")


def test_what_is_recorded_in_the_middle_of_a_replay_is_no_part_of_the_call(told: Found) -> None:
    (call, report), (_, short) = told["recorded on"], told["short"]
    assert short.iterations < report.iterations
    assert report.engine == "loop graph"
    assert not call.of("wave", "network")
    assert sum(each.payload or 0 for each in call.of("replay")) == report.waves
    records = call.of("record")
    assert len(records) == report.iterations - short.iterations
    assert all(each.kind == "wave" for record in records for each in record.inside[0].inside)


def test_a_driven_loop_makes_its_first_call_in_its_first_turn(traced: Found) -> None:
    call, report = traced["driven"]
    assert report.path == "drive"
    assert len(call.of("network")) == report.waves
    (trace,) = [each for each in call.inside if each.kind == "trace"]
    assert [each.kind for each in trace.inside] == ["network"]


def test_every_thread_has_its_own_stack(process: tuple[list[list[Range]], list[Report]]) -> None:
    _, *others = process[0]
    assert [len(calls) for calls in others] == [2, 2, 2]
    for call in (call for calls in others for call in calls):
        call.check()
        assert len(call.of("wave")) == len(call.of("network")) == len(PROGRAM)


@pytest.mark.parametrize("name", [name for name in profiled.NAMES if name != "stock"])
def test_the_report_sums_up_what_the_ranges_say(traced: Found, name: str) -> None:
    call, report = traced[name]
    timeline = report.timeline
    assert timeline is not None
    for phase in ("iteration", "wave", "network", "wave_update", "checkpoint", "replay", "decode"):
        assert timeline.get(phase, {"count": 0})["count"] == len(call.of(phase)), phase
    seconds = [timeline[phase]["seconds"] for phase in ("wave", "iteration", "call") if phase in timeline]
    assert 0 < seconds[0] <= seconds[-1]
    assert seconds == sorted(seconds), "what lies in another takes no longer"
    assert {each["device_seconds"] for each in timeline.values()} == {None}
    assert "time went" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["timeline"] == timeline
