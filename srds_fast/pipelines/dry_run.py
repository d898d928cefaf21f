"""Calls that measure costs and needed iterations, for planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..planner.calibration import calibrated
from ..planner.plan import Plan
from ..sampling.session import Session
from ..solvers.contract import Checkpoint
from .call import run_call
from .state import Last, RandomState, State, bind, undecoded

Make = Callable[[State], Any]
"""state -> a compiled pipeline with this state."""


def planned(make: Make, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session:
    """Choose the plan of a call and measure its costs, but run no waves. Random generators are restored.

    Returns:
        the session of the call, with `plan` and `pricing`.

    Raises:
        InvalidArgument: the call runs on the stock loop, which has no plan.
    """
    fast = make(_quiet(state, plan_only=True))
    random = RandomState(fast, bind(fast, args, kwargs))
    try:
        run_call(fast, args, {**kwargs, **undecoded(fast)})
    finally:
        random.restore()
    session: Session | None = fast._srds.last.session
    if session is None:
        raise InvalidArgument(
            f"This call has no plan: {fast.report.fallback_reason}. It runs on the stock loop. "
            "Change what the reason names."
        )
    return session


def calibrate(
    make: Make, state: State, prompts: Sequence[Any], num_samples: int, quantile: float, kwargs: dict[str, Any]
) -> Plan:
    """See `FastPipeline.calibrate`; also stores the plan in the state."""
    if not prompts or isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise InvalidArgument(
            f"{len(prompts)} prompts and num_samples={num_samples!r} were given. Calibration needs at least one of "
            "each. Pass prompts like those of later calls."
        )
    if kwargs.get("generator") is not None:
        raise InvalidArgument("A generator was given. Calibration seeds every sample itself. Leave the generator out.")
    if state.planner.plan is not None:
        raise InvalidArgument("The pipeline was compiled with a plan, which fixes every setting. Compile it without.")

    def arguments(sample: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(sample)
        prompt = prompts[sample % len(prompts)]
        prompt_arguments = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        return {**kwargs, **undecoded(make(state)), **prompt_arguments, "generator": generator}

    session = planned(make, state, (), arguments(0))
    pricing = session.pricing
    if pricing is None:
        raise InvalidArgument(
            "The loop of this call is driven, or has a single step. The cost of its network calls cannot be measured "
            "before the call. Leave callbacks out, or pass max_iterations instead."
        )
    num_steps, stochastic = session.plan.num_inference_steps, session.stochastic

    def run(plan: Plan) -> list[tuple[int, Tensor]]:
        fast = make(_quiet(state, planner=replace(state.planner, plan=replace(plan, engine="eager"))))
        outputs: dict[int, list[Tensor]] = {}

        def keep(checkpoint: Checkpoint) -> None:
            outputs.setdefault(checkpoint.iteration, []).append(checkpoint.sample.clone())

        for sample in range(num_samples):
            run_call(fast, (), arguments(sample), keep)
        return [
            (iteration, torch.cat(samples)) for iteration, samples in outputs.items() if len(samples) == num_samples
        ]

    plan = calibrated(num_steps, state.planner.settings, stochastic, pricing, run, quantile)
    state.planner.calibrated[num_steps, stochastic] = plan, pricing.kind
    return plan


def _quiet(state: State, **changes: Any) -> State:
    """The same state for calls whose report and warnings the user does not see."""
    return replace(state, last=Last(), quiet=True, **changes)
