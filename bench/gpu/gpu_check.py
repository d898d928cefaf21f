"""The parts of bench/gpu_check.sh: each in a process of its own, with a time limit; what fails loses only itself.

Run by the script, which lays the package out. Parts that matter most come first, and all of them share one budget: a
part gets its own limit and what those before it have spared, or the time that is left, and is left out if that is less
than half of its limit. Those of the first call fit into it together; the rest is for a second and a third one. After
every part what is known is written: gpu_check.json (of each part how it ended and the JSON it wrote), summary.txt (60
lines at most) and logs.txt (what was printed). Only the standard library is imported, so that a broken installation is
reported like anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn
from xml.etree import ElementTree

from .layout import is_dirty, revision
from .summary import lines

BUDGET = 530.0
# of its limit: a part is not begun with less
LEAST_SHARE = 0.5
# seconds of its limit, or a quarter of a short one, that a part has to end by itself after it was interrupted
GRACE = 10.0
LAST_WORDS = 12
# of what a part printed: its first and its last characters
LONGEST_LOG = 1_000_000
# of the results: few and small files, to be carried away
LARGEST_FILE = 15 * 2**20
# of what nsys.sh writes: the figures are in gpu_check.json, the database is made of the recording
RECORDING = ("digits.nsys-rep", "digits.txt", "digits.png")
TRACE = ("trace.json",)
# processes of pytest that share the GPU: tests wait for the host, which launches and compiles
MOST_WORKERS = 8
# at the smallest size all parts take about a minute and a half together, on a machine that does nothing else
SMOKE_SECONDS = 300
SMOKE_TESTS = "test_a_kernel_runs or test_one_element"
GPU_TESTS = ("gpu", "gpu_graphs", "gpu_methods", "gpu_telemetry", "faster", "registry")
# of the command that is told of in the script's heading
SECOND_CALL = ("busy", "profile", "nsys", "engines", "peers_policy")
THIRD_CALL = ("switches", "sanitizer")


class Part(NamedTuple):
    """One thing to find out.

    Attributes:
        name: of it.
        seconds: at most.
        command: its arguments; {folder} is a folder of its own, {out} that of the results.
        result: file that it writes, in its folder if not told: .json, or .xml of pytest.
        needs: a part that must have run, if it is one of those chosen, with no test that failed.
        program: that must be there.
        environment: set for it.
        keeps: files of its folder that belong to the results, those that are there and not too large.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    result: str | None = None
    needs: str | None = None
    program: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012
    keeps: tuple[str, ...] = ()


def parts(gpu: bool, smoke: bool) -> list[Part]:
    """All of them, those that matter most first: of the first call, the second and the third. All have the environment.

    Args:
        gpu: there is one; without it kernels are interpreted.
        smoke: the smallest size of everything.
    """

    def bench(name: str, seconds: float, *arguments: str, module: str | None = None, needs: str | None = None) -> Part:
        command = ("python", "-m", f"bench.{module or name}", "--json", "{folder}/result.json", *arguments)
        return Part(name, seconds, command, "result.json", needs)

    def tests(name: str, seconds: float, *arguments: str, **environment: str) -> Part:
        quiet = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={folder}/result.xml")
        # a file that cannot be imported is one failure, and the others run
        command = (*quiet, "--continue-on-collection-errors", *arguments)
        return Part(name, seconds, command, "result.xml", environment=environment)

    workers = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    parallel = gpu and workers > 1 and importlib.util.find_spec("xdist") is not None
    side_by_side = ("-n", str(workers)) if parallel else ()
    interpreted = {} if gpu else {"TRITON_INTERPRET": "1"}
    of_the_gpu = ("-m", "gpu", *(f"tests/test_{name}.py" for name in GPU_TESTS))
    profiled = ("python", "-m", "profiling.run", "digits", "--engine", "graph", "--json", "{folder}/result.json")
    traced = (*profiled, "--trace", "{folder}/trace.json")
    recorded = ("bash", "profiling/nsys.sh", "digits", "--engine", "graph", "--steps", "25")
    nsys = Part("nsys", 60, recorded, "digits.json", program="nsys", environment={"OUT": "{folder}"}, keeps=RECORDING)
    # every kernel once, at its smallest
    once = tests("sanitizer", 240, "tests/kernels", "-k", SMOKE_TESTS)
    # torch and Triton ask the driver for what it may lack, which is no error of a kernel
    checked = ("compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "1", *once.command)
    # every tensor an allocation of its own: in a block of torch's, what lies beyond a tensor is another one
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = once._replace(command=checked, program="compute-sanitizer", environment=alone)
    drawn = ("--picture", "{out}/rows.png") if importlib.util.find_spec("matplotlib") is not None else ()
    environment = Part("environment", 20, ("python", "-m", "bench.where", "{folder}/result.json"), "result.json")
    if smoke:
        return [
            environment,
            tests("kernel_tests", SMOKE_SECONDS, "tests/kernels", "-k", SMOKE_TESTS, **interpreted),
            tests("gpu_tests", SMOKE_SECONDS, "-m", "gpu", "tests/test_gpu.py"),
            bench("rows", SMOKE_SECONDS, "--rows", "1", "2", *drawn),
            bench("kernels", SMOKE_SECONDS, needs="kernel_tests"),
            bench("peers_digits", SMOKE_SECONDS, "--smoke", "--workloads", "digits", module="peers"),
            # not sd15, which takes a CPU three times as long
            bench("peers_random", SMOKE_SECONDS, "--smoke", "--workloads", "dit", module="peers"),
            bench("busy", SMOKE_SECONDS, "--workloads", "policy"),
            Part("profile", SMOKE_SECONDS, (*traced, "--steps", "6", "--calls", "1"), "result.json", keeps=TRACE),
            nsys,
            bench("engines", SMOKE_SECONDS, "--workloads", "policy"),
            bench("peers_policy", SMOKE_SECONDS, "--smoke", "--workloads", "policy", module="peers"),
            bench("switches", SMOKE_SECONDS, "--workloads", "dit", "--switches", "late stop", "--repeat", "1"),
            sanitizer,
        ]
    few, short = ("--samples", "4"), ("--training-steps", "500")
    without_sdxl = ("--workloads", "digits", "policy", "sd15", "dit")
    return [
        environment,
        tests("kernel_tests", 70, *side_by_side, "tests/kernels", **interpreted),
        tests("gpu_tests", 80, *side_by_side, *of_the_gpu),
        # what takes longest last
        bench("rows", 85, "--networks", "digits", "policy", "sd15", "dit", "sdxl", *drawn),
        bench("kernels", 75, needs="kernel_tests"),
        bench("peers_digits", 120, "--workloads", "digits", "--steps", "50", *few, module="peers"),
        bench("peers_random", 70, "--workloads", "sd15", "--steps", "25", "--no-compile", *few, module="peers"),
        bench("busy", 60),
        Part("profile", 60, traced, "result.json", keeps=TRACE),
        nsys,
        bench("engines", 150, *without_sdxl, "--repeat", "3", "--steps", "25"),
        bench("peers_policy", 150, "--workloads", "policy", "--steps", "100", *short, *few, module="peers"),
        bench("switches", 240),
        sanitizer,
    ]


def run(every: Sequence[Part], out: Path, budget: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Run the parts in turn, and write what is known after each.

    A SIGINT or SIGTERM ends the part that runs, and raises SystemExit.

    Args:
        budget: seconds for all.
        facts: to be written with the rest.
    """
    begun = time.monotonic()
    found: dict[str, Any] = {**facts, "budget": budget, "parts": {}}
    chosen = {part.name for part in every}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        (out / "logs.txt").open("w") as logs,
        _signals_raise(),
    ):
        for number, part in enumerate(every):
            folder = Path(temporary) / part.name
            folder.mkdir()
            left = budget - (time.monotonic() - begun)
            why_not = _why_not(part, found["parts"], left)
            if why_not is None:
                later = sum(each.seconds for each in every[number + 1 :] if _lacks(each) is None)
                outcome = _ran(part, min(left, max(part.seconds, left - later)), folder, out)
                logs.write(f"===== {part.name}\n{_shortened((folder / 'log').read_text(errors='replace'))}\n")
                logs.flush()
                _keep(part, folder, out)
            else:
                outcome = {"status": "left out", "why": why_not, "seconds": 0.0, "result": None}
            if part.needs is not None and part.needs not in chosen:
                outcome["untested"] = part.needs
            found["parts"][part.name] = outcome
            found["seconds"] = time.monotonic() - begun
            print(f"{part.name}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
            _write(out / "gpu_check.json", json.dumps(found, indent=1) + "\n")
            _write(out / "summary.txt", "\n".join(lines(found)) + "\n")
    return found


def _write(path: Path, text: str) -> None:
    """The whole of it, or what was there before."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


def _shortened(log: str) -> str:
    """Where it is too long, without its middle."""
    if len(log) <= LONGEST_LOG:
        return log
    half = LONGEST_LOG // 2
    return f"{log[:half]}\n({len(log) - 2 * half} characters left out)\n{log[-half:]}"


def _keep(part: Part, folder: Path, out: Path) -> None:
    for name in part.keeps:
        if (folder / name).is_file():
            size = (folder / name).stat().st_size
            if size <= LARGEST_FILE:
                shutil.copy(folder / name, out / name)
            else:
                print(f"{part.name}: {name} is not kept, it has {size / 2**20:.0f} MiB", flush=True)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Parts get both signals as usual, even of a process that was started to ignore them, in the background."""
    both = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _: object) -> NoReturn:
        for each in both:  # what is being cleaned up is not to be interrupted
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = [signal.signal(each, stop) for each in both]
    try:
        yield
    finally:
        for each, handler in zip(both, before, strict=True):
            signal.signal(each, handler)


def _why_not(part: Part, before: dict[str, Any], left: float) -> str | None:
    if (lacking := _lacks(part)) is not None:
        return lacking
    if part.needs is not None and part.needs in before:
        needed = before[part.needs]
        if not needed["result"]:
            return f"{part.needs} told nothing"
        if needed["status"] == "FAILED" or needed["result"].get("failed"):
            return f"{part.needs} failed"
    if left < LEAST_SHARE * part.seconds:
        return f"too little time is left, pass --parts {part.name}"
    return None


def _lacks(part: Part) -> str | None:
    return f"there is no {part.program}" if part.program is not None and shutil.which(part.program) is None else None


def _ran(part: Part, seconds: float, folder: Path, out: Path) -> dict[str, Any]:
    """How it ended, with what it had written by then."""

    def filled(text: str) -> str:
        return text.replace("{folder}", str(folder)).replace("{out}", str(out))

    command = [sys.executable if word == "python" else filled(word) for word in part.command]
    environment = {**os.environ, **{name: filled(value) for name, value in part.environment.items()}}
    begun = time.monotonic()
    with (folder / "log").open("w") as log:
        status, why, told = _ended(command, environment, log, seconds)
    outcome: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begun}
    try:
        outcome["result"] = None if part.result is None else _read(folder / filled(part.result))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        outcome["result"] = None
        if status == "passed":
            status = outcome["status"] = "FAILED"
            why = f"it left no result: {type(error).__name__}"
    if status != "passed":
        printed = (folder / "log").read_bytes()[:told].decode(errors="replace").strip().splitlines()
        outcome |= {"why": why, "last_words": printed[-LAST_WORDS:]}
    return outcome


def _ended(
    command: list[str], environment: dict[str, str], log: IO[str], seconds: float
) -> tuple[str, str | None, int | None]:
    """Status, why, and of how many bytes its log was when it was interrupted; None if it was not."""
    try:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        return "FAILED", f"it could not be started: {error.strerror}", None
    grace = min(GRACE, seconds / 4)
    try:
        code = process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        told = os.fstat(log.fileno()).st_size
        os.killpg(process.pid, signal.SIGINT)  # pytest writes what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return "CUT SHORT", f"after {seconds:.0f} s", told
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.wait()
    return ("passed", None, None) if code == 0 else ("FAILED", f"exit status {code}", None)


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return _counted(list(ElementTree.parse(path).getroot().iter("testsuite")))


def _counted(suites: Iterable[ElementTree.Element]) -> dict[str, Any]:
    """pytest's report: how many tests ended how, and which failed.

    By its own numbers: a test that was interrupted is among the cases, and looks like one that passed.
    """
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for suite in suites:
        tests, failures, errors, skipped = (
            int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        )
        found["passed"] += tests - failures - errors - skipped
        found["failed"] += failures + errors
        found["skipped"] += skipped
        for case in suite.iter("testcase"):
            if {child.tag for child in case} & {"failure", "error"}:
                # of a file that cannot be imported there is no class
                found["failures"].append("::".join(filter(None, (case.get("classname"), case.get("name")))))
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a part failed or was cut short, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="bash bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the smallest size of everything, on a CPU too")
    parser.add_argument("--parts", nargs="*", help="these only, and the environment")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--gpu", action="store_true", help="there is one")
    options = parser.parse_args(arguments)
    if not options.gpu and not options.smoke:
        parser.error(
            "torch can use no GPU here: torch.cuda.is_available() is false, or torch cannot be imported (see above). "
            "Figures of a CPU would mean nothing. Name a Python whose torch has one in PYTHON=..., or pass --smoke to "
            "see that everything runs."
        )
    every = parts(options.gpu, options.smoke)
    names = [part.name for part in every]
    unknown = sorted(set(options.parts or ()) - set(names))
    if unknown:
        raise SystemExit(
            f"There is no part {', '.join(unknown)}. It would find out nothing. Take of {', '.join(names)}."
        )
    if options.parts is not None:
        every = [part for part in every if part.name in {"environment", *options.parts}]
    # the working folder: the code has been laid out elsewhere
    here = Path.cwd()
    facts = {"commit": revision(here), "dirty": is_dirty(here), "smoke": options.smoke, "gpu": options.gpu}
    found = run(every, options.out, options.budget, facts)
    print((options.out / "summary.txt").read_text(), end="")
    return int(any(part["status"] in ("FAILED", "CUT SHORT") for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
