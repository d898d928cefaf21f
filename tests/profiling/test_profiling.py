"""What is recorded by profilers, and what the scripts that start them say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from profiling import busy, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["nsys", "ncu"])
def test_scripts_say_what_is_missing(script: str) -> None:
    command = ["bash", f"profiling/{script}.sh"]
    missing = subprocess.run(
        [*command, "digits"], cwd=ROOT, env={**os.environ, script.upper(): "no-such"}, capture_output=True, text=True
    )
    assert (missing.returncode, "name it in" in missing.stderr) == (2, True)
    nothing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (nothing.returncode, "Name a workload first" in nothing.stderr) == (2, True)


NSYS = """#!/bin/sh
# as Nsight Systems is called: profile, and stats with the report names of a release
case "$1" in
profile)
  for word; do case "$word" in --output=*) : >"${word#--output=}.nsys-rep" ;; esac; done
  echo "$@" ;;
stats)
  case "$*" in *--help-reports*) echo "%s"; exit 1 ;; esac
  echo "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        ("nvtx_pushpop_sum nvtx_gpu_proj_sum nvtx_kern_sum cuda_gpu_kern_sum cuda_gpu_mem_time_sum",
         ["nvtx_pushpop_sum", "nvtx_gpu_proj_sum", "cuda_gpu_kern_sum", "cuda_gpu_mem_time_sum"]),
        ("nvtxppsum nvtxkernsum gpukernsum gpumemtimesum",
         ["nvtxppsum", "nvtxkernsum", "gpukernsum", "gpumemtimesum"]),
    ],
    ids=["new names", "2022.4"],
)  # fmt: skip
def test_nsys_is_asked_for_the_reports_it_has(known: str, asked: list[str], tmp_path: Path) -> None:
    nsys = tmp_path / "nsys"
    nsys.write_text(NSYS % known)
    nsys.chmod(0o755)
    environment = {**os.environ, "NSYS": str(nsys), "PYTHON": "false", "OUT": str(tmp_path)}
    command = ["bash", "profiling/nsys.sh", "policy", "--steps", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "false -m profiling.run policy --steps 4" in done.stdout
    told = (tmp_path / "policy.txt").read_text().split()
    assert [word.partition("=")[2] for word in told if word.startswith("--report=")] == asked
    assert told[-1] == str(tmp_path / "policy.nsys-rep")


def test_run_captures_recording_and_replays(tmp_path: Path) -> None:
    trace, told = tmp_path / "trace.json", tmp_path / "told.json"
    settings = ["--engine", "graph", "--steps", "6", "--calls", "2"]
    run.main(["digits", *settings, "--trace", str(trace), "--json", str(told)])
    found = json.loads(told.read_text())
    assert found["report"]["engine"] == "loop graph"
    assert found["report"]["waves"] == len(found["widths"])
    events = json.loads(trace.read_text())["traceEvents"]
    # details follow a name in brackets
    names = [event["name"].partition(" (")[0] for event in events if event["ph"] == "X"]
    # one call records, two replay: the host sees no wave of those
    assert (names.count("call"), names.count("record")) == (3, 1)
    after = names[names.index("decode") :]
    assert {"replay 0", "replay 1"} <= set(after)
    assert not any(name.startswith("wave ") for name in after)


@pytest.mark.parametrize("arguments", [["--calls", "0"], ["--json", "no/such/folder.json"], ["--method", "none"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["digits", *arguments])
    assert ended.value.code == 2


def test_time_is_counted_once() -> None:
    assert busy.covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 5.0


def test_busy(tmp_path: Path) -> None:
    path = tmp_path / "busy.json"
    busy.main(["--workloads", "policy", "--steps", "4", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert [each["loop"] for each in results] == ["stock", *busy.LOOPS]
    for each in results:
        assert 0 < each["busy"] <= 1
        assert each["launched"] > 0
