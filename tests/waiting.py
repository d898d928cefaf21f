"""Waiting for another thread or process, however busy the machine is.

What is counted is how often this thread has looked, not seconds: a process that is stopped, or that hardly gets the
processor, looks as rarely as the one that it waits for goes on.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable

LOOKS, APART = 30_000, 0.01  # far more than any call of the tests takes; seconds between two of them


def until(look: Callable[[float], object]) -> bool:
    """Whether it became true. look: waits for so many seconds at most, as `threading.Event.wait`."""
    return any(look(APART) for _ in range(LOOKS))


def ended(*threads: threading.Thread) -> bool:
    """Whether the threads have ended."""

    def look(thread: threading.Thread, seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    return all(until(lambda seconds, thread=thread: look(thread, seconds)) for thread in threads)  # type: ignore[misc]


def output_of(command: list[str]) -> tuple[str, str]:
    """What a process writes until it ends; it is killed if it does not."""

    def look(seconds: float) -> bool:
        time.sleep(seconds)
        return process.poll() is not None

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if not until(look):
            process.kill()
        return process.communicate()
