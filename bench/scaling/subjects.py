"""What the processes sample: the bundled pipeline under guidance, and the bundled robot policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from diffusers import DDIMScheduler
from torch import Tensor

import srds_fast
from bench.workloads.pipelines import random
from bench.workloads.problems import Problem
from bench.workloads.samplers import SAMPLES, digits
from srds_fast import Report, zoo
from srds_fast.engine.costs import Costs, price
from srds_fast.engine.distributed import call as distributed
from srds_fast.engine.distributed.ranks import ranks_of
from srds_fast.engine.eager import Evaluator
from srds_fast.kernels.wave_update import NetworkInput
from srds_fast.pipelines.dry_run import planned
from srds_fast.planner.plan import Plan
from srds_fast.planner.search import Pricing
from srds_fast.sampling.rows import RowDenoiser
from srds_fast.sampling.session import Session
from srds_fast.schedulers.table import NoiseTable
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import SolverInputs
from srds_fast.solvers.program import Program
from srds_fast.solvers.registry import AUTO


@dataclass(frozen=True)
class Parts:
    """What a call for N steps is made of. state: starting noise, [1, ...]; units: of a row."""

    evaluator: Callable[[Program], Evaluator]
    state: Tensor
    noise: NoiseTable
    inputs: SolverInputs
    units: int


@dataclass(frozen=True)
class Subject:
    """What is sampled.

    Attributes:
        call: (steps, plan, parallel, sample) -> report of one call; None: it chooses its plan, as "auto".
        pricing: (steps, parallel) -> the planner's costs of such calls.
        parts: steps -> what such a call is made of.
        unit_bytes: of the output of a unit.
    """

    call: Callable[[int, Plan | None, Any, int], Report]
    pricing: Callable[[int, Any], Pricing]
    parts: Callable[[int], Parts]
    unit_bytes: int


def digits_under_guidance() -> Subject:
    """The bundled pipeline: two guidance branches a row."""
    workload = digits()

    @cache
    def compiled(plan: Plan | None, parallel: Any) -> Any:
        return srds_fast.compile(workload.pipe, parallel=parallel, **({} if plan is None else {"plan": plan}))

    def call(steps: int, plan: Plan | None, parallel: Any, sample: int) -> Report:
        fast = compiled(plan, parallel)
        fast(**workload.arguments(steps, sample))
        report: Report = fast.report
        return report

    def session(steps: int, parallel: Any) -> Session:
        return planned(srds_fast.compile(workload.pipe, explore=0.0, parallel=parallel), (), workload.arguments(steps))

    def parts(steps: int) -> Parts:
        found = session(steps, None)
        assert found.network is not None
        return Parts(found.network.evaluator, found.state, found.noise, found.inputs, workload.entries)

    def pricing(steps: int, parallel: Any) -> Pricing:
        return session(steps, parallel).price()

    return Subject(call, pricing, parts, 4 * 8 * 8 * 4)


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

    def call(steps: int, plan: Plan | None, parallel: Any, sample: int) -> Report:
        how = {"method": AUTO} if plan is None else {"plan": plan}
        return problem.one(sample % len(problem.x)).sampled(steps, parallel=parallel, **how).report

    one = problem.one(0)

    def parts(steps: int) -> Parts:
        scheduler = DDIMScheduler.from_config(problem.scheduler.config)
        scheduler.set_timesteps(steps)
        noise = noise_table(scheduler)

        def evaluator(program: Program) -> RowDenoiser:
            return RowDenoiser(one.denoiser, one.x, noise, program, one.cond)

        return Parts(evaluator, one.x, noise, SolverInputs(network=NetworkInput(one.x.dtype), scaled=True), 1)

    def pricing(steps: int, parallel: Any) -> Pricing:
        of = parts(steps)
        given = of.evaluator, of.state, of.noise, of.inputs, one.x.dtype
        with distributed.sharing(ranks_of(parallel)):
            return price(Costs(), problem.name, *given, replayed=False)

    return Subject(call, pricing, parts, unit_bytes)


SUBJECTS: dict[str, Callable[[], Subject]] = {"digits, guidance": digits_under_guidance, "policy": policy}
