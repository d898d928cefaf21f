"""Times of the parts, by pytest-benchmark: `pytest bench --benchmark-only`, see bench/README.md.

Methods run a fixed number of iterations, so a time is always of the same waves. They are not equally close to the
sequential sample: compare methods with each other by `bench.quality.peers`, and here each with itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from bench.workloads.methods import fixed_methods
from bench.workloads.networks import DEVICE, SMALL
from bench.workloads.problems import mixture
from bench.workloads.samplers import WORKLOADS
from srds_fast.engine.run import Run
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.schedulers.verify import noise_table

from . import host_time, kernels

torch.set_num_threads(1)
SAMPLED_STEPS, CALLED_STEPS = 100, 12 if SMALL else 50
ENGINES = ["eager"] if SMALL else ["eager", "graph"]
# megabytes that a call moves: bound by the launch, and by bandwidth
MOVED = [1] if SMALL else [1, 64]


def benchmarked(benchmark: Any, group: str, call: Callable[[], object]) -> None:
    """Time a call, device included."""

    def whole() -> None:
        call()
        if not SMALL:
            torch.cuda.synchronize()

    for _ in range(0 if benchmark.disabled else 2):  # the second call of a graph replays
        whole()
    benchmark.group = group
    benchmark(whole)


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("way", ["run", "reference"])
@pytest.mark.parametrize("operation", kernels.SUBJECTS)
def test_kernel(operation: str, way: str, moved: int, benchmark: Any) -> None:
    subject = kernels.SUBJECTS[operation](moved * 2**20, DEVICE)
    kernels.checked(subject)
    benchmarked(benchmark, f"kernel {operation}, {moved} MB", getattr(subject, way))


@pytest.mark.parametrize("loop", host_time.LOOPS)
@pytest.mark.parametrize("pipeline", host_time.PIPELINES)
def test_host(pipeline: str, loop: str, benchmark: Any) -> None:
    case = host_time.Case(pipeline)
    benchmarked(benchmark, f"host {pipeline}", lambda: case.call(loop))


@pytest.mark.parametrize("method", ["sequential", "srds", "collocation", "chords"])
def test_planning(method: str, benchmark: Any) -> None:
    """From settings to the first wave, with nothing kept from runs before it."""
    scheduler, x = DDIMScheduler(clip_sample=False), torch.zeros(1, 4, 8, 8)
    scheduler.set_timesteps(SAMPLED_STEPS)
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "srds_fast"]
    values = {id(value): value for module in modules for value in vars(module).values()}.values()
    caches = [value.cache_clear for value in values if hasattr(value, "cache_clear")]

    def call() -> None:
        for forget in caches:
            forget()
        Run(choose(SAMPLED_STEPS, Settings(method=method)), x, noise_table(scheduler)).next(None)

    benchmarked(benchmark, "planning", call)


@pytest.mark.parametrize("method", fixed_methods(SAMPLED_STEPS))
def test_sampler(method: str, benchmark: Any) -> None:
    """A Gaussian mixture in closed form, 64 dimensions, float64, on the CPU."""
    problem, settings = mixture(1), fixed_methods(SAMPLED_STEPS)[method]
    benchmarked(benchmark, "sampler mixture", lambda: problem.sampled(SAMPLED_STEPS, **settings))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", fixed_methods(CALLED_STEPS))
@pytest.mark.parametrize("workload", ["digits", "policy"])
def test_call(workload: str, method: str, engine: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    settings = {**fixed_methods(CALLED_STEPS)[method], "engine": engine}
    loop = WORKLOADS[workload]().ours(CALLED_STEPS, settings)
    benchmarked(benchmark, f"call {workload}, {engine}", loop.call)
    benchmark.extra_info |= loop.report().to_dict()
