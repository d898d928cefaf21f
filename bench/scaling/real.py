"""Two processes of one thread, timed against one process, beside what was predicted for each.

    python -m bench.scaling.real --json bench/results/scaling-cpu.json

Needs two cores with nothing else on them. Two processes of one thread, over gloo, make one sample together; rank 0
alone makes it with one thread and with two. All three are called in turn in these two processes, each round another
sample, and the idle process waits without computing. Ratios are medians over the rounds of the ratio within a round.

Every run takes the waves that `bench.scaling` has of its method. Predicted are the seconds of the loop, in two ways,
from costs that the same processes have measured before the first call: by the planner, from calls that both made
together; and by the simulator, from calls that each made by itself while the other did too, the gather between the two,
and what the host does between network calls. "error" is predicted over measured seconds, less 1, of two processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DDIMScheduler

import srds_fast
from bench.command import parser, revision, write
from bench.speed.host_time import Case
from bench.speed.timing import timed
from bench.workloads.pipelines import random
from bench.workloads.problems import Problem
from bench.workloads.samplers import SAMPLES, digits
from srds_fast import Report, zoo
from srds_fast.cli.output import show_table
from srds_fast.engine.costs import Costs, gather_seconds, price
from srds_fast.engine.distributed import call as distributed
from srds_fast.engine.distributed.ranks import Doing, Header, Ranks, ranks_of
from srds_fast.kernels.wave_update import NetworkInput
from srds_fast.pipelines.dry_run import planned
from srds_fast.planner.choose import fixed_at
from srds_fast.planner.plan import Plan
from srds_fast.planner.search import Pricing
from srds_fast.sampling.rows import RowDenoiser
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import SolverInputs

from .models import Link, Network, link_of, measured
from .predict import Way, seconds, ways

STEPS = (50, 100)
# one process of one thread, the same of two threads, two processes of one thread
ALONE, THREADS, RANKS = "one thread", "two threads", "two processes"
HOWS = {ALONE: (1, None), THREADS: (2, None), RANKS: (1, "auto")}
# what a process does by itself while the other one does too: as devices that disturb each other through the memory
BESIDE = "beside another"
# of `host_time`: a pipeline whose network takes no time
WAVES_OF = "SDXL DDIM"
EXCHANGES = 200
METHODS = ("sequential", "srds (default)", "srds, as published", "collocation (default), stops itself")
GATHERED = (2**8, 2**20)  # bytes of a unit, to see latency and bandwidth
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is sampled.

    Attributes:
        call: (way, parallel, sample) -> report of one call.
        pricing: (steps, parallel) -> the planner's costs of such calls.
        units: of a row; unit_bytes: of the output of one.
    """

    call: Callable[[Way, Any, int], Report]
    pricing: Callable[[int, Any], Pricing]
    units: int
    unit_bytes: int


def digits_under_guidance() -> Subject:
    """The bundled pipeline: two guidance branches a row."""
    workload = digits()

    @cache
    def compiled(plan: Plan, parallel: Any) -> Any:
        return srds_fast.compile(workload.pipe, plan=plan, parallel=parallel)

    def call(way: Way, parallel: Any, sample: int) -> Report:
        fast = compiled(way.plan, parallel)
        fast(**workload.arguments(way.plan.num_inference_steps, sample))
        report: Report = fast.report
        return report

    def pricing(steps: int, parallel: Any) -> Pricing:
        fast = srds_fast.compile(workload.pipe, explore=0.0, parallel=parallel)
        return planned(fast, (), workload.arguments(steps)).price()

    return Subject(call, pricing, 2, 4 * 8 * 8 * 4)


def policy() -> Subject:
    """The bundled robot policy, without guidance."""
    found = zoo.load("policy")
    config = found.config
    x = random((SAMPLES, config.horizon, config.action_dim))
    cond = {"observation": random((SAMPLES, config.n_obs_steps, config.state_dim), seed=1)}
    problem = Problem("policy", found.denoiser, x, cond, DDIMScheduler.from_config(found.noise_scheduler.config))
    return of_problem(problem, config.horizon * config.action_dim * 4)


def of_problem(problem: Problem, unit_bytes: int) -> Subject:
    """A denoiser without guidance: a row is one unit, whose output has so many bytes."""

    def call(way: Way, parallel: Any, sample: int) -> Report:
        steps = way.plan.num_inference_steps
        return problem.one(sample % len(problem.x)).sampled(steps, plan=way.plan, parallel=parallel).report

    def pricing(steps: int, parallel: Any) -> Pricing:
        one = problem.one(0)
        scheduler = DDIMScheduler.from_config(problem.scheduler.config)
        scheduler.set_timesteps(steps)
        noise, network = noise_table(scheduler), NetworkInput(one.x.dtype)

        def evaluator(program: Any) -> RowDenoiser:
            return RowDenoiser(one.denoiser, one.x, noise, program, one.cond)

        inputs = SolverInputs(network=network, scaled=True)
        with distributed.sharing(ranks_of(parallel)):
            return price(Costs(), problem.name, evaluator, one.x, noise, inputs, one.x.dtype, replayed=False)

    return Subject(call, pricing, 1, unit_bytes)


SUBJECTS: dict[str, Callable[[], Subject]] = {"digits, guidance": digits_under_guidance, "policy": policy}


def rounds(subject: Subject, way: Way, samples: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the call, of its loop) in each way, by sample; all that rank 1 has done alone is to wait."""
    found: dict[str, list[tuple[float, float]]] = {how: [] for how in HOWS}
    for sample in range(-1, samples):  # the first warms up
        for how, (threads, parallel) in HOWS.items():
            dist.barrier()
            if parallel is None and dist.get_rank() > 0:
                continue
            torch.set_num_threads(threads)
            whole, report = timed(lambda: subject.call(way, parallel, max(0, sample)))  # noqa: B023
            torch.set_num_threads(1)
            if sample >= 0:
                found[how].append((whole, report.seconds))
    return found


def priced(subject: Subject, steps: int) -> dict[str, Pricing]:
    """The planner's costs in each way; rank 1 has none of what rank 0 does alone."""
    found = {}
    for how, (threads, parallel) in {**HOWS, BESIDE: (1, None)}.items():
        dist.barrier()
        if how in (RANKS, BESIDE) or dist.get_rank() == 0:
            torch.set_num_threads(threads)
            found[how] = subject.pricing(steps, parallel)
            torch.set_num_threads(1)
    return found


def row_of(
    way: Way, found: dict[str, list[tuple[float, float]]], pricing: dict[str, Pricing], network: Network, link: Link
) -> Row:
    """What a method took in each way, and what was predicted. network, link: of the simulator."""
    row: Row = {"method": way.name, "setting": way.setting, "waves": len(way.widths), "rows": sum(way.widths)}
    for how, times in found.items():
        loop = statistics.median(each for _, each in times)
        predicted = pricing[how].of(way.plan, way.iteration)
        row[how] = {
            "call_seconds": [each for each, _ in times],
            "loop_seconds": [each for _, each in times],
            "predicted_seconds": predicted,
            "error": predicted / loop - 1,
        }
        if how == RANKS:
            simulated = seconds(way.widths, network, 2, link.seconds)
            row[how] |= {"simulated_seconds": simulated, "error_of_simulator": simulated / loop - 1}
    for name, which in (("call", 0), ("loop", 1)):
        for how in (ALONE, THREADS):
            pairs = zip(found[how], found[RANKS], strict=True)
            row[f"{name}_over_{how}"] = statistics.median(one[which] / two[which] for one, two in pairs)
    alone, together = (row[how]["predicted_seconds"] for how in (ALONE, RANKS))
    return {**row, "predicted_over_one thread": alone / together}


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that rank 0 knows so far, after every method."""
    document: dict[str, Any] = {"networks": {}, "results": []}
    with distributed.sharing(ranks_of("auto")) as shared:
        assert shared is not None
        document["exchange_seconds"] = exchange_seconds(shared.ranks)
        small, large = (gather_seconds(shared, 2, torch.zeros(1, each // 4), torch.float32) for each in GATHERED)
    few, many = (2 * each for each in GATHERED)
    document["gather"] = {"latency": small, "bandwidth": (many - few) / 2 / max(1e-9, large - small)}
    link = link_of(document)
    dist.barrier()
    if dist.get_rank() == 0:
        document["wave_seconds"] = wave_seconds()
    for name, make in SUBJECTS.items():
        if name not in options.subjects:
            continue
        subject = make()
        for steps in STEPS[:1] if options.smoke else STEPS:
            pricing = priced(subject, steps)
            chosen = [
                way._replace(plan=fixed_at(way.plan, way.iteration)) for way in ways(steps)[0] if way.name in METHODS
            ]
            if dist.get_rank() == 0 and name not in document["networks"]:
                curve = pricing[BESIDE].known.curve
                document["networks"][name] = {
                    "units": [rows * subject.units for rows in curve.rows],
                    "seconds": curve.seconds,
                    "units_of_a_row": subject.units,
                    "unit_bytes": subject.unit_bytes,
                    "outside": pricing[ALONE].overhead(chosen[0].plan, 1) / steps,
                }
            for way in chosen:
                times = rounds(subject, way, options.samples)
                if dist.get_rank() == 0:
                    row = row_of(way, times, pricing, measured(document)[name], link)
                    document["results"].append({"subject": name, "steps": steps, **row})
                yield document


def exchange_seconds(ranks: Ranks) -> float:
    """What it takes two processes to tell each other how they fare, before each gather."""
    times = [timed(lambda: ranks.headers(Header(Doing.LOOK)))[0] for _ in range(EXCHANGES)]
    return statistics.median(times)


def wave_seconds() -> float:
    """What the host does between the network calls of two waves, as `bench.speed.host_time` times it."""
    case = Case(WAVES_OF)
    seconds_of_wave, _ = case.measured(3)["srds"]
    return seconds_of_wave


def worker(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    try:
        for document in measurements(options):
            if rank == 0:
                about = {"commit": revision(Path(__file__).parents[2]), "samples": options.samples}
                write(options.json, **about, **document)
        if rank == 0:
            show(document)
    finally:
        dist.destroy_process_group()


def show(document: dict[str, Any]) -> None:
    """Print a table for each subject and number of steps."""
    results = document["results"]
    for subject, steps in dict.fromkeys((row["subject"], row["steps"]) for row in results):
        here = [row for row in results if (row["subject"], row["steps"]) == (subject, steps)]
        cells = [
            {
                "method": row["method"],
                "waves": row["waves"],
                "rows": row["rows"],
                "ms, 1 process": f"{1e3 * statistics.median(row[ALONE]['loop_seconds']):.1f}",
                "2 threads": f"{1e3 * statistics.median(row[THREADS]['loop_seconds']):.1f}",
                "2 processes": f"{1e3 * statistics.median(row[RANKS]['loop_seconds']):.1f}",
                "times faster": f"{row['loop_over_one thread']:.2f}",
                "than 2 threads": f"{row['loop_over_two threads']:.2f}",
                "predicted ms": f"{1e3 * row[RANKS]['predicted_seconds']:.1f}",
                "error": f"{row[RANKS]['error']:+.0%}",
                "simulated ms": f"{1e3 * row[RANKS]['simulated_seconds']:.1f}",
                "its error": f"{row[RANKS]['error_of_simulator']:+.0%}",
            }
            for row in here
        ]
        show_table(cells, text=("method",), title=f"\n{subject}, N = {steps}, two processes against one")


def main(arguments: list[str] | None = None) -> None:
    told = parser("bench.scaling.real", __doc__)
    told.add_argument("--samples", type=int, default=5, help="rounds, each another sample")
    told.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    told.add_argument("--smoke", action="store_true", help="50 steps, one round")
    options = told.parse_args(arguments)
    if options.smoke:
        options.samples = 1
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine may not know its own name
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder, options), nprocs=2)


if __name__ == "__main__":
    main()
