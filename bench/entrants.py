"""Who is compared by bench/peers.py on a workload: stock loops, diffusers' own ParaDiGMS, and every method of ours."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, StableDiffusionParadigmsPipeline, StableDiffusionPipeline
from torch import Tensor

import srds_fast
from srds_fast.planner.candidates import fixed_at
from srds_fast.planner.plan import Plan

from . import policy_loops
from .contestants import CONTESTANTS, DEFAULT, PAPER, PARADIGMS_TOLERANCES, SELF_STOPPING
from .problems import Problem
from .reaching import GREY_LEVEL, Point, cheapest, difference, line, plan_of, sequential
from .rows import SMALL
from .workloads import Loop, PipelineWorkload, Ran, SampledWorkload, Workload

# grey levels, the 95th percentile of samples
BOUND = 0.5
# the paper's test: a mean change of a tenth of a grey level
PAPER_STOP = 0.1 * GREY_LEVEL
OWN_STOP = f"{PAPER}, its own stop"
STOCK, SEQUENTIAL, AUTO = "stock, eager", "sequential", "auto"
COMPILED = {mode: f"stock, torch.compile ({mode})" for mode in ("default", "reduce-overhead")}
BY_HAND = "by hand"
WINDOWS = (10, 25)
DIFFUSERS = {window: f"diffusers' ParaDiGMS, window {window}" for window in WINDOWS}
METHODS = (
    PAPER,
    "srds (default)",
    "srds (default), stops itself",
    DEFAULT,
    SELF_STOPPING,
    "parataa (default)",
    "parataa, as published",
    *(f"paradigms, window {window}" for window in WINDOWS),
    "chords, 4 cores",
    "chords, 8 cores",
)
# of our sequential loop; methods run on the first, but for those with a window, which slides by what every wave finds
ENGINES = ("eager",) if SMALL else ("graph", "eager")
# where weights are random no number of iterations is enough: about what a trained network needs at N = 50
ITERATIONS = {PAPER: 3, "srds (default)": 2, DEFAULT: 9, "parataa (default)": 9, "chords, 4 cores": 3}
WINDOW, WINDOW_TOLERANCE = "paradigms, window 10", 0.1


class Entrant(NamedTuple):
    """One way to make the call.

    Attributes:
        name: for tables.
        loop: None where there is none.
        why_not: there is none.
        setting: what it was told.
        bound: its setting was looked for: the cheapest within `BOUND`.
        compiles: the first calls compile its network.
        reference: what its samples are compared with, where that is not the stock loop.
    """

    name: str
    loop: Loop | None
    why_not: str | None = None
    setting: str = ""
    bound: bool = False
    compiles: bool = False
    reference: Loop | None = None


def reason(why: Exception) -> str:
    """An error as the reason why an entrant is left out."""
    return f"{type(why).__name__}: {' '.join(str(why).split())[:300]}"


def entrants(
    workload: Workload, steps: int, samples: int, compiled: dict[str, Any], not_compiled: dict[str, str]
) -> Iterator[Entrant]:
    """All of them; the stock loop is the first. One that cannot be made says why not.

    Args:
        samples: of the workload that settings are looked for with.
        compiled: mode -> the workload's network, compiled in it.
        not_compiled: mode -> why it is not.
    """
    yield _made(STOCK, _stock, workload, steps)
    for mode, name in COMPILED.items():
        if mode in compiled:
            yield _made(name, _stock_compiled, workload, steps, name, compiled[mode])
        else:
            yield Entrant(name, None, not_compiled[mode])
    if isinstance(workload, SampledWorkload) and workload.problem is not None:
        yield _made(BY_HAND, _by_hand, workload, steps)
    problem = None if workload.problem is None else workload.problem.first(samples)
    points = {} if problem is None else _cheapest(problem, steps)
    yield from _of_diffusers(workload, steps, samples, points)
    for engine in ENGINES:
        name = SEQUENTIAL if len(ENGINES) == 1 else f"{SEQUENTIAL}, {engine}"
        yield _made(name, _told, workload, steps, name, {"method": "sequential", "engine": engine}, "")
    if problem is None:
        for name, iterations in ITERATIONS.items():
            yield _made(name, _fixed, workload, steps, name, iterations)
        yield _made(WINDOW, _fixed_window, workload, steps)
    else:
        for name, point in points.items():
            yield _made(name, _at_equal_difference, workload, steps, name, point)
        yield _made(OWN_STOP, _as_the_paper_stops, workload, steps, problem)
    yield _made(AUTO, _told, workload, steps, AUTO, {"method": "auto"}, "default tolerance")


def _made(name: str, make: Callable[..., Entrant], *arguments: Any) -> Entrant:
    try:
        return make(*arguments)
    except Exception as why:  # of whoever it is: the others run
        return Entrant(name, None, reason(why))


def _stock(workload: Workload, steps: int) -> Entrant:
    return Entrant(STOCK, workload.stock(steps))


def _stock_compiled(workload: Workload, steps: int, name: str, network: Any) -> Entrant:
    return Entrant(name, workload.stock(steps, network), compiles=True)


def _told(workload: Workload, steps: int, name: str, settings: dict[str, Any], setting: str) -> Entrant:
    return Entrant(name, workload.ours(steps, settings), setting=setting)


def _by_hand(workload: SampledWorkload, steps: int) -> Entrant:
    network: Any = workload.network.network
    loop = policy_loops.by_hand(network, steps)

    def call(sample: int = 0) -> Tensor:
        one = workload.samples.one(sample)
        return loop(one.x, one.cond["observation"])[0]

    return Entrant(BY_HAND, Loop(call, lambda: Ran("by hand", None, "by hand", steps, steps, 1), lambda: [1] * steps))


def _fixed(workload: Workload, steps: int, name: str, iterations: int) -> Entrant:
    plan = CONTESTANTS[name].plan(steps)
    plan = fixed_at(plan, min(iterations, plan.max_iterations))
    return Entrant(name, _planned(workload, plan), setting=f"iteration {plan.max_iterations}")


def _fixed_window(workload: Workload, steps: int) -> Entrant:
    plan = CONTESTANTS[WINDOW].plan(steps, WINDOW_TOLERANCE)
    return Entrant(WINDOW, _planned(workload, plan), setting=f"tolerance {WINDOW_TOLERANCE:g}")


def _planned(workload: Workload, plan: Plan) -> Loop:
    return workload.ours(plan.num_inference_steps, {"plan": _on_engine(plan)})


def _on_engine(plan: Plan) -> Plan:
    return replace(plan, engine="eager" if plan.slides else ENGINES[0])


def _cheapest(problem: Problem, steps: int) -> dict[str, Point | str]:
    """Of every method the cheapest point within the bound, or why there is none; told on stderr as it goes."""
    try:
        reference = sequential(problem, steps)
    except Exception as why:
        return dict.fromkeys(METHODS, f"there is no sequential sample to compare with: {reason(why)}")
    found: dict[str, Point | str] = {}
    for name in METHODS:
        started = time.perf_counter()
        try:
            point = cheapest(line(CONTESTANTS[name], problem, steps, reference, (BOUND,)), BOUND)
            found[name] = point or f"not within {BOUND:g} grey levels before {steps} waves, or at any tolerance"
        except Exception as why:  # of whichever method: the others run
            found[name] = reason(why)
        print(f"{problem.name}, {steps} steps, {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


def _at_equal_difference(workload: Workload, steps: int, name: str, point: Point | str) -> Entrant:
    if isinstance(point, str):
        return Entrant(name, None, point)
    plan = plan_of(CONTESTANTS[name], steps, point)
    return Entrant(name, _planned(workload, plan), setting=point.setting, bound=True)


def _as_the_paper_stops(workload: Workload, steps: int, problem: Problem) -> Entrant:
    """Every sample told before how many iterations the paper's test takes for it: it never works ahead in vain."""
    plan = CONTESTANTS[PAPER].plan(steps)
    change = srds_fast.sample(
        problem.denoiser, problem.x, problem.scheduler, steps, cond=problem.cond, plan=plan
    ).report.change
    stops = [
        next((p for p, of_all in enumerate(change, 1) if (of_all[sample] or 0.0) < PAPER_STOP), len(change))
        for sample in range(len(problem.x))
    ]
    setting = f"change within 0.1: {statistics.mean(stops):.1f} iterations"
    loops = {stop: _planned(workload, fixed_at(plan, stop)) for stop in sorted(set(stops))}
    return Entrant(OWN_STOP, _by_sample([loops[stop] for stop in stops]), setting=setting)


def _by_sample(loops: list[Loop]) -> Loop:
    """A loop for every sample; what they record they record in the first call of all."""
    latest: list[Loop] = []

    def call(sample: int = 0) -> Tensor:
        if not latest:
            for loop in {id(each): each for each in loops}.values():
                loop.call()
        latest[:] = [loops[sample]]
        return loops[sample].call(sample)

    return Loop(call, lambda: latest[0].ran(), lambda: loops[0].widths())


def _of_diffusers(workload: Workload, steps: int, samples: int, points: dict[str, Point | str]) -> Iterator[Entrant]:
    """StableDiffusionParadigmsPipeline with the same parts.

    Its batched step always ends at an alpha of one, so it is compared with the stock loop of a scheduler that does.
    """
    why_not = _why_not_diffusers(workload)
    if why_not is not None:
        yield from (Entrant(name, None, why_not) for name in DIFFUSERS.values())
        return
    for window, name in DIFFUSERS.items():
        yield _made(name, _of_diffusers_window, workload, steps, samples, window, points)


def _of_diffusers_window(
    workload: PipelineWorkload, steps: int, samples: int, window: int, points: dict[str, Point | str]
) -> Entrant:
    name, reference = DIFFUSERS[window], _ending_at_one(workload, steps)
    tolerance: float | None = WINDOW_TOLERANCE
    if points:
        of_ours = points[f"paradigms, window {window}"]
        if isinstance(of_ours, str):
            return Entrant(
                name, None, f"not tried: it does what ours does wave for wave, and ours is left out: {of_ours}"
            )
        assert of_ours.tolerance is not None
        tolerance = _within(workload, steps, window, of_ours.tolerance, samples, reference)
    if tolerance is None:
        return Entrant(name, None, f"not within {BOUND:g} grey levels at any tolerance")
    loop = _paradigms(workload, steps, window, tolerance)
    return Entrant(name, loop, setting=f"tolerance {tolerance:.2g}", bound=bool(points), reference=reference)


def _why_not_diffusers(workload: Workload) -> str | None:
    if not isinstance(workload, PipelineWorkload) or type(workload.pipe) is not StableDiffusionPipeline:
        return "diffusers has it for StableDiffusionPipeline only"
    if not isinstance(workload.pipe.scheduler, DDIMScheduler):
        return f"diffusers has it for DDIM and DDPM only, this is {type(workload.pipe.scheduler).__name__}"
    return None


def _within(
    workload: PipelineWorkload, steps: int, window: int, loosest: float, samples: int, reference: Loop
) -> float | None:
    """The loosest tolerance within the bound, from that of our ParaDiGMS on: wave for wave it does the same."""
    expected = torch.cat([reference.call(sample).clone() for sample in range(samples)])
    for tolerance in (loosest, *(each for each in PARADIGMS_TOLERANCES if each < loosest)):
        call = _paradigms(workload, steps, window, tolerance).call
        found = torch.cat([call(sample) for sample in range(samples)])
        if float(difference(found, expected).quantile(0.95)) <= BOUND:
            return tolerance
    return None


def _ending_at_one(workload: PipelineWorkload, steps: int) -> Loop:
    pipe = copy.copy(workload.pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, set_alpha_to_one=True)
    return Loop(
        lambda sample=0: workload.called(pipe, steps, sample),
        lambda: Ran("stock", None, "stock", steps, steps, 1),
        lambda: [1] * steps,
    )


def _paradigms(workload: PipelineWorkload, steps: int, window: int, tolerance: float) -> Loop:
    parts = {part: each for part, each in workload.pipe.components.items() if part != "image_encoder"}
    parts["scheduler"] = DDIMParallelScheduler.from_config(parts["scheduler"].config)
    pipe = StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    widths: list[int] = []

    @torch.no_grad()
    def call(sample: int = 0) -> Tensor:
        widths.clear()
        watch = pipe.unet.register_forward_pre_hook(
            lambda _, given: widths.append(len(given[0]) // workload.network.entries)
        )
        try:
            arguments = workload.arguments(steps, sample)
            images: Tensor = pipe(**arguments, parallel=window, tolerance=tolerance).images
        finally:
            watch.remove()
        return images

    def ran() -> Ran:
        return Ran("diffusers", None, "paradigms", len(widths), sum(widths), max(widths))

    return Loop(call, ran, lambda: list(widths))
