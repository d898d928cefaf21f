"""The command for machines with a GPU, run without one; and its parts failing in every way that parts can."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import gpu_check, layout, summary
from bench.gpu_check import Part

ROOT = Path(__file__).parents[1]
WRITES = "import sys, json; json.dump({'curves': []}, open(sys.argv[1], 'w'))"


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return ("python", "-c", code, *arguments)


def run(every: list[Part], out: Path, budget: float = 60.0) -> dict[str, Any]:
    gpu_check.run(every, out, budget, {"commit": "of a test", "smoke": True})
    found: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return found


@pytest.mark.slow
def test_the_whole_at_the_smallest_size(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    refused = subprocess.run(["bash", "bench/gpu_check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert time.monotonic() - started < 60
    command = ["bash", "bench/gpu_check.sh", "--smoke", "--budget", "1500"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    # every part of the real run is tried here, at another size
    names = [part.name for part in gpu_check.parts(gpu=False, smoke=True)]
    assert sorted(names) == sorted(part.name for part in gpu_check.parts(gpu=True, smoke=False))
    assert list(found["parts"]) == names
    for name, part in found["parts"].items():
        programs = {"nsys": "nsys", "sanitizer": "compute-sanitizer"}
        assert part["status"] == "passed" or part["why"] == f"there is no {programs.get(name)}", part
        assert part["status"] != "passed" or part["result"], name
    assert [each["network"] for each in found["parts"]["rows"]["result"]["curves"]] == summary_networks()
    assert found["parts"]["kernel_tests"]["result"]["passed"] > 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) <= 8

    told = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(told) <= summary.MOST_LINES
    assert done.stdout.endswith("\n".join(told) + "\n")
    assert not any("cannot be read" in line for line in told)
    for word in (
        "no GPU",
        "switches:",
        "c(rows)",
        "kernels:",
        "GPU-busy",
        "engines:",
        "profile of",
        "peers:",
        " digits, 5 steps",
    ):
        assert any(word in line for line in told), word

    # a larger one has as many lines at most: more of everything, and a third of the parts failed
    for number, part in enumerate(list(found["parts"].values())):
        if number % 3 == 2:
            part |= {"status": "FAILED", "why": "exit status 1", "last_words": ["x" * 1000]}
        for key, value in (part["result"] or {}).items():
            if isinstance(value, list):
                part["result"][key] = value * 12
    assert len(summary.lines(found)) == summary.MOST_LINES
    assert max(map(len, summary.lines(found))) <= summary.WIDTH


def summary_networks() -> list[str]:
    from bench.rows import NETWORKS

    return list(NETWORKS)


def test_what_fails_loses_only_itself(tmp_path: Path) -> None:
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_left(): pass\n"
    )
    absent = tmp_path / "test_absent.py"
    absent.write_text("import no_such_package\n")
    pytest_on = ("python", "-m", "pytest", "-q", "--continue-on-collection-errors", "--junitxml={folder}/r.xml")
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(60)\n")
    result = "{folder}/result.json"
    found = run(
        [
            Part("raises", 20, python("print('the reason'); raise SystemExit(3)")),
            Part("hangs", 3, python("import time; print('begun', flush=True); time.sleep(60)")),
            Part("half", 3, python(f"{WRITES}; import time; time.sleep(60)", result), "result.json"),
            Part("silent", 20, python("pass"), "result.json"),
            Part("broken", 20, python("import sys; open(sys.argv[1], 'w').write('{')", result), "result.json"),
            Part("absent", 20, ("/no/such/program",)),
            Part("after", 20, python("pass"), needs="raises"),
            Part("needs", 20, python("pass"), program="no-such-program"),
            Part("tests", 20, (*pytest_on, str(absent), str(tests)), "r.xml"),
            Part("slow_tests", 10, (*pytest_on, str(slow)), "r.xml"),
            Part("of_slow", 20, python(WRITES, result), "result.json", needs="slow_tests"),
            Part("of_tests", 20, python("pass"), needs="tests"),
            Part("of_others", 20, python(WRITES, result), "result.json", needs="not chosen"),
            Part("rows", 20, python(WRITES, result), "result.json"),
            Part("good", 20, python("import os; assert os.environ['AT'][0] == '/'"), environment={"AT": "{out}"}),
        ],
        tmp_path,
    )  # fmt: skip
    ended = {name: (part["status"], part.get("why")) for name, part in found["parts"].items()}
    assert ended == {
        "raises": ("FAILED", "exit status 3"),
        "hangs": ("CUT SHORT", "after 3 s"),
        "half": ("CUT SHORT", "after 3 s"),
        "silent": ("FAILED", "it left no result: FileNotFoundError"),
        "broken": ("FAILED", "it left no result: JSONDecodeError"),
        "absent": ("FAILED", "it could not be started: No such file or directory"),
        "after": ("left out", "raises told nothing"),
        "needs": ("left out", "there is no no-such-program"),
        "tests": ("FAILED", "exit status 1"),
        "slow_tests": ("CUT SHORT", "after 10 s"),
        "of_slow": ("passed", None),
        "of_tests": ("left out", "tests failed"),
        "of_others": ("passed", None),
        "rows": ("passed", None),
        "good": ("passed", None),
    }
    assert found["parts"]["raises"]["last_words"] == ["the reason"]
    assert found["parts"]["hangs"]["last_words"] == ["begun"]
    assert found["parts"]["half"]["result"] == found["parts"]["rows"]["result"] == {"curves": []}
    not_imported, failure = found["parts"]["tests"]["result"].pop("failures")
    assert not_imported.endswith(absent.stem)
    assert failure.endswith(f"{tests.stem}::test_bad")
    assert found["parts"]["tests"]["result"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["parts"]["slow_tests"]["result"] == {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    told = (tmp_path / "summary.txt").read_text()
    assert "FAILED: raises, exit status 3: the reason" in told
    assert "test_three::test_bad" in told
    assert "test_absent" in told
    assert "of_others: not chosen was not run" in told
    assert "of_slow: " not in told
    assert re.search(r"^passed \(in s\): of_slow \d+, of_others \d+, rows \d+, good \d+$", told, re.MULTILINE)
    assert "the reason" in (tmp_path / "logs.txt").read_text()


def test_all_parts_share_one_budget(tmp_path: Path) -> None:
    sleeps = python("import time; time.sleep(60)")
    every = [Part("first", 4, sleeps), Part("second", 8, sleeps), Part("third", 8, sleeps)]
    found = run(every, tmp_path, budget=9.0)
    assert found["parts"]["first"]["why"] == "after 4 s"
    left = re.fullmatch(r"after (\d) s", found["parts"]["second"]["why"])
    assert left is not None
    assert 4 <= int(left[1]) <= 6
    assert found["parts"]["third"]["why"] == "too little time is left, pass --parts third"
    assert 6 < found["seconds"] < 12


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_runs(tmp_path: Path, sent: signal.Signals) -> None:
    """And what that has started; all is told to ignore Ctrl-C, as in the background of a script."""
    told = tmp_path / "number"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    code = (
        "import pathlib; from bench.gpu_check import Part, run; "
        f"run([Part('starts', 60, ('python', '-c', {starts!r}))], pathlib.Path({str(tmp_path)!r}), 60.0, {{}})"
    )
    ignoring = f"trap '' INT; exec {shlex.join([sys.executable, '-c', code])}"
    process = subprocess.Popen(["bash", "-c", ignoring], cwd=ROOT)
    until = time.monotonic() + 30
    while not (told.exists() and told.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    number = int(told.read_text())
    process.send_signal(sent)
    assert process.wait(20) == 128 + sent
    until = time.monotonic() + 10
    while _runs(number) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(number)


def _runs(number: int) -> bool:
    """Whether there is such a process that has not ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def test_limits_keep_within_the_nine_minutes() -> None:
    every = gpu_check.parts(gpu=True, smoke=False)
    later = gpu_check.SECOND_CALL, gpu_check.THIRD_CALL
    first = [part for part in every if part.name not in {*later[0], *later[1]}]
    second, third = ([every[0], *(part for part in every if part.name in names)] for names in later)
    assert every == [*first, *second[1:], *third[1:]]
    assert gpu_check.BUDGET <= 530
    # the script takes its own start off
    for call in (first, second, third):
        assert sum(part.seconds for part in call) <= gpu_check.BUDGET - 10
    for names in later:
        assert f"--parts {' '.join(names)} " in (ROOT / "bench" / "gpu_check.sh").read_text()


def test_it_takes_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "torch can use no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_result_of_another_form_is_told_of() -> None:
    told = summary.lines({"parts": {"rows": {"status": "passed", "seconds": 1.0, "result": {"curves": [{}]}}}})
    assert any("rows: its result cannot be read" in line for line in told)


def test_a_recording_of_nsight_is_read(tmp_path: Path) -> None:
    """As profiling/nsys.sh leaves it: from a recording that is kept for the tests of the report."""
    recording = ROOT / "tests" / "data" / "nsys-eager.sqlite"
    command = ("python", "-m", "profiling.report", str(recording), "--json", "{out}/digits.json")
    found = run([Part("nsys", 60, command, "{out}/digits.json")], tmp_path)
    call = found["parts"]["nsys"]["result"]["calls"][-1]
    told = (tmp_path / "summary.txt").read_text()
    assert (
        f"a call of digits (host times): {call['wall_ms']:.2f} ms, overhead {call['overhead']:.2f}; digits.txt" in told
    )


def test_time_that_is_spared_goes_to_what_comes_after(tmp_path: Path) -> None:
    """And of what comes later each keeps its own; what cannot run keeps none."""
    waits = python("import time; time.sleep(1.5)")
    every = [
        Part("quick", 2, python("pass")),
        Part("longer", 1, waits),
        Part("lacking", 30, waits, program="no-such-program"),
        Part("last", 1, python("import time; time.sleep(60)")),
    ]
    found = run(every, tmp_path, budget=4.0)["parts"]
    assert [found[name]["status"] for name in ("quick", "longer", "last")] == ["passed", "passed", "CUT SHORT"]
    assert 1 < found["last"]["seconds"] < 3


def test_results_are_few_and_small_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = gpu_check.parts(gpu=True, smoke=False)
    for call in (set(gpu_check.SECOND_CALL), {part.name for part in every} - {*gpu_check.SECOND_CALL}):
        parts = [part for part in every if part.name in call]
        written = {word for part in parts for word in part.command if word.startswith("{out}/")}
        assert len(written) + sum(len(part.keeps) for part in parts) + 3 <= 8
        assert {"{out}"} & {part.environment.get("OUT") for part in parts} == set()
    writes = "import sys; [open(f'{sys.argv[1]}/{name}', 'w').write('x' * size) for name, size in "
    sizes = [("small", 3), ("large", gpu_check.LARGEST_FILE + 1), ("other", 3)]
    noise = f"; print('begun'); print('x' * {2 * gpu_check.LONGEST_LOG}); print('ended')"
    part = Part("writes", 20, python(f"{writes}{sizes}]{noise}", "{folder}"), keeps=("small", "large", "absent"))
    out = tmp_path / "out"
    out.mkdir()
    run([part], out)
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "logs.txt", "small", "summary.txt"]
    assert "writes: large is not kept, it has 15 MiB" in capsys.readouterr().out
    logs = (out / "logs.txt").read_text()
    assert len(logs) < 1.1 * gpu_check.LONGEST_LOG
    assert logs.startswith("===== writes\nbegun\n")
    assert logs.endswith("\nended\n\n")


def test_tests_run_side_by_side_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((2, None), (4, 2), (64, gpu_check.MOST_WORKERS)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        every = {part.name: part.command for part in gpu_check.parts(gpu=True, smoke=False)}
        for name in ("kernel_tests", "gpu_tests"):
            command = every[name]
            assert (command[command.index("-n") + 1] if "-n" in command else None) == (workers and str(workers))
        assert "-n" not in every["sanitizer"]


def test_the_commit_is_told_or_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    assert (layout.revision(tmp_path), layout.is_dirty(tmp_path)) == (None, None)
    assert "commit unknown;" in summary.lines({"parts": {}, "commit": None})[1]
    monkeypatch.setenv("COMMIT", "0123abc")
    assert layout.revision(tmp_path) == "0123abc"
    assert "commit 0123abc with changes;" in summary.lines({"parts": {}, "commit": "0123abc", "dirty": True})[1]


def test_kernels_are_summed_up() -> None:
    """As a GPU would have them; the last was not compiled."""
    us = 1e-6
    rows = [
        {"operation": name, "size": size, "rows": 10, "seconds": 5 * us, "eager": 50 * us, "compiled": slow,
         "bytes_per_second": 2.7e12, "of_copy": 0.9, "called": 9 * us}
        for name, slow in (("wave_update", 20 * us), ("fixed_point_wave", None))
        for size in ("SD latent", "64 MB")
    ]  # fmt: skip
    told = summary.SECTIONS["kernels"]({"copy_bytes_per_second": 3e12, "rows": rows})
    assert "3000 GB/s" in told[0]
    assert told[1].startswith(
        "  wave_update   SD latent 0.90, 64 MB 0.90; 10 rows 5.0 us (50.0, 20.0); x eager 10.0 10.0"
    )
    assert told[1].endswith("; x compiled 4.0 4.0")
    assert "10 rows 5.0 us (50.0, -); x eager 10.0 10.0; x compiled - -" in told[2]


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no part engine\. .* Take of environment, "):
        gpu_check.main(["--smoke", "--out", str(tmp_path), "--parts", "engine"])
