"""The stock loop of a pipeline: calls run on it where ours cannot or should not, and it is timed beside ours."""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .. import telemetry
from ..errors import InvalidArgument
from ..planner.exploration import Exploration
from ..telemetry.report import stock_report
from .acceleration import NetworkOptions
from .lockstep.proxies import copy_scheduler
from .networks import Arguments
from .notices import warn_fallback
from .state import RandomState, steps_of, undecoded


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
    return _called(fast, args, kwargs, arguments, fallback_reason=reason, left_out=left_out)


def chosen_stock_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Arguments, chosen: Exploration
) -> Any:
    """Call the pipeline itself, because it was the fastest."""
    return _called(fast, args, kwargs, arguments, plan_reason=chosen.why, plan_state=chosen.state)


def _called(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Arguments, **reported: Any) -> Any:
    state = fast._srds
    telemetry.phase("stock")
    started = time.perf_counter()
    output = type(state.original).__call__(state.original, *args, **kwargs)
    state.last.report = stock_report(steps_of(arguments), time.perf_counter() - started, **reported)
    return output


@dataclass(frozen=True)
class TimedStockLoop:
    """Times the stock loop of a call that is under way: the pipeline's own code, on a shallow copy of it.

    parts: of the copy, that belong to this call. random: the generators as they were when the call began.
    """

    fast: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments
    parts: dict[str, Any]
    random: RandomState

    def seconds(self) -> float:
        """Seconds of all turns of the loop; encoding and decoding are left out. No random generator advances."""
        cls, scheduler = type(self.fast.original), copy_scheduler(self.fast.scheduler)
        stepped: list[float] = []
        step = scheduler.step

        @functools.wraps(step)
        def timed_step(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            if not stepped:
                _wait(self.fast)
            stepped.append(time.perf_counter())
            return found

        scheduler.step = timed_step
        twin = object.__new__(cls)
        own = {"scheduler": scheduler, "_progress_bar_config": {"disable": True}}
        vars(twin).update({**vars(self.fast), **self.parts, **own})
        bound = inspect.signature(cls.__call__).bind(twin, *self.args, **self.kwargs)
        bound.arguments.update(undecoded(self.fast))
        now = RandomState(self.fast, self.arguments)
        self.random.restore()
        try:
            cls.__call__(*bound.args, **bound.kwargs)
            _wait(self.fast)
            turns = len(stepped)
            # the first turn is taken to last as long as the others
            return (time.perf_counter() - stepped[0]) * turns / (turns - 1)
        finally:
            now.restore()


def kind_of_call(fast: Any, arguments: Arguments, network: Any) -> Hashable | None:
    """What the time of a call depends on, known before it begins; None if an argument is of an unknown type."""
    scheduler = fast.scheduler
    config = repr(sorted(scheduler.config.items()))
    found = tuple((name, _kind(value)) for name, value in arguments.items())
    if None in (kind for _, kind in found):
        return None
    threads = torch.get_num_threads()
    return weakref.ref(network), network.dtype, network.device, type(scheduler), config, threads, found


def may_choose_stock(fast: Any) -> bool:
    """Whether the stock loop is an answer to calls of this pipeline: not if it lacks what was asked for."""
    state = fast._srds
    return not (state.strict or state.quiet or state.plan_only) and state.network_options == NetworkOptions()


def _kind(value: Any) -> Hashable | None:
    if value is None or isinstance(value, Number):
        return type(value), value
    if isinstance(value, str | torch.Generator):
        return (type(value),)
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict) and not value:
        return (dict,)
    if isinstance(value, list | tuple):
        kinds = tuple(map(_kind, value))
        return None if None in kinds else (type(value), kinds)
    size = getattr(value, "size", None)
    return (type(value), size) if isinstance(size, tuple) else None


def _wait(fast: Any) -> None:
    if fast.device.type == "cuda":
        torch.cuda.synchronize(fast.device)
