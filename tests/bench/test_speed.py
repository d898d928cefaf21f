"""The commands of bench/speed at a tiny size: what they write hangs together, and what fails loses only itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.speed import engines, kernels, never_slower, rows
from bench.workloads.samplers import Loop

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


def test_curves_are_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, drawn = tmp_path / "rows.json", tmp_path / "rows.png"
    rows.main(["--networks", "policy", "--rows", "2", "1", "--json", str(written), "--picture", str(drawn)])
    assert drawn.read_bytes().startswith(b"\x89PNG")
    (curve,) = json.loads(written.read_text())["curves"]
    assert (curve["rows"], len(curve["eager"])) == ([1, 2], 2)
    # of a GPU there are replays too
    assert len(list(rows.lines({**curve, "replayed": curve["eager"]}))) == 3
    assert rows.curve("policy", [4, 1], longest=0.0)["rows"] == [1], "it ends where calls become long"


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        (rows.main, ["--rows", "1", "0"], "Pass 1 or more"),
        (rows.main, ["--json", "no/such/folder.json"], "name a file in a folder that exists"),
        (engines.main, ["--switches", "--workloads", "policy"], "--switches is for pipelines"),
    ],
    ids=["no rows", "no folder", "no pipeline"],
)
def test_bad_arguments_are_refused(
    command: Callable[..., None], arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_engines(tmp_path: Path) -> None:
    written = tmp_path / "engines.json"
    engines.main(["--workloads", "policy", "--steps", "6", "--repeat", "1", "--json", str(written)])
    results = json.loads(written.read_text())["results"]
    assert len(results) == 1 + len(engines.METHODS) * len(engines.ENGINES)
    for each in results:
        assert each["left_out"] is None
        assert each["overhead"] == pytest.approx(each["seconds"] / each["network_seconds"])


def test_switches_differ_in_themselves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that can be had run the same waves; the others say why not."""
    written = tmp_path / "found.json"
    compile_with = torch.compile
    # which code a compiler writes is looked at in the tests of torch_compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compile_with(call, backend="eager"))
    engines.main(["--switches", "--workloads", "dit", "--steps", "4", "--json", str(written)])
    found = {row["peer"]: row for row in json.loads(written.read_text())["results"]}
    assert set(found) == set(engines.SWITCHES)
    for name in ("streams", "late stop", "network graphs"):
        row = found[name]
        assert row["left_out"] is None
        assert row["over_stock"] == pytest.approx(found["off"]["seconds"] / row["seconds"])
        assert row["engine"] == ("network graphs" if name == "network graphs" else "loop graph")
    if importlib.util.find_spec("xformers") is None:
        assert "xformers" in found["xformers"]["left_out"]


def test_auto_against_the_sequential_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, every = tmp_path / "never.json", never_slower.candidates
    # the sequential plan and enough others for some to be called again
    monkeypatch.setattr(never_slower, "candidates", lambda *arguments: list(every(*arguments))[:5])
    arguments = ["--calls", "4", "--training-steps", "1", "--json", str(written), "--busy"]
    never_slower.main([*arguments, "--only", "digits 10"])
    found = json.loads(written.read_text())["results"]
    assert [each["workload"] for each in found] == ["digits 10"]
    for each in found:
        assert set(each["seconds"]) >= {"stock", "sequential", "auto", each["best"]}
        seconds = each["seconds"]
        assert each["over_stock"] == pytest.approx(seconds["auto"][3] / seconds["stock"][3])
        assert each["first_calls"] == pytest.approx(sum(seconds["auto"][:3]) / sum(seconds["stock"][:3]))
        assert each["over_best"] >= each["over_stock"] * seconds["stock"][3] / seconds["sequential"][3] * (1 - 1e-9)


def test_kernels_are_checked_and_written_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut short in the last row leaves the others; one that is wrong is not timed."""
    measured, written = kernels.measured, tmp_path / "kernels.json"

    def cut(name: str, *arguments: Any) -> dict[str, Any]:
        if name == "fixed_point_wave":
            raise KeyboardInterrupt
        return measured(name, *arguments)

    monkeypatch.setattr(kernels, "measured", cut)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(["--sizes", "SD latent", "--json", str(written)])
    (row,) = json.loads(written.read_text())["rows"]
    assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
    assert kernels.cells({**row, "compiled": 3 * row["seconds"]})["x compiled"] == pytest.approx(3.0)
    subject = kernels.SUBJECTS["wave_update"](None, kernels.DEVICE)
    with pytest.raises(AssertionError):
        kernels.checked(subject._replace(run=lambda: torch.zeros_like(subject.reference())))


SOME = "planning and chords or sampler and srds or kernel and run or host and pixels or policy and chords"


@pytest.mark.parametrize("some", [SOME, pytest.param("test", marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_benchmarks_run(some: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", some]
    command = [sys.executable, "-m", "pytest", "bench", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
