"""The stock loop of a pipeline: calls run on it where ours cannot or should not, and it is timed beside ours."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .. import telemetry
from ..errors import InvalidArgument
from ..planner.exploration import STOCK, Exploration
from ..sampling.trials import TurnClock
from ..schedulers.private_draws import PrivateDraws
from ..telemetry.report import stock_report
from .acceleration import NetworkOptions
from .compiled import AUTO
from .guiders import own_guiders
from .hooks import execution_device
from .kinds import KindOfLoop
from .lockstep.proxies import copy_scheduler
from .modular.blocks import without_progress_bar
from .notices import warn_fallback
from .own_draws import with_own_draws
from .replaced import bound_functions
from .shown import settings_of
from .state import Arguments, undecoded
from .turn_counts import steps_of

NO_STEP = "its loop has no step"


def refuse_stock_loop(reason: str | None) -> None:
    """Raise InvalidArgument if there is a reason for the stock loop, where a plan or iterations are asked for."""
    if reason is not None:
        raise InvalidArgument(
            f"This call has no plan: {reason}. It runs on the stock loop, which has no iterations to show either. "
            "Change what the reason names."
        )


def stock_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Arguments, reason: str, own: Iterable[str]
) -> Any:
    """Call the pipeline itself, for a reason. own: arguments of ours that it does not take."""
    state = fast._srds
    if state.quiet:
        refuse_stock_loop(reason)
    warn_fallback(fast, "on its stock loop", reason)
    left_out = [f"{name} was left out: the stock loop has no use for it" for name in own]
    return _called(fast, state.original, args, kwargs, arguments, fallback_reason=reason, left_out=left_out)


def chosen_stock_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Arguments, chosen: Exploration
) -> Any:
    """Run the stock loop because it was the fastest, on a twin of the pipeline: calls may run in several threads."""

    def interrupt() -> None:  # the user sets the attribute of the pipeline
        if vars(fast).get("_interrupt"):
            twin._interrupt = True

    if vars(fast).get("_interrupt"):  # left by the previous call; every stock call resets it too
        vars(fast)["_interrupt"] = False
    with fast._srds.tokenizers.borrow(fast) as tokenizers:
        twin = _twin(fast, {**tokenizers, **own_guiders(fast)}, interrupt)
        plan = {"plan_reason": chosen.why, "plan_state": chosen.state, "plan_changed": chosen.taken(STOCK)}
        output = _called(fast, twin, args, kwargs, arguments, **plan)
        fast._srds.last.settings = settings_of(twin)
        return output


def _called(
    fast: Any, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Arguments, **reported: Any
) -> Any:
    telemetry.phase("stock")
    started = time.perf_counter()
    output = type(pipe).__call__(pipe, *args, **kwargs)
    seconds = time.perf_counter() - started
    try:
        steps = steps_of(fast, arguments)
    except InvalidArgument:  # a class of the user's may give it another name
        steps = len(pipe.scheduler.timesteps)
    fast._srds.last.report = stock_report(steps, seconds, **reported)
    return output


def _twin(fast: Any, parts: dict[str, Any], stepped: Callable[[], None]) -> Any:
    """A shallow copy of the pipeline with these parts and its own scheduler, which calls `stepped` after each step."""
    scheduler = copy_scheduler(fast.scheduler)
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def step_and_tell(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        stepped()
        return found

    scheduler.step = step_and_tell
    twin = object.__new__(type(fast.original))
    vars(twin).update({**vars(fast), **bound_functions(fast, twin), **parts, "scheduler": scheduler})
    return twin


@dataclass(frozen=True)
class TimedStockLoop:
    """Times the stock loop of a call that is under way: the pipeline's own code, on a shallow copy of it.

    parts: of the copy, that belong to this call.
    """

    fast: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments
    parts: dict[str, Any]

    def seconds(self, turns: int) -> float:
        """Seconds of all turns of the loop, by its first ones. No random generator advances."""
        clock = TurnClock(turns, execution_device(self.fast))
        twin = _twin(self.fast, {**self.parts, **without_progress_bar(self.fast)}, clock.turned)
        (args, kwargs), draws = with_own_draws(self.fast, self.args, self.kwargs, self.arguments)
        call = type(twin).__call__
        bound = inspect.signature(call).bind(twin, *args, **kwargs)
        bound.arguments.update(undecoded(self.fast))
        with draws or nullcontext(), ExitStack() as timed:
            if draws is not None:
                twin.scheduler.step = _in_private(twin.scheduler.step, draws, timed)
            return clock.seconds(lambda: call(*bound.args, **bound.kwargs))


def _in_private(step: Callable[..., Any], draws: PrivateDraws, timed: ExitStack) -> Callable[..., Any]:
    """The scheduler's step of a loop within `draws`. After the first step `timed` leaves them, but for steps that draw.

    What is timed then calls functions as a call of the user does. Nothing else in the loop draws: one that does makes
    no turns for rows, and its stock loop is not timed.
    """
    first, noisy = True, False

    @functools.wraps(step)
    def step_in_private(*args: Any, **kwargs: Any) -> Any:
        nonlocal first, noisy
        with draws if noisy else nullcontext():
            before = draws.drawn
            found = step(*args, **kwargs)
        if first:
            first, noisy = False, draws.drawn > before
            timed.enter_context(draws.paused())
        return found

    return step_in_private


def kind_of_call(fast: Any, kind: KindOfLoop | None, network: Any) -> Hashable | None:
    """What the time of a call depends on, known before it begins; None if an argument is of an unknown type."""
    if kind is None:
        return None
    config = repr(sorted(fast.scheduler.config.items()))
    weights = next(network.parameters(), torch.empty(0, device="cpu"))  # its properties look at every module
    return kind, config, torch.get_num_threads(), weights.dtype, weights.device


def may_choose_stock(fast: Any) -> bool:
    """Whether the stock loop is an answer to calls of this pipeline: not if it lacks what was asked for.

    Nor is it timed where functions of the user's would then be called once more, and might count.
    """
    state = fast._srds
    options = NetworkOptions(torch_compile=state.network_options.torch_compile)
    asked = state.network_options != options or options.torch_compile not in (None, AUTO)
    return not (state.strict or state.quiet or state.plan_only or asked or bound_functions(fast, fast))
