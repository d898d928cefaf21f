"""Two processes of one thread, over gloo, that measure together; rank 0 writes and shows."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.command import revision, write

Document = dict[str, Any]
Measure = Callable[[argparse.Namespace], Iterator[Document]]
"""options -> all that rank 0 knows so far, after every step."""
Show = Callable[[Document], None]


def spawned(measure: Measure, options: argparse.Namespace, show: Show) -> None:
    """Measure in two processes; options: with `json`, where rank 0 writes what it knows so far."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine may not know its own name
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder, measure, options, show), nprocs=2)


def _worker(rank: int, folder: str, measure: Measure, options: argparse.Namespace, show: Show) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    commit = revision(Path(__file__).parents[2])
    try:
        for document in measure(options):
            if rank == 0:
                write(options.json, commit=commit, **document)
        if rank == 0:
            show(document)
    finally:
        dist.destroy_process_group()
