"""Checks: `bench.scaling.real` and `never_slower`, which time two processes, with a denoiser that takes no time."""

from __future__ import annotations

import argparse
from typing import Any

import torch.distributed as dist
from cancelling import Network
from diffusers import DDIMScheduler
from ranked import check, noise

from bench.scaling import never_slower, real
from bench.scaling.subjects import Subject, of_problem
from bench.workloads.problems import Problem


def _tiny() -> Subject:
    return of_problem(Problem("tiny", Network(), noise(), {}, DDIMScheduler(clip_sample=False)), 64)


@check
def real_speeds() -> Any:
    """What rank 0 has written; None on the others, and where there are more than two."""
    if dist.get_world_size() != 2:
        return None
    kept = real.SUBJECTS, real.wave_seconds
    real.SUBJECTS, real.wave_seconds = {"tiny": _tiny}, lambda: 1e-4
    try:
        *_, document = real.measurements(argparse.Namespace(subjects=["tiny"], smoke=True, samples=1))
    finally:
        real.SUBJECTS, real.wave_seconds = kept
    return document if dist.get_rank() == 0 else None


@check
def pairs_of_auto() -> Any:
    """The same for calls that choose their plan."""
    subject = _tiny()
    found = never_slower.pairs(lambda parallel, sample: subject.call(8, None, parallel, sample), 6)
    return found if dist.get_rank() == 0 else None
