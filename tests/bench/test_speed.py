"""The commands of bench/speed at a tiny size: what they write hangs together, and what fails loses only itself."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.speed import engines, kernels, never_slower, rows, switches
from bench.workloads.samplers import Loop, policy

ROOT = Path(__file__).parents[2]


def failing(loop: Loop, good: int) -> Loop:
    """It raises after so many calls, as a device does that has no memory left."""
    calls: list[int] = []

    def call(sample: int = 0) -> torch.Tensor:
        calls.append(sample)
        if len(calls) > good:
            raise torch.cuda.OutOfMemoryError(f"no memory in call {len(calls)}")
        return loop.call(sample)

    return replace(loop, call=call)


def test_a_curve_ends_where_calls_become_long() -> None:
    found = rows.curve("policy", [4, 1, 2], longest=0.0)
    assert found["rows"] == [1]
    assert len(found["eager"]) == 1
    assert rows.curve("policy", [4, 1, 2])["rows"] == [1, 2, 4]


def test_the_picture_of_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the curves, or from what was written, alone or in gpu_check.json; of a GPU there are replays too."""
    written, drawn = tmp_path / "rows.json", tmp_path / "rows.png"
    rows.main(["--networks", "policy", "--rows", "1", "2", "--json", str(written), "--picture", str(drawn)])
    assert drawn.read_bytes().startswith(b"\x89PNG")
    whole = json.loads(written.read_text())
    (curve,) = whole["curves"]
    curve["replayed"] = [seconds / 2 for seconds in curve["eager"]]
    assert len(list(rows.lines(curve))) == 3
    checked, both = tmp_path / "gpu_check.json", tmp_path / "both.png"
    checked.write_text(json.dumps({"parts": {"rows": {"result": {**whole, "gpu": "of a test"}}}}))
    rows.main(["--from", str(checked), "--picture", str(both)])
    wide, narrow = (struct.unpack(">II", each.read_bytes()[16:24]) for each in (both, drawn))
    assert wide == (2 * narrow[0], narrow[1])
    checked.write_text(json.dumps({"parts": {"rows": {"result": None}}}))
    with pytest.raises(SystemExit, match="holds no curves"):
        rows.main(["--from", str(checked), "--picture", str(both)])


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        (rows.main, ["--rows", "1", "0"], "Pass 1 or more"),
        (rows.main, ["--from", "rows.json"], "--picture rows.png"),
        (rows.main, ["--json", "no/such/folder.json"], "name a file in a folder that exists"),
        (switches.main, ["--repeat", "0"], "nothing to time"),
    ],
    ids=["no rows", "no picture", "no folder", "no calls"],
)
def test_bad_arguments_are_refused(
    command: Callable[..., None], arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "engines.json"
    engines.main(["--workloads", "policy", "--steps", "6", "--repeat", "1", "--json", str(written)])
    results = json.loads(written.read_text())["results"]
    assert len(results) == 1 + len(engines.METHODS) * len(engines.ENGINES)
    for each in results:
        assert each["failed"] is None
        assert each["over_stock"] == pytest.approx(results[0]["seconds"] / each["seconds"])
        assert each["overhead"] == pytest.approx(each["seconds"] / each["network_seconds"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(results)


def test_an_engine_that_fails_loses_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = policy()
    made = workload.ours

    def ours(steps: int, settings: dict[str, Any]) -> Loop:
        if settings["engine"] == "network-graphs":
            raise torch.cuda.OutOfMemoryError("no memory")
        loop = made(steps, settings)
        return failing(loop, 2) if settings["engine"] == "graph" else loop

    monkeypatch.setattr(workload, "ours", ours)
    found = {(each["method"], each["asked"]): each for each in engines.measured("policy", workload, 6, 1)}
    assert len(found) == 1 + len(engines.METHODS) * len(engines.ENGINES)
    running = [key for key, each in found.items() if each["failed"] is None]
    assert running == [("stock", "stock"), *((method, "eager") for method in engines.METHODS)]
    assert found["srds", "network-graphs"]["failed"] == "OutOfMemoryError: no memory"
    assert found["srds", "graph"]["failed"] == "OutOfMemoryError: no memory in call 3"
    for each in found.values():
        assert ("no memory" in engines.line(each)) == (each["failed"] is not None)


def test_switches_differ_in_themselves_alone(tmp_path: Path) -> None:
    """Those that can be had run the same waves; the others say why not."""
    written = tmp_path / "found.json"
    on = ["streams", "late stop", "network graphs", "channels_last", "xformers"]
    switches.main(["--workloads", "dit", "--steps", "4", "--repeat", "1", "--switches", *on, "--json", str(written)])
    found = {row["switch"]: row for row in json.loads(written.read_text())["results"]}
    assert list(found) == on
    for name in ("streams", "late stop", "network graphs"):
        row = found[name]
        assert row["why_not"] is None
        assert row["faster"] == pytest.approx(row["off"] / row["on"])
        assert row["engine"] == ("network graphs" if name == "network graphs" else "loop graph")
    if importlib.util.find_spec("xformers") is None:
        assert found["xformers"]["faster"] is None
        assert "xformers" in found["xformers"]["why_not"]


def test_auto_against_the_sequential_loop(tmp_path: Path) -> None:
    written = tmp_path / "never.json"
    never_slower.main(["--steps", "4", "--size", "16", "--rounds", "2", "--json", str(written)])
    found = json.loads(written.read_text())
    assert [len(times) for times in found["times"].values()] == [2, 2]
    assert found["report"]["plan_reason"]


def test_kernels_are_checked_and_written_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut short in the last row leaves the others; one that is wrong is not timed."""
    measured, written = kernels.measured, tmp_path / "kernels.json"

    def cut(name: str, *arguments: Any) -> dict[str, Any]:
        if name == "fixed_point_wave":
            raise KeyboardInterrupt
        return measured(name, *arguments)

    monkeypatch.setattr(kernels, "measured", cut)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(["--sizes", "SD latent", "--no-compile", "--json", str(written)])
    (row,) = json.loads(written.read_text())["rows"]
    assert row["operation"] == "wave_update"
    assert row["bytes"] > 0
    assert row["called"] > 0
    subject = kernels.SUBJECTS["wave_update"](None, kernels.DEVICE)
    kernels.checked(subject)
    with pytest.raises(AssertionError):
        kernels.checked(subject._replace(run=lambda: None))


def test_a_row_of_a_gpu() -> None:
    row = {"operation": "wave_update", "size": "64 MB", "rows": 10, "bytes_per_second": 2.7e12, "of_copy": 0.9}
    row |= {"seconds": 5e-6, "eager": 50e-6, "compiled": None, "called": 9e-6, "eager_called": 90e-6}
    assert kernels.line(row).split()[4:] == ["5.0", "2700", "0.90", "10.00", "-", "9.0", "10.00"]
    assert kernels.line({**row, "compiled": 20e-6}).split()[8] == "4.00"


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "some",
    [
        "planning and chords or sampler and srds or kernel and run or host and pixels or policy and chords",
        pytest.param("test", marks=pytest.mark.exhaustive),
    ],
    ids=["some", "all"],
)
def test_benchmarks_run(some: str) -> None:
    done = benchmarks("--benchmark-disable", "-k", some)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
