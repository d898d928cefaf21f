"""The parts of bench/gpu_check.sh: each in a process of its own, with a time limit; one that fails loses only itself.

All parts share one budget: a part is left out if less than half of its limit is left. Those of the first call fit into
it together; the rest is for a second and a third one. What is known is written after every part. Only the standard
library is needed, so that a broken installation is reported like anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

from bench.command import revision

BUDGET = 530.0
# seconds that a part has to end by itself after it was interrupted; less of a short one
GRACE = 10.0
# of the summary
MOST_LINES, WIDTH = 60, 180
# characters of what a part printed, and bytes of a file: results are few and small files, to be carried away
LONGEST_LOG, LARGEST_FILE = 1_000_000, 15 * 2**20
# processes of pytest that share the GPU: tests wait for the host, which launches and compiles
MOST_WORKERS = 8
# one of each kernel
SMOKE_TESTS = "test_the_same_bits or test_two_calls_give_the_same_bits or test_what_does_not_move_is_stationary"


class Part(NamedTuple):
    """One thing to find out.

    Attributes:
        command: {folder} is a folder of its own, {out} that of the results.
        result: file in its folder with its figures: JSON, or .xml of pytest; what it prints is in "stdout".
        needs: a part that must have run without a failed test, if it is chosen too.
        keeps: files of its folder that belong to the results, those that are there and not too large.
        shows: what it prints belongs to the summary.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    result: str | None = None
    needs: str | None = None
    program: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012
    keeps: tuple[str, ...] = ()
    shows: bool = False


def parts(gpu: bool, smoke: bool) -> list[Part]:
    """All of them: of the first call, the second and the third, in each those that matter most first.

    Without a GPU kernels are interpreted; smoke: the smallest size of everything.
    """

    def part(name: str, seconds: float, command: str, *more: str, **rest: Any) -> Part:
        return Part(name, 300 if smoke else seconds, (*shlex.split(command), *more), **rest)

    def bench(name: str, seconds: float, module: str, full: str = "", small: str = "", **rest: Any) -> Part:
        command = f"python -m {module} --json {{folder}}/result.json {small if smoke else full}"
        return part(name, seconds, command, result="result.json", shows=True, **rest)

    def tests(name: str, seconds: float, *arguments: str, **rest: Any) -> Part:
        # a file that cannot be imported is one failure, and the others run
        quiet = "python -m pytest -q -p no:cacheprovider --junitxml={folder}/result.xml --continue-on-collection-errors"
        return part(name, seconds, quiet, *arguments, result="result.xml", **rest)

    workers = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    parallel = gpu and not smoke and workers > 1 and find_spec("xdist") is not None
    side_by_side = ("-n", str(workers)) if parallel else ()
    some = ("-k", SMOKE_TESTS) if smoke else ()
    files = [path for path in sorted(Path("tests").rglob("test_*.py")) if path.parent.name != "kernels"]
    chosen = [path for path in files if path.name == "test_gpu.py" or (not smoke and "mark.gpu" in path.read_text())]
    drawn = "--picture {out}/rows.png" if find_spec("matplotlib") is not None else ""
    traced = "digits --engine graph --trace {folder}/trace.json"
    # every kernel once, at its smallest
    once = tests("sanitizer", 240, "tests/kernels", "-k", SMOKE_TESTS)
    # torch and Triton ask the driver for what it may lack, which is no error of a kernel
    checked = (*shlex.split("compute-sanitizer --report-api-errors no --error-exitcode 1"), *once.command)
    # every tensor an allocation of its own: beyond a tensor in a block of torch's lies another one
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    peers, engines, policy, few = "bench.quality.peers", "bench.speed.engines", "--workloads policy", "--samples 4"
    return [
        part("environment", 20, "python -m srds_fast.cli env --json", result="stdout"),
        tests("kernel_tests", 70, *side_by_side, "tests/kernels", *some,
              environment={} if gpu else {"TRITON_INTERPRET": "1"}),
        tests("gpu_tests", 80, *side_by_side, "-m", "gpu", *map(str, chosen)),
        # the network that takes longest last
        bench("rows", 85, "bench.speed.rows", f"--networks digits policy sd15 dit sdxl {drawn}", f"--rows 1 2 {drawn}"),
        bench("kernels", 75, "bench.speed.kernels", needs="kernel_tests"),
        bench("peers_digits", 120, peers, f"--workloads digits --steps 50 {few}", "--smoke --workloads digits"),
        # not sd15 in the smoke run: with diffusers' ParaDiGMS it takes a CPU longer
        bench("peers_random", 70, peers, f"--workloads sd15 --steps 25 --no-compile {few}", "--smoke --workloads dit"),
        bench("busy", 60, "profiling.busy", "", policy),
        bench("profile", 60, "profiling.run", traced, f"{traced} --steps 6 --calls 1", keeps=("trace.json",)),
        part("nsys", 60, "bash profiling/nsys.sh digits --engine graph --steps 25", program="nsys",
             environment={"OUT": "{folder}"}, keeps=("digits.nsys-rep", "digits.txt"), shows=True),
        bench("engines", 150, engines, "--workloads digits policy sd15 dit --repeat 3 --steps 25", policy),
        bench("peers_policy", 150, peers, f"{policy} --steps 100 --training-steps 500 {few}", f"--smoke {policy}"),
        bench("switches", 240, engines, "--switches --workloads digits sd15 --steps 25 --repeat 9",
              "--switches --workloads dit --steps 4"),
        once._replace(command=checked, program="compute-sanitizer", environment=alone),
    ]  # fmt: skip


def run(every: Sequence[Part], out: Path, budget: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Run the parts in turn, within `budget` seconds, and write what is known, with these facts, after each."""
    begun = time.monotonic()
    found: dict[str, Any] = {**facts, "budget": budget, "parts": {}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, (out / "logs.txt").open("w") as logs:
        for part in every:
            folder = Path(temporary) / part.name
            folder.mkdir()
            left = budget - (time.monotonic() - begun)
            if why_not := _why_not(part, found["parts"], left):
                outcome = {"status": "left out", "why": why_not, "seconds": 0.0, "result": None}
            else:
                outcome = _ran(part, min(left, part.seconds), folder, out)
                printed = "".join((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
                logs.write(f"===== {part.name}\n{printed[-LONGEST_LOG:]}\n")
                logs.flush()
                for file in (folder / name for name in part.keeps):
                    if file.is_file() and file.stat().st_size <= LARGEST_FILE:
                        shutil.copy(file, out)
            if part.needs is not None and part.needs not in {each.name for each in every}:
                outcome["untested"] = part.needs
            found["parts"][part.name] = outcome
            found["seconds"] = time.monotonic() - begun
            print(f"{part.name}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
            (out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
            (out / "summary.txt").write_text("\n".join(summary(found)) + "\n")
    return found


def _why_not(part: Part, before: dict[str, Any], left: float) -> str | None:
    if part.program is not None and shutil.which(part.program) is None:
        return f"there is no {part.program}"
    if part.needs in before:
        needed = before[part.needs]
        if not needed["result"]:
            return f"{part.needs} told nothing"
        if needed["status"] == "FAILED" or needed["result"].get("failed"):
            return f"{part.needs} failed"
    return f"too little time is left, pass --parts {part.name}" if left < part.seconds / 2 else None


def _ran(part: Part, seconds: float, folder: Path, out: Path) -> dict[str, Any]:

    def filled(text: str) -> str:
        return text.replace("{folder}", str(folder)).replace("{out}", str(out))

    command = [sys.executable if word == "python" else filled(word) for word in part.command]
    environment = {**os.environ, **{name: filled(value) for name, value in part.environment.items()}}
    begun = time.monotonic()
    status, why = _ended(command, environment, folder, seconds)
    outcome: dict[str, Any] = {"seconds": time.monotonic() - begun, "result": None}
    try:
        outcome["result"] = _read(folder / part.result) if part.result is not None else None
    except (OSError, ValueError, ElementTree.ParseError) as error:
        if status == "passed":
            status, why = "FAILED", f"it left no result: {type(error).__name__}"
    texts = [(folder / name).read_text(errors="replace").splitlines() for name in ("stdout", "stderr")]
    printed, errors = ([line.rstrip() for line in lines if line.strip()] for lines in texts)
    if status != "passed":
        outcome |= {"why": why, "last_words": ((errors if status == "FAILED" else []) or printed)[-12:]}
    if part.shows:
        outcome["printed"] = printed[:MOST_LINES]
    return {"status": status, **outcome}


def _ended(command: list[str], environment: dict[str, str], folder: Path, seconds: float) -> tuple[str, str | None]:
    """Status, and why it did not pass."""
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        try:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
        except OSError as error:
            return "FAILED", f"it could not be started: {error.strerror}"
        grace = min(GRACE, seconds / 4)
        try:
            code = process.wait(seconds - grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            return "CUT SHORT", f"after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
    return ("passed", None) if code == 0 else ("FAILED", f"exit status {code}")


def _read(path: Path) -> Any:
    """JSON, or pytest's report: how many tests ended how, and which failed."""
    if path.suffix != ".xml":
        return json.loads(path.read_text())
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    # by its own numbers: a test that was interrupted is among the cases and looks like one that passed
    tests, failures, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    bad = [case for case in suite.iter("testcase") if {child.tag for child in case} & {"failure", "error"}]
    # a file that cannot be imported has no class
    names = ["::".join(filter(None, (case.get("classname"), case.get("name")))) for case in bad]
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped, "failures": names}


def summary(found: dict[str, Any]) -> list[str]:
    """How every part ended, then the tables they printed. Tables that do not fit are cut, the longest first."""
    ended = found["parts"]
    where = ended.get("environment", {}).get("result") or {}
    devices = [f"{each['name']}, driver {each['driver']}" for each in where.get("cuda_devices", [])]
    device = devices[0] if devices else "no GPU: tiny networks on a CPU, the figures mean nothing"
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "diffusers") if where.get(name))
    sizes = ", the smallest sizes (--smoke)" if found.get("smoke") else ""
    good = ", ".join(f"{name} {part['seconds']:.0f}" for name, part in ended.items() if part["status"] == "passed")
    shown = [
        f"{device}; {versions}",
        f"commit {found.get('commit') or 'unknown'}{sizes}; {found['seconds']:.0f} s of {found['budget']:.0f}",
        f"passed (in s): {good or 'nothing'}",
    ]
    for name, part in ended.items():
        if part["status"] != "passed":
            shown.append(": ".join([part["status"], f"{name}, {part['why']}", *part.get("last_words", [])[-1:]]))
        if part.get("untested"):
            shown.append(f"{name}: {part['untested']} did not run, so what was timed may be wrong")
        result = part["result"] or {}
        if "failures" in result:
            shown.append(f"{name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
            shown += [f"  {failure}" for failure in result["failures"][:3]]
    tables = {name: part["printed"] for name, part in ended.items() if part.get("printed")}
    wanted = {name: len(table) for name, table in tables.items()}
    while wanted and sum(wanted.values()) + len(wanted) > MOST_LINES - len(shown) and max(wanted.values()) > 1:
        wanted[max(wanted, key=lambda name: wanted[name])] -= 1
    for name, table in tables.items():
        cut = len(table) - wanted[name]
        shown += [f"--- {name}{f' ({cut} more lines in logs.txt)' if cut else ''}", *table[: wanted[name]]]
    return [line[:WIDTH] for line in shown[:MOST_LINES]]


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a part failed or was cut short, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="bash bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the smallest size of everything, on a CPU too")
    names = [part.name for part in parts(False, True)]
    parser.add_argument("--parts", nargs="*", choices=names, default=names, help="these only, and the environment")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--gpu", action="store_true", help="there is one")
    options = parser.parse_args(arguments)
    if not options.gpu and not options.smoke:
        parser.error(
            "torch can use no GPU here: torch.cuda.is_available() is false, or torch cannot be imported (see above). "
            "Name a Python whose torch has one in PYTHON=..., or pass --smoke to see that everything runs."
        )
    chosen = [part for part in parts(options.gpu, options.smoke) if part.name in ("environment", *options.parts)]

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)  # which also ends the part that runs

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    # of the working folder: the code has been laid out elsewhere
    facts = {"commit": revision(Path.cwd()), "smoke": options.smoke, "gpu": options.gpu}
    found = run(chosen, options.out, options.budget, facts)
    print((options.out / "summary.txt").read_text(), end="")
    return int(any(part["status"] in ("FAILED", "CUT SHORT") for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
