"""Ranks that are forked from a process that has imported everything: a start takes a fraction of a second."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TICK = 0.02  # seconds


def forked(size: int, timeout: float, run: Callable[[], Any], hangs: float = math.inf) -> dict[int, Any]:
    """What each rank returns that comes to its end; "hang" of those that do not within so many seconds.

    timeout: of the group, in seconds.
    """
    folder = Path(tempfile.mkdtemp())
    children = {}
    for number in range(size):
        if (child := os.fork()) == 0:
            _child(number, size, timeout, run, folder)
        children[child] = number
    found: dict[int, Any] = {}
    left = hangs  # counted while this process runs: all of them may be stopped for a while
    while children:
        child, _ = os.waitpid(-1, os.WNOHANG)
        if child:
            children.pop(child, None)
        elif left < 0:
            for each, number in children.items():
                os.kill(each, signal.SIGKILL)
                found[number] = "hang"
            left = math.inf
        else:
            time.sleep(TICK)
            left -= TICK
    for path in folder.glob("*.json"):
        found[int(path.stem)] = json.loads(path.read_text())
    shutil.rmtree(folder)
    return found


def _child(number: int, size: int, timeout: float, run: Callable[[], Any], folder: Path) -> None:
    """The life of a rank."""
    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=number, world_size=size, timeout=timedelta(seconds=timeout)
        )
        found = run()
        (folder / f"{number}.json").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def shown(title: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.stdout.flush()
