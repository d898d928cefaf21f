"""Who is compared on a workload: stock loops, diffusers' own ParaDiGMS, and every method of ours."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, StableDiffusionParadigmsPipeline, StableDiffusionPipeline
from torch import Tensor

from bench.runner import AUTO, BY_HAND, SEQUENTIAL, STOCK, Entrant, told
from bench.speed.timing import reason, timed
from bench.workloads import demonstrations
from bench.workloads.networks import SMALL
from bench.workloads.problems import Problem
from bench.workloads.samplers import Loop, PipelineWorkload, SampledWorkload, Workload, one_by_one
from srds_fast import Report
from srds_fast.planner.plan import Plan

from .contestants import CONTESTANTS, DEFAULT, PAPER, SRDS
from .search import cheapest, line

# grey levels, the 95th percentile of samples
BOUND = 0.5
COMPILED = {mode: f"stock, torch.compile ({mode})" for mode in ("default", "reduce-overhead")}
DIFFUSERS = {window: f"diffusers' ParaDiGMS, window {window}" for window in (10, 25)}
METHODS = tuple(name for name, each in CONTESTANTS.items() if each.peer)
# methods run on the first, except sliding windows, whose waves depend on results
ENGINES = ("eager",) if SMALL else ("graph", "eager")
# for random weights, where no number of iterations is enough: about what a trained network needs at N = 50
ITERATIONS = {PAPER: 3, SRDS: 2, DEFAULT: 9, "parataa (default)": 9, "chords, 4 cores": 3}
WINDOW, WINDOW_TOLERANCE = "paradigms, window 10", 0.1
Settings = dict[str, tuple[Plan, str] | str]
"""method -> its plan and the setting in words, or why there is none"""


def entrants(workload: Workload, steps: int, samples: int, compiles: bool) -> Iterator[Entrant]:
    """All of them, the stock loop first. One that cannot be made says why not.

    Args:
        samples: of the workload that settings are searched with.
        compiles: torch.compile takes part. It finds what it has compiled for other steps.
    """
    yield Entrant(STOCK, partial(workload.stock, steps))
    for mode, name in COMPILED.items():
        if not compiles:
            yield Entrant(name, None, failed="--smoke or --no-compile leaves it out")
        elif SMALL and mode == "reduce-overhead":
            yield Entrant(name, None, failed="it is the default with CUDA graphs, and this is a CPU")
        else:
            network = torch.compile(workload.network, mode=mode, dynamic=False)
            yield Entrant(name, partial(workload.stock, steps, network), compiles=True)
    if isinstance(workload, SampledWorkload) and workload.problem is not None:
        yield Entrant(BY_HAND, partial(by_hand, workload, steps))
    trained = workload.problem is not None
    settings = _fixed(steps) if workload.problem is None else _searched(workload.problem.only(slice(samples)), steps)
    yield from of_diffusers(workload, steps, settings)
    for engine in ENGINES:
        name = SEQUENTIAL if len(ENGINES) == 1 else f"{SEQUENTIAL}, {engine}"
        yield told(workload, steps, name, method="sequential", engine=engine)
    for name, found in settings.items():
        if isinstance(found, str):
            yield Entrant(name, None, failed=found)
        else:
            plan, setting = found
            plan = replace(plan, engine="eager" if plan.slides else ENGINES[0])
            yield Entrant(name, partial(workload.ours, steps, {"plan": plan}), setting, bound=trained)
    yield told(workload, steps, AUTO, "default tolerance", method="auto")


def by_hand(workload: SampledWorkload, steps: int) -> Loop:
    """The sequential loop that one would write for this policy alone: nothing but arithmetic between two calls."""
    network = workload.network
    ddim = demonstrations.scheduler()
    ddim.set_timesteps(steps)
    abar = ddim.alphas_cumprod[ddim.timesteps].double()
    times = ddim.timesteps.to(next(network.parameters()).device)
    after = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
    columns = (1 / abar.sqrt(), -((1 - abar) / abar).sqrt(), after.sqrt(), (1 - after).sqrt())
    numbers = list(zip(times.split(1), *(column.tolist() for column in columns), strict=True))

    @torch.inference_mode()
    def call(sample: int = 0) -> Tensor:
        one = workload.samples.one(sample)
        x, observation = one.x, one.cond["observation"]
        for t, p, q, a, s in numbers:
            m = network(x, t, observation)
            x0 = torch.add(p * x, m, alpha=q).clamp_(-1.0, 1.0)
            x = torch.add(s * m, x0, alpha=a)
        return x

    return one_by_one(call, BY_HAND, steps)


def _fixed(steps: int) -> Settings:
    found: Settings = {WINDOW: (CONTESTANTS[WINDOW].plan(steps, WINDOW_TOLERANCE), f"tolerance {WINDOW_TOLERANCE:g}")}
    for name, iterations in ITERATIONS.items():
        plan = CONTESTANTS[name].plan(steps, iteration=iterations)
        found[name] = plan, f"iteration {plan.max_iterations}"
    return found


def _searched(problem: Problem, steps: int) -> Settings:
    """The cheapest setting of every method within the bound; progress is told on stderr."""
    reference = functools.cache(partial(problem.sequential, steps))

    def search(name: str) -> tuple[Plan, str] | str:
        try:
            point = cheapest(line(CONTESTANTS[name], problem, steps, reference(), (BOUND,)), BOUND)
        except Exception as why:  # whatever it raises: the others run
            return reason(why)
        if point is None:
            return f"not within {BOUND:g} grey levels before {steps} waves, or at any tolerance"
        return CONTESTANTS[name].plan(steps, point.tolerance, point.iteration), point.setting

    found: Settings = {}
    for name in METHODS:
        seconds, found[name] = timed(partial(search, name))
        print(f"{problem.name}, {steps} steps, {name}: {seconds:.0f} s", file=sys.stderr)
    return found


def of_diffusers(workload: Workload, steps: int, settings: Settings) -> Iterator[Entrant]:
    """StableDiffusionParadigmsPipeline with the same parts, at the tolerance of our ParaDiGMS with the same window.

    Its batched step always ends at an alpha of one, so it is compared with the stock loop of a scheduler that does.
    """
    for window, name in DIFFUSERS.items():
        ours = settings.get(f"paradigms, window {window}")
        if not isinstance(workload, PipelineWorkload) or type(workload.pipe) is not StableDiffusionPipeline:
            yield Entrant(name, None, failed="diffusers has it for StableDiffusionPipeline only")
        elif not isinstance(workload.pipe.scheduler, DDIMScheduler):
            kind = type(workload.pipe.scheduler).__name__
            yield Entrant(name, None, failed=f"diffusers has it for DDIM and DDPM only, this is {kind}")
        elif isinstance(ours, str):
            yield Entrant(name, None, failed=f"not tried: our ParaDiGMS with the same waves is left out: {ours}")
        else:
            tolerance = WINDOW_TOLERANCE if ours is None else ours[0].options.step_tolerance
            make = partial(diffusers_paradigms, workload, steps, window, tolerance)
            pipe = copy.copy(workload.pipe)
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, set_alpha_to_one=True)
            expected = functools.cache(partial(workload.called, pipe, steps))
            yield Entrant(name, make, f"tolerance {tolerance:.2g}", reference=expected)


def diffusers_paradigms(workload: PipelineWorkload, steps: int, window: int, tolerance: float) -> Loop:
    """A loop of diffusers' pipeline; a wave is one call of its network."""
    parts = {part: each for part, each in workload.pipe.components.items() if part != "image_encoder"}
    parts["scheduler"] = DDIMParallelScheduler.from_config(parts["scheduler"].config)
    pipe = StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    widths: list[int] = []

    @torch.no_grad()
    def call(sample: int = 0) -> Tensor:
        widths.clear()
        # other loops call this network too, so it is watched during this call alone
        watch = pipe.unet.register_forward_pre_hook(lambda _, given: widths.append(len(given[0]) // workload.entries))
        with watch:
            images: Tensor = pipe(**workload.arguments(steps, sample), parallel=window, tolerance=tolerance).images
        return images

    def report() -> Report:
        waves, rows = len(widths), sum(widths)
        return Report("paradigms", "diffusers", "stock", steps, waves=waves, rows=rows, peak_rows=max(widths))

    return Loop(call, report, widths.copy)
