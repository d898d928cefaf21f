"""Calls that measure costs and needed iterations, for planning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import progress
from ..errors import Cancelled, InvalidArgument
from ..planner.calibration import calibrated
from ..planner.plan import Plan
from ..sampling.session import Session
from ..solvers.checks import check_whole
from ..solvers.contract import Checkpoint
from ..words import counted
from .call import run_call
from .modular.arguments import is_modular
from .own_draws import with_own_draws
from .state import Last, PipelineCall, undecoded, with_state
from .stock import NO_STEP, order_of, refuse_stock_loop

logger = logging.getLogger("srds_fast")

# arguments that take a part of the steps; each family of pipelines rounds in its own way
PARTS = ("strength", "denoising_start", "denoising_end")


def turns_told(call: PipelineCall) -> int | None:
    """Number of turns of a call's loop, from the arguments alone; None: they do not tell.

    Schedulers of second order, as Heun, take two turns a step, but for the last step.
    """
    fast, arguments = call.fast, call.arguments
    if is_modular(fast.original) or any(arguments.get(name) is not None for name in PARTS):
        return None
    grid = next((arguments[name] for name in ("timesteps", "sigmas") if arguments.get(name) is not None), None)
    steps = arguments.get("num_inference_steps") if grid is None else len(grid)
    return None if steps is None else order_of(fast.scheduler) * (int(steps) - 1) + 1


def planned(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session:
    """The session of a call, with its `plan` and `pricing`; no wave is run, and no random generator advances.

    InvalidArgument: the call runs on the stock loop, which has no plan.
    """
    planning = _quiet(fast, plan_only=True)
    args, kwargs, draws = with_own_draws(PipelineCall.of(fast, args, kwargs))
    run_call(planning, args, {**kwargs, **undecoded(fast)}, draws=draws)
    _refuse_interrupted(planning)
    session: Session | None = planning._srds.last.session
    refuse_stock_loop(None if session is not None else NO_STEP)
    assert session is not None
    return session


def calibrate(fast: Any, prompts: Sequence[Any], num_samples: int, quantile: float, kwargs: dict[str, Any]) -> Plan:
    """See `Compiled.calibrate`; also stores the plan in the state."""
    planner = fast._srds.planner
    check_whole("num_samples", num_samples, 1)
    if isinstance(prompts, str | dict):
        prompts = [prompts]
    if not prompts:
        raise InvalidArgument("No prompts were given. Calibration runs them. Pass prompts like those of later calls.")
    if kwargs.get("generator") is not None:
        raise InvalidArgument("A generator was given. Calibration seeds every sample itself. Leave the generator out.")
    if kwargs.get("callback_on_step_end") is not None:
        raise InvalidArgument(
            "callback_on_step_end was given. Calibration would call it for every sample of every plan. Leave it out."
        )
    if planner.plan is not None:
        raise InvalidArgument("The pipeline was compiled with a plan, which fixes every setting. Compile it without.")

    def arguments(sample: int) -> dict[str, Any]:
        prompt = prompts[sample % len(prompts)]
        given = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        return {**kwargs, **undecoded(fast), **given, "generator": torch.Generator().manual_seed(sample)}

    session = planned(fast, (), arguments(0))
    pricing = session.pricing
    if pricing is None:
        raise InvalidArgument(
            "This call has a single step, or an argument of a type that is not known. The cost of its network calls "
            "cannot be measured before the call, so it cannot be calibrated. Compile with max_iterations instead."
        )
    num_steps, stochastic = session.plan.num_inference_steps, session.stochastic

    def run(plan: Plan) -> list[tuple[int, Tensor]]:
        eager = _quiet(
            fast,
            planner=replace(planner, plan=replace(plan, engine="eager")),
            options=replace(fast._srds.options, strict=True),
        )
        outputs: dict[int, list[Tensor]] = {}

        def keep(checkpoint: Checkpoint) -> None:
            outputs.setdefault(checkpoint.iteration, []).append(checkpoint.sample.clone())

        for sample in range(num_samples):
            _, given, draws = with_own_draws(PipelineCall.of(fast, (), arguments(sample)))
            run_call(eager, (), given, keep, draws=draws)
            _refuse_interrupted(eager)
            bar.update()
        return [(iteration, torch.cat(given)) for iteration, given in outputs.items() if len(given) == num_samples]

    context = session.context()
    given = num_steps, planner.settings, stochastic, pricing, run, quantile
    with progress.configured_by(fast), progress.bar("Calibrating", unit="call") as bar:
        plan = replace(calibrated(*given, lambda plans: bar.reset(total=plans * num_samples)), context=context)
    logger.info("Calibrated for %s: %s.", counted(num_steps, "step"), plan.short())
    planner.calibrated[num_steps, stochastic, pricing.kind, context] = plan
    return plan


def _refuse_interrupted(fast: Any) -> None:
    """Raise Cancelled if the last call was interrupted: what it has done is no measurement."""
    report = fast._srds.last.report
    if report is not None and report.interrupted:
        raise Cancelled(
            "Planning was interrupted, as `_interrupt` was set. Nothing of it is kept. Call it again.",
            report.waves,
        )


def _quiet(fast: Any, **changes: Any) -> Any:
    """The same pipeline for calls whose report and warnings the user does not see."""
    return with_state(type(fast), replace(fast._srds, last=Last(), quiet=True, **changes))
