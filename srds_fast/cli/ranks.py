"""The command under torchrun: all processes make each image together, and rank 0 alone prints and writes."""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from ..errors import InvalidArgument

# arguments that name what is written
WRITTEN = ("out", "save", "plot", "profile")


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process with others; it imports no torch."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process prints: it is rank 0, or alone."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


@contextmanager
def sharing(args: argparse.Namespace) -> Iterator[None]:
    """In the block there is a process group if torchrun has started several processes.

    The other ranks than 0 print nothing, and write into a folder that is removed. Raises InvalidArgument if there are
    fewer devices than processes on this machine.
    """
    if not started_by_torchrun() or not hasattr(args, "device"):
        yield
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available() and args.device != "cpu"
    if cuda:
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise InvalidArgument(
                f"torchrun has started process {local} on this machine, and PyTorch sees {devices} CUDA devices. Each "
                f"process needs one. Pass --nproc-per-node {devices}, or --device cpu."
            )
        torch.cuda.set_device(local)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        if is_first():
            yield
        else:
            with tempfile.TemporaryDirectory() as folder, io.StringIO() as nowhere:
                for name in WRITTEN:
                    if isinstance(getattr(args, name, None), Path):
                        setattr(args, name, Path(folder) / getattr(args, name).name)
                args.json = None
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    yield
    finally:
        if own:
            dist.destroy_process_group()
