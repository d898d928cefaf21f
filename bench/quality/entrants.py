"""Who is compared on a workload: stock loops, diffusers' own ParaDiGMS, and every method of ours."""

from __future__ import annotations

import copy
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, StableDiffusionParadigmsPipeline, StableDiffusionPipeline
from torch import Tensor

from bench.runner import AUTO, BY_HAND, SEQUENTIAL, STOCK, Entrant, left_out, told
from bench.speed.timing import reason, timed
from bench.workloads import demonstrations
from bench.workloads.networks import SMALL
from bench.workloads.problems import GREY_LEVEL, Problem, difference
from bench.workloads.samplers import Loop, PipelineWorkload, SampledWorkload, Workload, one_by_one
from srds_fast import Report
from srds_fast.planner.choose import fixed_at
from srds_fast.planner.plan import Plan

from .contestants import CONTESTANTS, DEFAULT, PAPER, PARADIGMS_TOLERANCES, SRDS
from .search import Point, cheapest, line, plan_of

# grey levels, the 95th percentile of samples
BOUND = 0.5
# the paper's test: a mean change of a tenth of a grey level
PAPER_STOP = 0.1 * GREY_LEVEL
OWN_STOP = f"{PAPER}, its own stop"
COMPILED = {mode: f"stock, torch.compile ({mode})" for mode in ("default", "reduce-overhead")}
WINDOWS = (10, 25)
DIFFUSERS = {window: f"diffusers' ParaDiGMS, window {window}" for window in WINDOWS}
METHODS = tuple(name for name, each in CONTESTANTS.items() if each.peer)
# methods run on the first, except sliding windows, whose waves depend on results
ENGINES = ("eager",) if SMALL else ("graph", "eager")
# for random weights, where no number of iterations is enough: about what a trained network needs at N = 50
ITERATIONS = {PAPER: 3, SRDS: 2, DEFAULT: 9, "parataa (default)": 9, "chords, 4 cores": 3}
WINDOW, WINDOW_TOLERANCE = "paradigms, window 10", 0.1
Points = dict[str, Point | str]
"""method -> its cheapest point within the bound, or why there is none"""


def entrants(workload: Workload, steps: int, samples: int, compiles: bool) -> Iterator[Entrant]:
    """All of them, the stock loop first. One that cannot be made says why not.

    Args:
        samples: of the workload that settings are searched with.
        compiles: torch.compile takes part. It finds what it has compiled for other steps.
    """
    yield Entrant(STOCK, partial(workload.stock, steps))
    for mode, name in COMPILED.items():
        if not compiles:
            yield left_out(name, "--smoke or --no-compile leaves it out")
        elif SMALL and mode == "reduce-overhead":
            yield left_out(name, "it is the default with CUDA graphs, and this is a CPU")
        else:
            network = torch.compile(workload.network, mode=mode, dynamic=False)
            yield Entrant(name, partial(workload.stock, steps, network), compiles=True)
    if isinstance(workload, SampledWorkload) and workload.problem is not None:
        yield Entrant(BY_HAND, partial(by_hand, workload, steps))
    problem = None if workload.problem is None else workload.problem.only(slice(samples))
    points = {} if problem is None else _searched(problem, steps)
    yield from of_diffusers(workload, steps, samples, points)
    for engine in ENGINES:
        name = SEQUENTIAL if len(ENGINES) == 1 else f"{SEQUENTIAL}, {engine}"
        yield told(workload, steps, name, method="sequential", engine=engine)
    if problem is None:
        for name, iterations in ITERATIONS.items():
            plan = CONTESTANTS[name].plan(steps)
            plan = fixed_at(plan, min(iterations, plan.max_iterations))
            yield Entrant(name, partial(_loop, workload, plan), f"iteration {plan.max_iterations}")
        plan = CONTESTANTS[WINDOW].plan(steps, WINDOW_TOLERANCE)
        yield Entrant(WINDOW, partial(_loop, workload, plan), f"tolerance {WINDOW_TOLERANCE:g}")
    for name, point in points.items():
        if isinstance(point, str):
            yield left_out(name, point)
        else:
            plan = plan_of(CONTESTANTS[name], steps, point)
            yield Entrant(name, partial(_loop, workload, plan), point.setting, bound=True)
    if problem is not None:
        yield attempted(OWN_STOP, partial(_as_the_paper_stops, workload, steps, problem))
    yield told(workload, steps, AUTO, "default tolerance", method="auto")


def attempted(name: str, make: Callable[[], Entrant]) -> Entrant:
    """An entrant whose setting is found first, or the reason why it cannot be: the others run."""
    try:
        return make()
    except Exception as why:  # whatever it raises
        return left_out(name, reason(why))


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


def _loop(workload: Workload, plan: Plan) -> Loop:
    plan = replace(plan, engine="eager" if plan.slides else ENGINES[0])
    return workload.ours(plan.num_inference_steps, {"plan": plan})


def _searched(problem: Problem, steps: int) -> Points:
    """The points of all methods; progress is told on stderr."""
    try:
        reference = problem.sequential(steps)
    except Exception as why:
        return dict.fromkeys(METHODS, f"there is no sequential sample to compare with: {reason(why)}")

    def search(name: str) -> Point | str:
        try:
            point = cheapest(line(CONTESTANTS[name], problem, steps, reference, (BOUND,)), BOUND)
        except Exception as why:  # whatever it raises: the others run
            return reason(why)
        return point or f"not within {BOUND:g} grey levels before {steps} waves, or at any tolerance"

    found: Points = {}
    for name in METHODS:
        seconds, found[name] = timed(partial(search, name))
        print(f"{problem.name}, {steps} steps, {name}: {seconds:.0f} s", file=sys.stderr)
    return found


def _as_the_paper_stops(workload: Workload, steps: int, problem: Problem) -> Entrant:
    """Every sample is told before how many iterations the paper's test takes for it: no row is evaluated in vain."""
    plan = CONTESTANTS[PAPER].plan(steps)
    change = problem.sampled(steps, plan=plan).report.change
    stops = [
        next((p for p, of_all in enumerate(change, 1) if (of_all[sample] or 0.0) < PAPER_STOP), len(change))
        for sample in range(len(problem.x))
    ]
    loops = {stop: _loop(workload, fixed_at(plan, stop)) for stop in sorted(set(stops))}
    latest: list[Loop] = []

    def call(sample: int = 0) -> Tensor:
        if not latest:  # what they record they record in the first call of all
            for loop in loops.values():
                loop.call()
        latest[:] = [loops[stops[sample]]]
        return latest[0].call(sample)

    setting = f"change within 0.1: {statistics.mean(stops):.1f} iterations"
    return Entrant(OWN_STOP, lambda: Loop(call, lambda: latest[0].report()), setting)


def of_diffusers(workload: Workload, steps: int, samples: int, points: Points) -> Iterator[Entrant]:
    """StableDiffusionParadigmsPipeline with the same parts.

    Its batched step always ends at an alpha of one, so it is compared with the stock loop of a scheduler that does.

    Args:
        points: what was found for our ParaDiGMS, whose waves are the same; empty: differences mean nothing.
    """
    why_not = None
    if not isinstance(workload, PipelineWorkload) or type(workload.pipe) is not StableDiffusionPipeline:
        why_not = "diffusers has it for StableDiffusionPipeline only"
    elif not isinstance(workload.pipe.scheduler, DDIMScheduler):
        why_not = f"diffusers has it for DDIM and DDPM only, this is {type(workload.pipe.scheduler).__name__}"
    for window, name in DIFFUSERS.items():
        point = points.get(f"paradigms, window {window}")
        if why_not is not None:
            yield left_out(name, why_not)
        elif isinstance(point, str):
            yield left_out(name, f"not tried: our ParaDiGMS, which runs the same waves, is left out: {point}")
        else:
            yield attempted(name, partial(_of_window, workload, steps, samples, window, point))


def _of_window(workload: PipelineWorkload, steps: int, samples: int, window: int, point: Point | None) -> Entrant:
    name, tolerance = DIFFUSERS[window], WINDOW_TOLERANCE
    pipe = copy.copy(workload.pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, set_alpha_to_one=True)

    @functools.cache
    def reference(sample: int) -> Tensor:
        return workload.called(pipe, steps, sample).double().cpu()

    if point is not None:
        expected, loosest = torch.cat([reference(sample) for sample in range(samples)]), point.tolerance
        for tolerance in (loosest, *(each for each in PARADIGMS_TOLERANCES if each < loosest)):
            call = diffusers_paradigms(workload, steps, window, tolerance).call
            found = torch.cat([call(sample).cpu() for sample in range(samples)])
            if float(difference(found, expected).quantile(0.95)) <= BOUND:
                break
        else:
            return left_out(name, f"not within {BOUND:g} grey levels at any tolerance")
    loop, setting = diffusers_paradigms(workload, steps, window, tolerance), f"tolerance {tolerance:.2g}"
    return Entrant(name, lambda: loop, setting, bound=point is not None, reference=reference)


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

    return Loop(call, report)
