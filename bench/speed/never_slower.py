"""Whether method="auto" is ever slower: against the stock loop and the best fixed plan, on twelve workloads.

    python -m bench.speed.never_slower --json never.json
    python -m bench.speed.never_slower --busy --only "digits 50" "policy 100"

Every workload is called 20 times by the stock loop, by "auto" and by the fixed plans that were fastest in two calls
before, in an order that is drawn for each round. Shares are of total times: calls 4 to 20 of "auto" over those of the
stock loop and of the best fixed plan, and its calls 1 to 3, in which it explores, over those of the stock loop. "Pairs"
are the medians of the shares of single calls, which an interruption of a few calls by other processes does not change.
A second stock loop takes part: its shares of the first one are what the machine makes of no difference at all.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor

from bench.command import parser, write
from bench.runner import AUTO, Entrant, told
from bench.workloads import demonstrations
from bench.workloads.problems import mixture
from bench.workloads.samplers import PipelineWorkload, SampledWorkload, Workload, digits, policy
from srds_fast.cli.output import show_table
from srds_fast.planner.choose import candidates
from srds_fast.planner.settings import Settings

# calls in which "auto" explores
EXPLORED = 3
# fixed plans that are called in all rounds
BEST = 3
# those that take this many times as long as the fastest in a first call are not called again
HOPELESS = 2.0
SECONDS_A_ROW = 0.02


def compute_bound() -> Workload:
    """A pixel UNet that keeps the device busy on its own."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    network = UNet2DModel(sample_size=64, block_out_channels=(64, 128, 128), **blocks)
    return PipelineWorkload(DDIMPipeline(network, DDIMScheduler()), lambda _: {"output_type": "pt"})


def slow() -> Workload:
    """A network that takes 20 ms a row."""
    problem = mixture(8)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(SECONDS_A_ROW * len(x))
        return problem.denoiser(x, t)

    return SampledWorkload(problem._replace(denoiser=denoiser), trained=False)


@cache
def trained(steps: int) -> SampledWorkload:
    return policy(demonstrations.train(steps))


def ddpm(steps: int) -> Workload:
    """The trained policy with a scheduler that adds noise."""
    scheduler = DDPMScheduler.from_config(demonstrations.scheduler().config)
    return SampledWorkload(trained(steps).samples._replace(scheduler=scheduler), trained=False)


def workloads(training_steps: int) -> dict[str, tuple[Callable[[], Workload], int]]:
    """By name: how to make it, and its number of steps."""
    robot = partial(trained, training_steps)
    return {
        **{f"digits {steps}": (digits, steps) for steps in (10, 25, 50, 100)},
        "digits 25, batch 8": (partial(digits, batch=8), 25),
        **{f"policy {steps}": (robot, steps) for steps in (25, 50, 100)},
        "policy 50, DDPM": (partial(ddpm, training_steps), 50),
        "untrained 50": (policy, 50),
        "compute-bound 25": (compute_bound, 25),
        "20 ms a row, 25": (slow, 25),
    }


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Another process that keeps a core busy."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def fixed_plans(workload: Workload, steps: int) -> list[Entrant]:
    """The sequential plan, and the fixed ones that are fastest in a second call."""
    stochastic = isinstance(workload, SampledWorkload) and isinstance(workload.samples.scheduler, DDPMScheduler)
    found = [told(workload, steps, plan.short(), plan=plan) for plan in candidates(steps, Settings(), stochastic)]
    for each in found:
        begin(each)
        each.call(0)
    running = [each for each in found if each.failed is None]
    limit = HOPELESS * min(each.median for each in running)
    sequential, *others = running
    near = [each for each in others if each.median <= limit]
    for each in near:
        each.seconds.clear()  # what a first call makes is not part of the others
        each.call(0)
    fastest = [sequential, *sorted(near, key=lambda each: each.median)[:BEST]]
    for each in fastest:
        each.seconds.clear()
    return fastest


def begin(entrant: Entrant) -> None:
    """Make its loop without a call: the first calls count."""
    assert entrant.make is not None
    entrant.loop = entrant.make()


def compared(name: str, workload: Workload, steps: int, calls: int) -> dict[str, Any]:
    """The shares of one workload."""
    stock, again = (Entrant(each, partial(workload.stock, steps)) for each in ("stock", "stock again"))
    fixed = fixed_plans(workload, steps)
    for each in (stock, again):
        each.call(None)
    auto = told(workload, steps, AUTO, method=AUTO)
    begin(auto)
    every, draw = [stock, again, *fixed, auto], random.Random(0)
    for number in range(calls):
        for each in draw.sample(every, len(every)):
            each.call(number)

    def later(each: Entrant) -> float:
        return sum(each.seconds[EXPLORED:])

    def pairs(each: Entrant, other: Entrant) -> float:
        both = zip(each.seconds[EXPLORED:], other.seconds[EXPLORED:], strict=True)
        return median(its / others for its, others in both)

    best, last = min(fixed, key=later), auto.reports[-1]
    return {
        "workload": name,
        "over_stock": later(auto) / later(stock),
        "over_best": later(auto) / later(best),
        "pairs_stock": pairs(auto, stock),
        "pairs_best": pairs(auto, best),
        "again": later(again) / later(stock),
        "pairs_again": pairs(again, stock),
        "first_calls": sum(auto.seconds[:EXPLORED]) / sum(stock.seconds[:EXPLORED]),
        "stock_ms": 1e3 * later(stock) / (calls - EXPLORED),
        "best": best.name,
        "method": last.method,
        "state": last.plan_state,
        "why": last.plan_reason,
        "seconds": {each.name: each.seconds for each in every},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    found = parser("bench.speed.never_slower", __doc__)
    found.add_argument("--calls", type=int, default=20)
    found.add_argument("--busy", action="store_true", help="beside another process that keeps a core busy")
    found.add_argument(
        "--only", nargs="+", default=None, metavar="WORKLOAD", help="some of: " + ", ".join(workloads(0))
    )
    found.add_argument("--training-steps", type=int, default=demonstrations.TRAINING_STEPS, help="of the policy")
    options = found.parse_args(arguments)
    known = workloads(options.training_steps)
    for name in options.only or ():
        if name not in known:
            found.error(f"there is no workload {name!r}")
    rows: list[dict[str, Any]] = []
    with busy(options.busy):
        for name in options.only or known:
            make, steps = known[name]
            rows.append(compared(name, make(), steps, options.calls))
            write(options.json, busy=options.busy, calls=options.calls, results=rows)
            print(f"{name}: {rows[-1]['why']}", flush=True)
    heads = {
        "workload": "workload",
        "stock_ms": "stock ms",
        "over_stock": "4-20 over stock",
        "over_best": "over best fixed",
        "pairs_stock": "pairs, stock",
        "pairs_best": "pairs, best",
        "again": "stock again",
        "pairs_again": "pairs, again",
        "first_calls": "1-3 over stock",
        "method": "auto ran",
        "best": "best fixed",
    }
    show_table([{heads[name]: row[name] for name in heads} for row in rows], {"workload", "auto ran", "best fixed"})


if __name__ == "__main__":
    main()
