"""The parts of bench/gpu_check.sh: each in a process of its own, with a time limit; one that fails loses only itself.

Run by the script, which lays the package out. Parts that matter most come first, and all share one budget: a part gets
its own limit and what those before it have spared, and is left out if less than half of its limit is left. Those of the
first call fit into it together; the rest is for a second and a third one. After every part what is known is written:
gpu_check.json (how each part ended, and the JSON it wrote), summary.txt (60 lines at most) and logs.txt (what was
printed). Only the standard library is imported, so that a broken installation is reported like anything else.
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
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

from bench.revision import is_dirty, revision

from .summary import MOST_LINES, lines

BUDGET = 530.0
# of its limit: a part is not begun with less
LEAST_SHARE = 0.5
# seconds of its limit, or a quarter of a short one, that a part has to end by itself after it was interrupted
GRACE = 10.0
LAST_WORDS = 12
# characters of what a part printed: longer logs lose their middle
LONGEST_LOG = 1_000_000
# bytes: results are few and small files, to be carried away
LARGEST_FILE = 15 * 2**20
RECORDING, TRACE = ("digits.nsys-rep", "digits.txt"), ("trace.json",)
# processes of pytest that share the GPU: tests wait for the host, which launches and compiles
MOST_WORKERS = 8
SMOKE_SECONDS = 300
# one of each kernel
SMOKE_TESTS = "test_a_kernel_runs or test_float64"
# of the commands in the script's heading
SECOND_CALL = ("busy", "profile", "nsys", "engines", "peers_policy")
THIRD_CALL = ("switches", "sanitizer")


class Part(NamedTuple):
    """One thing to find out.

    Attributes:
        name: of it.
        seconds: at most.
        command: its arguments; {folder} is a folder of its own, {out} that of the results.
        result: file that it writes in its folder: .json, or .xml of pytest.
        needs: a part that must have run without a failed test, if it is chosen too.
        program: that must be there.
        environment: set for it.
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

    Args:
        gpu: there is one; without it kernels are interpreted.
        smoke: the smallest size of everything.
    """

    def limit(seconds: float) -> float:
        return SMOKE_SECONDS if smoke else seconds

    def bench(
        name: str, seconds: float, module: str, full: Sequence[str] = (), small: Sequence[str] = (), **more: Any
    ) -> Part:
        command = ("python", "-m", module, "--json", "{folder}/result.json", *(small if smoke else full))
        return Part(name, limit(seconds), command, "result.json", shows=True, **more)

    def tests(name: str, seconds: float, *arguments: str, **environment: str) -> Part:
        quiet = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={folder}/result.xml")
        # a file that cannot be imported is one failure, and the others run
        command = (*quiet, "--continue-on-collection-errors", *arguments)
        return Part(name, limit(seconds), command, "result.xml", environment=environment)

    workers = min(MOST_WORKERS, (os.cpu_count() or 1) // 2)
    parallel = gpu and not smoke and workers > 1 and importlib.util.find_spec("xdist") is not None
    side_by_side = ("-n", str(workers)) if parallel else ()
    interpreted = {} if gpu else {"TRITON_INTERPRET": "1"}
    some = ("-k", SMOKE_TESTS) if smoke else ()
    drawn = ("--picture", "{out}/rows.png") if importlib.util.find_spec("matplotlib") is not None else ()
    traced = ("digits", "--engine", "graph", "--trace", "{folder}/trace.json")
    peers, policy = "bench.quality.peers", ("--workloads", "policy")
    few, short = ("--samples", "4"), ("--training-steps", "500")
    recorded = ("bash", "profiling/nsys.sh", "digits", "--engine", "graph", "--steps", "25")
    # every kernel once, at its smallest
    once = tests("sanitizer", 240, "tests/kernels", "-k", SMOKE_TESTS)
    # torch and Triton ask the driver for what it may lack, which is no error of a kernel
    checked = ("compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "1", *once.command)
    # every tensor an allocation of its own: beyond a tensor in a block of torch's lies another one
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part("environment", 20, ("python", "-m", "bench.gpu.where", "{folder}/result.json"), "result.json"),
        tests("kernel_tests", 70, *side_by_side, "tests/kernels", *some, **interpreted),
        tests("gpu_tests", 80, *side_by_side, "-m", "gpu", *_gpu_tests(smoke)),
        # the network that takes longest last
        bench("rows", 85, "bench.speed.rows", ("--networks", "digits", "policy", "sd15", "dit", "sdxl", *drawn),
              ("--rows", "1", "2", *drawn)),
        bench("kernels", 75, "bench.speed.kernels", needs="kernel_tests"),
        bench("peers_digits", 120, peers, ("--workloads", "digits", "--steps", "50", *few),
              ("--smoke", "--workloads", "digits")),
        # not sd15 in the smoke run: it takes a CPU three times as long
        bench("peers_random", 70, peers, ("--workloads", "sd15", "--steps", "25", "--no-compile", *few),
              ("--smoke", "--workloads", "dit")),
        bench("busy", 60, "profiling.busy", (), policy),
        bench("profile", 60, "profiling.run", traced, (*traced, "--steps", "6", "--calls", "1"), keeps=TRACE),
        Part("nsys", limit(60), recorded, program="nsys", environment={"OUT": "{folder}"}, keeps=RECORDING, shows=True),
        bench("engines", 150, "bench.speed.engines",
              ("--workloads", "digits", "policy", "sd15", "dit", "--repeat", "3", "--steps", "25"), policy),
        bench("peers_policy", 150, peers, (*policy, "--steps", "100", *short, *few), ("--smoke", *policy)),
        bench("switches", 240, "bench.speed.switches", (),
              ("--workloads", "dit", "--switches", "late stop", "--repeat", "1")),
        once._replace(command=checked, program="compute-sanitizer", environment=alone),
    ]  # fmt: skip


def _gpu_tests(smoke: bool) -> list[str]:
    """Test files with tests that need a GPU, but for those of the kernels."""
    files = [path for path in sorted(Path("tests").rglob("test_*.py")) if path.parent.name != "kernels"]
    if smoke:
        return [str(path) for path in files if path.name == "test_gpu.py"]
    return [str(path) for path in files if "mark.gpu" in path.read_text()]


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
                printed = "".join((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
                logs.write(f"===== {part.name}\n{_shortened(printed)}\n")
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
    """Replace a file as a whole: an interrupted write leaves what was there before."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


def _shortened(log: str) -> str:
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
    """Both signals raise, also in a process that was started in the background and told to ignore them."""
    both = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _: object) -> NoReturn:
        for each in both:  # the cleaning up must not be interrupted
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
    status, why, told = _ended(command, environment, folder, seconds)
    outcome: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begun, "result": None}
    try:
        if part.result is not None:
            outcome["result"] = _read(folder / part.result)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        if status == "passed":
            status = outcome["status"] = "FAILED"
            why = f"it left no result: {type(error).__name__}"
    # what an interrupted program prints in the end is about the interruption
    printed = (folder / "stdout").read_bytes()[:told].decode(errors="replace").rstrip().splitlines()
    if status != "passed":
        errors = (folder / "stderr").read_text(errors="replace").strip().splitlines() if status == "FAILED" else []
        outcome |= {"why": why, "last_words": (errors or printed)[-LAST_WORDS:]}
    if part.shows:
        outcome["printed"] = [line for line in printed if line.strip()][:MOST_LINES]
    return outcome


def _ended(
    command: list[str], environment: dict[str, str], folder: Path, seconds: float
) -> tuple[str, str | None, int | None]:
    """Status, why, and how many bytes it had printed when it was interrupted; None if it was not."""
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        try:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
        except OSError as error:
            return "FAILED", f"it could not be started: {error.strerror}", None
        grace = min(GRACE, seconds / 4)
        try:
            code = process.wait(seconds - grace)
        except subprocess.TimeoutExpired:
            told = os.fstat(stdout.fileno()).st_size
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

    By its own numbers, as a test that was interrupted is among the cases and looks like one that passed.
    """
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for suite in suites:
        names = ("tests", "failures", "errors", "skipped")
        tests, failures, errors, skipped = (int(suite.get(name, 0)) for name in names)
        found["passed"] += tests - failures - errors - skipped
        found["failed"] += failures + errors
        found["skipped"] += skipped
        for case in suite.iter("testcase"):
            if {child.tag for child in case} & {"failure", "error"}:
                # a file that cannot be imported has no class
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
