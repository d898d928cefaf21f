"""The tests of the kernels, interpreted: in processes of their own, beside the other tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

Result = tuple[int, str]


class Runs:
    """Runs of test files, one after another."""

    def __init__(self, files: Iterable[str]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._process: subprocess.Popen[str] | None = None
        self._results: dict[str, Future[Result]] = {file: self._pool.submit(self._run, file) for file in files}

    def result(self, file: str) -> Result:
        """Exit status and output of a file, when it has been run."""
        return self._results[file].result()

    def stop(self) -> None:
        """Run no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()

    def _run(self, file: str) -> Result:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output, _ = self._process.communicate()
        return self._process.returncode, output
