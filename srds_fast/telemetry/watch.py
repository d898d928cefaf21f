"""Who looks at calls: `profile`, and the environment variable that asks for it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from .chrome_trace import ChromeTrace

VARIABLE = "SRDS_FAST_PROFILE"
RANGES = ("1", "true", "on", "yes", "nvtx")
NOTHING = ("", "0", "false", "off", "no")

logger = logging.getLogger("srds_fast")

looking: list[ChromeTrace | None] = []
"""Everybody who looks now: a trace, or None for ranges alone."""

_environment: ExitStack | None = None
_reading_environment = threading.Lock()


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
        InvalidArgument: the file cannot be written, as its folder does not exist; or another trace or torch profiler is
            running in this process.
    """
    kept = None if trace is None else ChromeTrace(Path(str(trace).replace("{pid}", str(os.getpid()))))
    looking.append(kept)
    failed = True
    try:
        yield
        failed = False
    finally:
        looking.remove(kept)
        try:
            if kept is not None:
                kept.write()
        except OSError as why:
            if not failed:
                raise
            logger.warning("The trace was not written: %s", why)  # the first error says more


def profile_as(setting: str) -> AbstractContextManager[None]:
    """`profile` as a word: of the environment variable, and of the command line.

    Args:
        setting: one of `RANGES`, for ranges alone; one of `NOTHING`; else the file to write.
    """
    if setting.lower() in NOTHING:
        return nullcontext()
    return profile(None if setting.lower() in RANGES else setting)


def follow_environment() -> None:
    """At the first call: look until the process exits, if its environment asks for it."""
    global _environment
    with _reading_environment:
        if _environment is None:
            watching = ExitStack()
            watching.enter_context(profile_as(os.environ.get(VARIABLE, "")))
            atexit.register(watching.close)
            _environment = watching
