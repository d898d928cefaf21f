"""Check: `bench.scaling.real`, which times two processes, with a denoiser that takes no time."""

from __future__ import annotations

import argparse
from typing import Any

import torch.distributed as dist
from cancelling import Network
from diffusers import DDIMScheduler
from ranked import check, noise

from bench.scaling import real
from bench.workloads.problems import Problem


@check
def real_speeds() -> Any:
    """What rank 0 has written; None on the others, and where there are more than two."""
    if dist.get_world_size() != 2:
        return None
    problem = Problem("tiny", Network(), noise(), {}, DDIMScheduler(clip_sample=False))
    kept = real.SUBJECTS, real.wave_seconds
    real.SUBJECTS, real.wave_seconds = {"tiny": lambda: real.of_problem(problem, 64)}, lambda: 1e-4
    try:
        *_, document = real.measurements(argparse.Namespace(subjects=["tiny"], smoke=True, samples=1))
    finally:
        real.SUBJECTS, real.wave_seconds = kept
    return document if dist.get_rank() == 0 else None
