"""A Chrome trace by the torch profiler: operations, kernels and our ranges, of all threads."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import torch
from torch.autograd import profiler as torch_profiler

from ..errors import InvalidArgument

# Each operation of a network takes some hundred bytes of memory and of the file: later calls are left out.
MOST_CALLS = 50

logger = logging.getLogger("srds_fast")
_starting = threading.Lock()


def running() -> bool:
    """Whether a torch profiler runs in this process, ours or another one."""
    return torch_profiler._is_profiler_enabled


class ChromeTrace:
    """Records from now on, until `write`.

    Args:
        path: the file to write.

    Raises:
        InvalidArgument: the file cannot be written, or a torch profiler is already running.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.parent.is_dir():
            why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise InvalidArgument(
                f"{path} cannot be written: {why}. A trace is one file. Name a file in a folder that exists."
            )
        self._path = path
        self._lock = threading.Lock()
        self._calls = 0
        self._recording = True
        # torch.profiler.profile does the same, but imports torch's compiler when it starts, which takes seconds
        self._profiler = torch_profiler.profile(
            use_device="cuda" if torch.cuda.is_available() else None,
            use_kineto=True,
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )
        with _starting:
            if running():
                raise InvalidArgument(
                    f"The trace {path} cannot be recorded: another trace or torch profiler is running, and a process "
                    "has one at a time. Close it first, or call profile() without a file: the ranges are then shown "
                    "in the profiler that runs."
                )
            self._profiler.__enter__()

    def count_call(self) -> None:
        """A call has ended. After `MOST_CALLS` the recording ends."""
        with self._lock:
            self._calls += 1
            if self._recording and self._calls == MOST_CALLS:
                logger.warning(
                    "The trace %s is full: it holds %d calls. Later ones are not in it.", self._path, self._calls
                )
                self._stop()

    def write(self) -> None:
        """Stop recording and write the file, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            self._stop()
            if self._profiler.kineto_results is None:
                return
            unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            self._profiler.export_chrome_trace(str(unfinished))  # logs its own failures and raises nothing
            unfinished.replace(self._path)

    def _stop(self) -> None:
        if not self._recording:
            return
        self._recording = False
        if running():
            self._profiler.__exit__(None, None, None)
        else:  # stopping and exporting what is gone would crash the process
            logger.warning("The trace %s is lost: another torch profiler ran meanwhile and has ended it.", self._path)
