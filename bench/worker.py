"""One side of `bench.compare`: a process with the library of one commit, told over a pipe what to time.

Each line in is a request, each line out its answer, both JSON. Only what is asked for runs; in between it sleeps.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

# of one sample, so that a moment in which the machine was busy is not all of it
SECONDS = 0.1
FEWEST_CALLS, MOST_CALLS = 3, 200
WARM_UP = 2


class Failed(Exception):
    """A bench cannot run there; the last line of what was raised."""


class Worker:
    """A process that serves requests; ended when its context is left.

    Args:
        site: folder as `layout.lay_out` fills it.
    """

    def __init__(self, site: Path) -> None:
        # torch or diffusers may be carried there; what is relative would be so to another folder
        carried = [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
        path = os.pathsep.join([str(site), *carried])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        self._log = site / "worker.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker"],
                cwd=site,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def prepare(self, bench: str) -> int:
        """Set a bench up and warm it up. Returns how many of its calls make a sample.

        Raises:
            Failed: it does not run with this library.
        """
        return int(self._ask(do="prepare", bench=bench))

    def sample(self, calls: int) -> float:
        """Seconds of a call of what was prepared, the median of so many.

        Raises:
            Failed: it raised.
        """
        return float(self._ask(do="sample", calls=calls))

    def begin_counts(self) -> None:
        """Let it take the counts, while others take theirs."""
        self._send(do="counts")

    def counts(self) -> dict[str, Any]:
        """What was begun, as `bench.counts` has it.

        Raises:
            Failed: they cannot be taken with this library.
        """
        return dict(self._received())

    def _ask(self, **request: Any) -> Any:
        self._send(**request)
        return self._received()

    def _send(self, **request: Any) -> None:
        assert self._process.stdin is not None
        # one that has ended has no answer either, which is where it is said
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _received(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"the process has ended: {self._log.read_text().strip()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]


def main() -> None:
    """Serve until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    import torch

    torch.set_num_threads(1)
    prepared: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            match request["do"]:
                case "prepare":
                    prepared = None  # room for the next one
                    prepared = _prepared(request["bench"])
                    answer["value"] = _calls(prepared)
                case "sample":
                    answer["value"] = _sample(prepared, request["calls"])
                case _:
                    answer["value"] = _counts()
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _prepared(name: str) -> Any:
    """The call of a bench, made a few times."""
    import torch

    import srds_fast

    from .registry import REGISTRY

    assert Path(srds_fast.__file__).is_relative_to(Path.cwd()), f"another library was imported: {srds_fast.__file__}"
    call = REGISTRY[name].prepare("cuda" if torch.cuda.is_available() else "cpu").call
    for _ in range(WARM_UP):
        call()
    return call


def _calls(call: Any) -> int:
    return max(FEWEST_CALLS, min(MOST_CALLS, round(SECONDS / _sample(call, 1))))


def _sample(call: Any, calls: int) -> float:
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    with _without_collections():
        for _ in range(calls):
            wait()
            started = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextmanager
def _without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _counts() -> Any:
    from . import counts

    return counts.measured()


if __name__ == "__main__":
    main()
