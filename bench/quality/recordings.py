"""What a method does with each sample, iteration by iteration, and where a rule stops it.

Recording asks the network; judging does not: another rule can be tried on what was recorded before.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.workloads.problems import GREY_LEVEL, Problem, difference
from srds_fast.engine.run import core_of
from srds_fast.kernels.wave_update import NetworkInput
from srds_fast.planner.plan import Plan
from srds_fast.sampling.rows import RowDenoiser, state_dtype
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import Answer, Checkpoint, Evaluate, SolverInputs
from srds_fast.solvers.convergence import Contraction, Diverged, Monitor, Signs

# a sample is recorded until it has stopped and stays within the tolerance for so many more iterations
FURTHER = 2
WITHIN, QUANTILE = 0.5, 0.95  # in grey levels


class Cost(NamedTuple):
    """Network calls one after another, and evaluations; of one sample, or a mean."""

    waves: float
    rows: float


class Stop(NamedTuple):
    """A sample that has stopped by itself.

    Attributes:
        error: its `difference` to the sequential one, in grey levels.
        told: the report says that it is within the tolerance.
    """

    waves: float
    rows: float
    error: float
    told: bool = True


class Sample(NamedTuple):
    """One sample by iteration: what it shows, None where there is no change, and errors as of `Stop`."""

    signs: list[Signs | None]
    errors: list[float]


@dataclass(frozen=True)
class Recording:
    """Samples of a method, N steps, run further than they would have gone.

    Attributes:
        iterations: the numbers of those that end with a whole sample; exact: it is the sequential one by construction.
        stopped: cost of a run that stops there; planned: of one that is told before to end there.
        samples: each as far as it was run.
        ends: instead of all these, where the window of a method slides: it has no whole sample before the end.
    """

    problem: str
    steps: int
    method: str
    iterations: list[int] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    stopped: list[Cost] = field(default_factory=list)
    planned: list[Cost] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ends: list[Stop] = field(default_factory=list)

    @classmethod
    def read(cls, found: dict[str, Any]) -> Recording:
        """One of a JSON file, where tuples are lists."""
        kinds = {"stopped": Cost, "planned": Cost, "samples": _sample, "ends": Stop}
        return cls(**found | {name: [kind(*each) for each in found[name]] for name, kind in kinds.items()})

    def stops(self, tolerance: float, contraction: Contraction) -> list[Stop]:
        """Where the product stops each sample."""
        return self.ends or [self._stop(sample, tolerance, contraction) for sample in self.samples]

    def _stop(self, sample: Sample, tolerance: float, contraction: Contraction) -> Stop:
        judge = Judge(tolerance, contraction)
        for index, (signs, error) in enumerate(zip(*sample, strict=True)):
            if judge.stops(self.iterations[index], signs, self.exact[index]):
                waves, rows = self.stopped[index]
                # after a method has diverged the product takes the sequential steps
                diverged = Stop(waves + self.steps, rows + self.steps, 0.0)
                return diverged if judge.diverged else Stop(waves, rows, error)
        return Stop(*self.stopped[len(sample.errors) - 1], sample.errors[-1])

    def fixed(self) -> Cost | None:
        """Of the fewest waves from which on 95 % of the samples stay within half a grey level; None: they never do.

        A sample that was not run as far as others keeps its last error.
        """
        longest = [[*each.errors, *each.errors[-1:] * (len(self.planned) - len(each.errors))] for each in self.samples]
        if not longest:
            return None
        return self._from_then_on(torch.tensor(longest, dtype=torch.float64).quantile(QUANTILE, 0).tolist())

    def oracle(self) -> Cost | None:
        """The mean, each sample told from which wave on it stays within half a grey level; N where it does not."""
        sequential = Cost(self.steps, self.steps)
        found = [self._from_then_on(each.errors) or sequential for each in self.samples]
        return mean_cost(found) if found else None

    def _from_then_on(self, errors: list[float]) -> Cost | None:
        stay = sum(1 for _ in takewhile(lambda error: error <= WITHIN, reversed(errors)))
        return self.planned[len(errors) - stay] if stay else None


def _sample(signs: list[list[float] | None], errors: list[float]) -> Sample:
    return Sample([None if each is None else Signs(*each) for each in signs], errors)


class Judge:
    """Stops one sample by the product's rule, or where it diverges."""

    def __init__(self, tolerance: float, contraction: Contraction) -> None:
        self._monitor = Monitor(1, tolerance, bitwise=False, contraction=contraction)
        self.diverged = False
        self.further = 0  # iterations since it has stopped

    def stops(self, iteration: int, signs: Signs | None, exact: bool) -> bool:
        """Whether it stops here, or did before; arguments as in `Checkpoint`, all iterations in turn."""
        if self.diverged or self._monitor.converged[0]:
            self.further += 1
        elif signs is not None:
            try:
                self._monitor.judge(iteration, (0,), (signs,), exact, (False,))
            except Diverged:
                self.diverged = True
        return self.diverged or self._monitor.converged[0]


def mean_cost(costs: Sequence[Cost | Stop]) -> Cost:
    return Cost(mean(each.waves for each in costs), mean(each.rows for each in costs))


def recorded(problem: Problem, method: str, plan: Plan, reference: Tensor, further: int | None = FURTHER) -> Recording:
    """Run each sample until it has stopped by the product's rule and is within the tolerance, or has taken N waves.

    Args:
        plan: as a user gets it.
        reference: the sequential samples.
        further: iterations after that; None: none, also where it has stopped beyond the tolerance.
    """
    found = Recording(problem.name, plan.num_inference_steps, method)
    if plan.slides:
        found.ends.extend(_ends(problem, plan, reference))
        return found
    program, tolerance = plan.program(), plan.tolerance / GREY_LEVEL
    contraction = plan.options.contraction_of(stochastic=problem.adds_noise)
    judges = [Judge(plan.tolerance, contraction) for _ in reference]
    found.samples.extend(Sample([], []) for _ in reference)

    def goes_on(number: int, signs: Signs | None, error: float) -> bool:
        judge, (shown, errors) = judges[number], found.samples[number]
        shown.append(signs)
        errors.append(error)
        if not judge.stops(found.iterations[-1], signs, found.exact[-1]):
            return True
        if judge.diverged or found.stopped[-1].waves >= found.steps or further is None:
            return False
        return judge.further < further or max(errors[-1 - further :]) > tolerance

    def keep(checkpoint: Checkpoint) -> tuple[int, ...]:
        iteration = checkpoint.iteration
        found.iterations.append(iteration)
        found.exact.append(checkpoint.exact)
        found.stopped.append(Cost(*program.spent(iteration)[:2]))
        # SRDS begins rows for later iterations, but not if it is told before to end with this one
        ended = replace(plan, max_iterations=iteration).program() if plan.method == "srds" else program
        found.planned.append(Cost(*ended.spent(iteration)[:2]))
        errors = difference(checkpoint.sample, reference[list(checkpoint.samples)]).nan_to_num(math.inf).tolist()
        shown = [None] * len(errors) if checkpoint.change is None else checkpoint.signs()
        seen = enumerate(zip(checkpoint.samples, shown, errors, strict=True))
        return tuple(position for position, each in seen if goes_on(*each))

    _run(problem, plan, keep)
    return found


@torch.no_grad()
def _run(problem: Problem, plan: Plan, keep: Callable[[Checkpoint], tuple[int, ...]]) -> None:
    """Run all samples together; keep tells at each checkpoint which positions of its samples go on."""
    scheduler = copy.deepcopy(problem.scheduler)
    scheduler.set_timesteps(plan.num_inference_steps)
    noise, program, x = noise_table(scheduler), plan.program(), problem.x
    inputs = SolverInputs(draws=problem.draws(noise), network=NetworkInput(x.dtype), scaled=True)
    core = core_of(plan, x.to(state_dtype(x.dtype)), noise, program, inputs)
    evaluate = RowDenoiser(problem.denoiser, x, noise, program, problem.cond)
    answer: Answer = None
    with contextlib.suppress(StopIteration):
        while True:
            event = core.send(answer)
            answer = evaluate(event) if isinstance(event, Evaluate) else keep(event)


@torch.no_grad()
def _ends(problem: Problem, plan: Plan, reference: Tensor) -> list[Stop]:
    """Run all samples at the same time, each as if it were alone: the window of a batch slides as its slowest does.

    The rows of all windows are evaluated in one network call.
    """
    scheduler = copy.deepcopy(problem.scheduler)
    scheduler.set_timesteps(plan.num_inference_steps)
    noise, program, x = noise_table(scheduler), plan.program(), problem.x
    draws, states = problem.draws(noise), x.to(state_dtype(x.dtype)).split(1)
    each_draws = [None] * len(states) if draws is None else draws.split(1, dim=1)
    cores = [
        core_of(plan, state, noise, program, SolverInputs(draws=drawn, network=NetworkInput(x.dtype), scaled=True))
        for state, drawn in zip(states, each_draws, strict=True)
    ]
    answers: list[Answer] = [None] * len(cores)
    waves, rows, ends = [0] * len(cores), [0] * len(cores), {}
    while len(ends) < len(cores):
        asked: dict[int, Evaluate] = {}
        for sample in [each for each in range(len(cores)) if each not in ends]:
            event = cores[sample].send(answers[sample])
            if isinstance(event, Evaluate):
                asked[sample] = event
                waves[sample] += 1
                rows[sample] += len(event.positions)
            else:
                ends[sample] = event
        if asked:
            counts = [len(each.positions) for each in asked.values()]
            t = noise.timesteps[[position for each in asked.values() for position in each.positions]].to(x.device)
            which = torch.tensor(list(asked)).repeat_interleave(torch.tensor(counts)).to(x.device)
            cond = {name: value[which] for name, value in problem.cond.items()}
            found = problem.denoiser(torch.cat([each.x.flatten(0, 1) for each in asked.values()]), t, **cond)
            for sample, output in zip(asked, found.split(counts), strict=True):
                answers[sample] = output.reshape(asked[sample].x.shape)
    return [_end(ends[each], waves[each], rows[each], reference[each, None], plan) for each in range(len(cores))]


def _end(checkpoint: Checkpoint, waves: int, rows: int, expected: Tensor, plan: Plan) -> Stop:
    if not bool(checkpoint.sample.isfinite().all()):
        # the product takes the sequential steps then
        return Stop(waves + plan.num_inference_steps, rows + plan.num_inference_steps, 0.0)
    assert checkpoint.error is not None, "a window that slides ends a run by itself"
    told = float(checkpoint.error) <= plan.tolerance
    return Stop(waves, rows, float(difference(checkpoint.sample, expected)), told)
