"""Who watches calls: `profile`, with or without a Chrome trace, and the environment variable that asks for it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch.autograd import profiler as torch_profiler

from ..errors import InvalidArgument
from ..files import check_file, new_file, path_of
from ..words import counted

VARIABLE = "SRDS_FAST_PROFILE"
RANGES = ("1", "true", "on", "yes", "nvtx")
NOTHING = ("", "0", "false", "off", "no")
# Each operation of a network takes some hundred bytes of memory and of the file: later calls are left out.
MOST_CALLS = 50

logger = logging.getLogger("srds_fast")

watching: list[ChromeTrace | None] = []
"""Every `profile` that is open: its trace, or None for ranges alone."""

_starting = threading.RLock()


@contextmanager
def profile(trace: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Show what calls do that begin while this is open, in all threads.

    Ranges go to NVTX, domain "srds_fast", for Nsight, and to a torch profiler that runs; `report.timeline` holds their
    totals. Without a tool that listens, a range takes about three microseconds. `srds_fast.telemetry` lists the names.

    Args:
        trace: a file for the Chrome trace (Perfetto, chrome://tracing) that the torch profiler records meanwhile and
            writes at the end: the ranges, all operations, and the kernels of a CUDA device. Operations are slower while
            it records, so costs measured meanwhile are higher. It holds the first 50 calls (the log says so), a call
            that runs on at the end up to there. Calls have device times in their timeline, by events; these are read
            when a call has ended, which then waits for its device. Leave the file out under Nsight. "{pid}" in its name
            is replaced by the number of the process: several would overwrite each other's file.

    Raises:
        InvalidArgument: the file cannot be written, as its folder does not exist or it is a symbolic link; or another
            trace or torch profiler is running in this process.
    """
    kept = None if trace is None else ChromeTrace(path_of("trace", trace))
    watching.append(kept)
    failed = True
    try:
        yield
        failed = False
    finally:
        watching.remove(kept)
        try:
            if kept is not None:
                kept.write()
        except (OSError, InvalidArgument) as why:
            if not failed:
                raise
            logger.warning("The trace was not written: %s", why)  # the first error says more


def profile_as(setting: str) -> AbstractContextManager[None]:
    """`profile` by a word of the environment or the command line: of `RANGES`, of `NOTHING`, or the file to write."""
    if setting.lower() in NOTHING:
        return nullcontext()
    return profile(None if setting.lower() in RANGES else setting)


def follow_environment() -> None:
    """At the first call: profile until the process exits, if its environment asks for it."""
    with _starting:
        _profile_until_exit()


@cache  # an error is not kept: the next call asks again
def _profile_until_exit() -> None:
    opened = ExitStack()
    opened.enter_context(profile_as(os.environ.get(VARIABLE, "")))
    atexit.register(opened.close)


class ChromeTrace:
    """Records operations, kernels and ranges of all threads with the torch profiler, from now on until `write`."""

    def __init__(self, path: Path) -> None:
        path = Path(str(path).replace("{pid}", str(os.getpid())))
        check_file(path)
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
            if torch_profiler._is_profiler_enabled:
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
                full = "The trace %s is full: it holds %s. Later ones are not in it."
                logger.warning(full, self._path, counted(self._calls, "call"))
                self._stop()

    def write(self) -> None:
        """Stop recording and write the file; raises as `files.new_file`."""
        with self._lock:
            self._stop()
            if self._profiler.kineto_results is not None:
                with new_file(self._path) as unfinished:
                    self._profiler.export_chrome_trace(str(unfinished))  # logs its own failures and raises nothing

    def _stop(self) -> None:
        if not self._recording:
            return
        self._recording = False
        if torch_profiler._is_profiler_enabled:
            self._profiler.__exit__(None, None, None)
        else:  # stopping and exporting what is gone would crash the process
            logger.warning("The trace %s is lost: another torch profiler ran meanwhile and has ended it.", self._path)
