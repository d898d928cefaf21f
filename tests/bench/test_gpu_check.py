"""The command for machines with a GPU, run without one; and its parts failing in every way that parts can."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.command import revision
from bench.gpu import gpu_check
from bench.gpu.gpu_check import Part

ROOT = Path(__file__).parents[2]
WRITES = "import sys, json; json.dump({'curves': []}, open(sys.argv[1], 'w'))"
SLEEPS = "import time; time.sleep(60)"


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return ("python", "-c", code, *arguments)


def run(every: list[Part], out: Path, budget: float = 60.0) -> dict[str, Any]:
    gpu_check.run(every, out, budget, {"commit": "of a test", "smoke": True})
    found: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return found


def script(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "bench/gpu_check.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_script_runs_its_parts_from_a_copy_of_the_code(tmp_path: Path) -> None:
    done = script(tmp_path, "--smoke", "--budget", "1500", "--parts", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    ended = {name: part["status"] for name, part in found["parts"].items()}
    assert ended == {"environment": "passed", "kernels": "passed"}
    assert found["parts"]["environment"]["result"]["torch"]
    told = (tmp_path / "summary.txt").read_text()
    assert "kernel_tests did not run" in told
    assert "wave_update" in told
    assert done.stdout.endswith(told)


class Accepted(Exception):
    """Arguments were read without a complaint."""


@pytest.mark.parametrize("smoke", [False, True], ids=["whole", "smoke"])
@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_commands_take_the_arguments_of_their_parts(
    gpu: bool, smoke: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they then do is looked at in the tests of each."""
    read = argparse.ArgumentParser.parse_args

    def only_read(self: argparse.ArgumentParser, *given: Any) -> None:
        read(self, *given)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_read)
    asked = []
    for part in gpu_check.parts(gpu, smoke):
        python, _, module, *arguments = part.command
        if python == "python" and module.startswith(("bench.", "profiling.")):
            given = [each.replace("{folder}", str(tmp_path)).replace("{out}", str(tmp_path)) for each in arguments]
            with pytest.raises(Accepted):
                importlib.import_module(module).main(given)
            asked.append(part.name)
    assert asked == [part.name for part in gpu_check.parts(gpu, smoke) if part.shows and part.program is None]


# whose commands no other test runs at this size, or that share the folder of the results
TOGETHER = ("environment", "kernel_tests", "gpu_tests", "rows", "peers_random", "profile", "nsys", "sanitizer")


@pytest.mark.exhaustive
def test_parts_of_many_kinds_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what torch.compile makes of networks is looked at where each part is tested
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    done = script(tmp_path, "--smoke", "--budget", "1500", "--parts", *TOGETHER)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert tuple(found["parts"]) == TOGETHER
    for name, part in found["parts"].items():
        programs = {"nsys": "nsys", "sanitizer": "compute-sanitizer"}
        assert part["status"] == "passed" or part["why"] == f"there is no {programs.get(name)}", part
        assert part["status"] != "passed" or part["result"] or name == "nsys"
    assert found["parts"]["kernel_tests"]["result"]["passed"] > 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) <= 8
    told = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(told) <= gpu_check.MOST_LINES
    for name, part in found["parts"].items():
        assert not part.get("printed") or any(line.startswith(f"--- {name}") for line in told)


def test_what_fails_loses_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing plugins takes longer than these tests
    tests, slow = tmp_path / "test_three.py", tmp_path / "test_slow.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_left(): pass\n"
    )
    slow.write_text(f"def test_good(): pass\ndef test_slow():\n    {SLEEPS}\n")
    (tmp_path / "test_absent.py").write_text("import no_such_package\n")
    pytest_on = ("python", "-m", "pytest", "-q", "--continue-on-collection-errors", "--junitxml={folder}/r.xml")
    result = "{folder}/result.json"
    half = python(f"print('begun', flush=True); {WRITES}; {SLEEPS}", result)
    expected = [
        (Part("raises", 20, python("print('begun'); raise SystemExit('the reason')")), "FAILED: exit status 1"),
        (Part("half", 3, half, "result.json"), "CUT SHORT: after 3 s"),
        (Part("silent", 20, python("pass"), "result.json"), "FAILED: it left no result: FileNotFoundError"),
        (Part("broken", 20, python("print('{')"), "stdout"), "FAILED: it left no result: JSONDecodeError"),
        (Part("absent", 20, ("/no/such/program",)), "FAILED: it could not be started: No such file or directory"),
        (Part("after", 20, python("pass"), needs="raises"), "left out: raises told nothing"),
        (Part("lacks", 20, python("pass"), program="no-such-program"), "left out: there is no no-such-program"),
        (Part("tests", 20, (*pytest_on, f"{tmp_path}/test_absent.py", str(tests)), "r.xml"), "FAILED: exit status 1"),
        (Part("slow_tests", 15, (*pytest_on, str(slow)), "r.xml"), "CUT SHORT: after 15 s"),
        (Part("of_slow", 20, python(WRITES, result), "result.json", needs="slow_tests"), "passed"),
        (Part("of_tests", 20, python("pass"), needs="tests"), "left out: tests failed"),
        (Part("of_others", 20, python("pass"), needs="not chosen"), "passed"),
        (Part("shown", 20, python("print('a table'); print(); print('of two lines')"), shows=True), "passed"),
    ]
    found = run([part for part, _ in expected], tmp_path)["parts"]
    for part, ended in expected:
        outcome = found[part.name]
        assert ": ".join(filter(None, (outcome["status"], outcome.get("why")))) == ended
    assert found["raises"]["last_words"] == ["the reason"]
    assert found["half"]["last_words"] == ["begun"]
    assert found["half"]["result"] == found["of_slow"]["result"] == {"curves": []}
    not_imported, failure = found["tests"]["result"].pop("failures")
    assert not_imported.endswith("test_absent")
    assert failure.endswith("test_three::test_bad")
    assert found["tests"]["result"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["slow_tests"]["result"] == {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    told = (tmp_path / "summary.txt").read_text()
    assert "FAILED: raises, exit status 1: the reason" in told
    assert "test_three::test_bad" in told
    assert "of_others: not chosen did not run" in told
    assert "--- shown\na table\nof two lines\n" in told
    assert re.search(r"^passed \(in s\): of_slow \d+, of_others \d+, shown \d+$", told, re.MULTILINE)
    assert "the reason" in (tmp_path / "logs.txt").read_text()


def test_all_parts_share_one_budget(tmp_path: Path) -> None:
    every = [Part("first", 2, python(SLEEPS)), Part("second", 40, python(SLEEPS))]
    found = run(every, tmp_path, budget=8.0)["parts"]
    assert found["first"]["why"] == "after 2 s"
    assert found["second"]["why"] == "too little time is left, pass --parts second"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_runs(tmp_path: Path, sent: signal.Signals) -> None:
    """And what that has started; all is told to ignore Ctrl-C, as in the background of a script."""
    told = tmp_path / "number"

    def wait_until(true: Callable[[], object]) -> None:
        until = time.monotonic() + 60
        while not true():
            assert time.monotonic() < until
            time.sleep(0.05)

    def runs(number: int) -> bool:  # one that has ended may still be in the table of processes
        stat = Path(f"/proc/{number}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    part = f"gpu_check.Part('environment', 60, ('python', '-c', {starts!r}))"
    main = f"gpu_check.main(['--smoke', '--out', {str(tmp_path)!r}])"
    code = f"from bench.gpu import gpu_check; gpu_check.parts = lambda *_: [{part}]; {main}"
    ignoring = f"trap '' INT; exec {shlex.join([sys.executable, '-c', code])}"
    process = subprocess.Popen(["bash", "-c", ignoring], cwd=ROOT)
    wait_until(lambda: told.exists() and told.read_text())
    number = int(told.read_text())
    process.send_signal(sent)
    assert process.wait(60) == 128 + sent
    wait_until(lambda: not runs(number))


def test_limits_keep_within_the_nine_minutes() -> None:
    every = gpu_check.parts(gpu=True, smoke=False)
    heading = (ROOT / "bench" / "gpu_check.sh").read_text()
    later = [names.split() for names in re.findall(r"--parts ([a-z_ ]+?)  +#", heading)]
    first = [part for part in every if part.name not in {*later[0], *later[1]}]
    second, third = ([every[0], *(part for part in every if part.name in names)] for names in later)
    assert every == [*first, *second[1:], *third[1:]]
    assert gpu_check.BUDGET <= 530
    # the script takes its own start off
    for call in (first, second, third):
        assert sum(part.seconds for part in call) <= gpu_check.BUDGET - 10
        written = {word for part in call for word in part.command if word.startswith("{out}/")}
        assert len(written) + sum(len(part.keeps) for part in call) + 3 <= 8, "few files, to be carried away"


def test_results_are_small_files(tmp_path: Path) -> None:
    sizes = {"small": 3, "large": gpu_check.LARGEST_FILE + 1, "other": 3}
    writes = f"import sys; [open(f'{{sys.argv[1]}}/{{name}}', 'w').write('x' * n) for name, n in {sizes}.items()]"
    noise = f"print('x' * {2 * gpu_check.LONGEST_LOG}); print('ended')"
    part = Part("writes", 20, python(f"{writes}; {noise}", "{folder}"), keeps=("small", "large", "absent"))
    run([part], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "logs.txt", "small", "summary.txt"]
    logs = (tmp_path / "logs.txt").read_text()
    assert len(logs) < 1.1 * gpu_check.LONGEST_LOG
    assert logs.endswith("\nended\n\n")


def test_a_summary_has_a_place_for_every_table() -> None:
    tables = {f"part {number}": ["x" * 1000] * number for number in (1, 3, 40, 50, 60)}
    parts = {
        name: {"status": "passed", "seconds": 1.0, "printed": table, "result": None} for name, table in tables.items()
    }
    parts["failed"] = {"status": "FAILED", "seconds": 1.0, "why": "exit status 1", "last_words": ["y" * 1000]}
    parts["failed"]["result"] = None
    told = gpu_check.summary({"parts": parts, "seconds": 5.0, "budget": 60.0})
    assert len(told) == gpu_check.MOST_LINES
    assert max(map(len, told)) == gpu_check.WIDTH
    assert sum(line.startswith("---") for line in told) == len(tables)
    assert "--- part 3" in told, "short ones are whole"
    assert sum("more lines in logs.txt" in line for line in told) == 3


def test_the_commit_is_told_or_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    assert revision(tmp_path) is None
    found = {"parts": {}, "seconds": 1.0, "budget": 2.0}
    assert "commit unknown;" in gpu_check.summary({**found, "commit": None})[1]
    monkeypatch.setenv("COMMIT", "0123abc")
    assert revision(tmp_path) == "0123abc"
    here = revision(ROOT)
    assert here is not None
    assert len(here.removesuffix("-dirty")) == 40


def test_wrong_calls_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "torch can use no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["--smoke", "--out", str(tmp_path), "--parts", "engine"])
    assert "invalid choice: 'engine'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_smoke_tests_take_every_kernel() -> None:
    """They are chosen by parts of names, and pytest ends well where some of these name no test."""
    sources = {path.stem: path.read_text() for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    for name in gpu_check.SMOKE_TESTS.split(" or "):
        assert any(f"def {name}" in source for source in sources.values()), name
    for kernel in ("test_wave_update", "test_fixed_point_wave", "test_secant_sweep"):
        assert any(f"def {name}" in sources[kernel] for name in gpu_check.SMOKE_TESTS.split(" or ")), kernel
