"""The command for machines with a GPU, run without one; and its parts failing in every way that parts can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import gpu_check, summary
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
    command = ["bash", "bench/gpu_check.sh", "--smoke", "--budget", "1500"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    # every part of the real run is tried here, at another size
    names = [part.name for part in gpu_check.parts(gpu=False, smoke=True)]
    assert sorted(names) == sorted(part.name for part in gpu_check.parts(gpu=True, smoke=False))
    assert list(found["parts"]) == names
    for name, part in found["parts"].items():
        assert part["status"] == "passed" or (name, part["why"]) == ("nsys", "there is no nsys"), part
        assert part["status"] != "passed" or part["result"], name
    assert [each["network"] for each in found["parts"]["rows"]["result"]["curves"]] == summary_networks()
    assert found["parts"]["kernel_tests"]["result"]["passed"] > 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

    told = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(told) <= summary.MOST_LINES
    assert done.stdout.endswith("\n".join(told) + "\n")
    assert not any("cannot be read" in line for line in told)
    for word in ("no GPU", "c(rows)", "kernels:", "GPU-busy", "engines:", "profile of", "peers:", " digits, 5 steps"):
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
    result = "{folder}/result.json"
    found = run(
        [
            Part("raises", 20, python("print('the reason'); raise SystemExit(3)")),
            Part("hangs", 1, python("import time; print('begun', flush=True); time.sleep(60)")),
            Part("half", 2, python(f"{WRITES}; import time; time.sleep(60)", result), "result.json"),
            Part("silent", 20, python("pass"), "result.json"),
            Part("broken", 20, python("import sys; open(sys.argv[1], 'w').write('{')", result), "result.json"),
            Part("absent", 20, ("/no/such/program",)),
            Part("after", 20, python("pass"), needs="raises"),
            Part("needs", 20, python("pass"), program="no-such-program"),
            Part("tests", 20, ("python", "-m", "pytest", "-q", "--junitxml={folder}/r.xml", str(tests)), "r.xml"),
            Part("rows", 20, python(WRITES, result), "result.json"),
            Part("good", 20, python("import os; assert os.environ['AT'][0] == '/'"), environment={"AT": "{out}"}),
        ],
        tmp_path,
    )  # fmt: skip
    ended = {name: (part["status"], part.get("why")) for name, part in found["parts"].items()}
    assert ended == {
        "raises": ("FAILED", "exit status 3"),
        "hangs": ("CUT SHORT", "after 1 s"),
        "half": ("CUT SHORT", "after 2 s"),
        "silent": ("FAILED", "it left no result: FileNotFoundError"),
        "broken": ("FAILED", "it left no result: JSONDecodeError"),
        "absent": ("FAILED", "it could not be started: No such file or directory"),
        "after": ("left out", "raises did not pass"),
        "needs": ("left out", "there is no no-such-program"),
        "tests": ("FAILED", "exit status 1"),
        "rows": ("passed", None),
        "good": ("passed", None),
    }
    assert found["parts"]["raises"]["last_words"] == ["the reason"]
    assert found["parts"]["hangs"]["last_words"] == ["begun"]
    assert found["parts"]["half"]["result"] == found["parts"]["rows"]["result"] == {"curves": []}
    (failure,) = found["parts"]["tests"]["result"].pop("failures")
    assert failure.endswith(f"{tests.stem}::test_bad")
    assert found["parts"]["tests"]["result"] == {"passed": 1, "failed": 1, "skipped": 1}
    told = (tmp_path / "summary.txt").read_text()
    assert "FAILED: raises, exit status 3: the reason" in told
    assert "test_three::test_bad" in told
    assert "passed (in s): rows" in told
    assert "the reason" in (tmp_path / "logs.txt").read_text()


def test_all_parts_share_one_budget(tmp_path: Path) -> None:
    sleeps = python("import time; time.sleep(60)")
    found = run([Part("first", 2, sleeps), Part("second", 60, sleeps), Part("third", 60, sleeps)], tmp_path, budget=6.0)
    assert found["parts"]["first"]["why"] == "after 2 s"
    assert found["parts"]["second"]["why"] == "after 4 s"
    assert found["parts"]["third"]["why"] == "no time is left"
    assert found["seconds"] < 8


def test_limits_keep_within_the_nine_minutes() -> None:
    every = gpu_check.parts(gpu=True, smoke=False)
    assert gpu_check.BUDGET <= 535
    first = every[:5]
    assert {"rows", "kernel_tests", "peers_digits", "gpu_tests"} <= {part.name for part in first}
    assert sum(part.seconds for part in first) <= gpu_check.BUDGET


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


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no part engine\. .* Take of environment, "):
        gpu_check.main(["--out", str(tmp_path), "--parts", "engine"])
