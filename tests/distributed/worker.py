"""What each rank of a test does, under torchrun: it runs checks and writes what they found as JSON.

torchrun --nproc-per-node 2 tests/distributed/worker.py FOLDER [CHECK ...]
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import agreeing  # noqa: F401
import answers  # noqa: F401
import commands
import composed  # noqa: F401
import diffusers
import failing  # noqa: F401
import graphs  # noqa: F401
import timing  # noqa: F401
import torch
import torch.distributed as dist
from ranked import CHECKS, NAMED, rank


@contextmanager
def group() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(folder: str, *names: str) -> None:
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with group():
        found = {}
        for name in names or CHECKS:
            try:
                found[name] = {**CHECKS, **NAMED}[name]()
            except Exception:
                found[name] = traceback.format_exc()
        (Path(folder) / f"{rank()}.json").write_text(json.dumps(found))
        # the group stays for them: to start another takes seconds
        if (Path(folder) / "commands").exists():
            commands.run(Path(folder) / "commands")


if __name__ == "__main__":
    main(*sys.argv[1:])
