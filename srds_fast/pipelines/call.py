"""One call of a compiled pipeline: chooses takeover, lockstep or the stock loop, and runs it."""

from __future__ import annotations

import functools
import inspect
import numbers
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import telemetry
from ..engine.graphs.runner import GraphRunner
from ..engine.run import Observer
from ..errors import DivergenceError, InvalidArgument, SrdsFastError, UnsupportedPipeline
from ..planner.settings import GRAPH_ENGINES
from ..sampling.session import no_room
from ..solvers.registry import check_warm_start_method
from ..telemetry.report import Report
from . import acceleration
from .families import Family, family_of
from .lockstep.callbacks import StepCallback
from .lockstep.loop import LockstepLoop
from .lockstep.proxies import copy_with_proxies
from .loop import Arguments, Loop
from .notices import warn_eager, warn_fallback, warn_left_out
from .state import OWN_ARGUMENTS, RandomState, bind, no_plan, steps_of
from .takeover.guidance import GuidanceCache
from .takeover.turn import RecordedTurn, why_not


def _guidance_key(cls: type, loop: Loop, network: Any, arguments: Arguments) -> Hashable | None:
    """Everything the guidance of a call can depend on: the numbers by value, the other arguments by type.

    None if it may depend on more: a subclass by the user, a number given as a tensor, an unknown object.
    """
    if not cls.__module__.startswith("diffusers."):
        return None
    found: list[Hashable] = [cls, loop, weakref.ref(network)]
    for name, value in arguments.items():
        if value is None or isinstance(value, numbers.Number):
            found.append((name, type(value), value))
        elif (
            isinstance(value, str | list | tuple | dict | torch.Generator)
            or getattr(value, "ndim", 0) > 0
            or callable(value)
        ):
            found.append((name, type(value), repr(value) if _is_number_list(value) else None))
        elif not type(value).__module__.startswith("PIL."):
            return None
    return tuple(found)


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, numbers.Number) for each in value)


def stock_reason(fast: Any, family: Family, arguments: Arguments) -> str | None:
    """Why this call must run on the stock loop, or None."""
    if arguments.get("callback") is not None:
        return "callback was given, which sees every step's latents: pass it as callback_on_step_end"
    if arguments.get("callback_on_step_end") is not None and fast._srds.planner.settings.max_iterations == 0:
        return "callback_on_step_end was given and max_iterations=0: no fine step is computed, so it is never called"
    for name in family.loop(fast, {"guidance_scale": 0.0} | arguments).networks:
        network = getattr(fast, name)
        if getattr(network, "is_cache_enabled", False) or any(_hooks(network, stateful=True)):
            return f"a cache is enabled on the {name}: it takes the previous call for the previous step"
    return family.stock_if(fast, arguments)


def _hooks(network: Any, stateful: bool) -> Iterator[Any]:
    """diffusers' hooks on the network and its submodules; stateful: those with state between calls, or without."""
    for module in network.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in [] if registry is None else registry.hooks.values():
            if bool(getattr(hook, "_is_stateful", False)) == stateful:
                yield hook


def _graphs_on(device: torch.device) -> bool:
    """Whether graphs can save time on this device."""
    return device.type == "cuda"


def _engine_reason(network: Any) -> str | None:
    """Why calls of this network cannot be recorded, or None."""
    offloaded = any(hasattr(hook, "next_group") or hasattr(hook, "group") for hook in _hooks(network, stateful=False))
    accelerate = any(hasattr(module, "_hf_hook") for module in network.modules())
    return "the network is offloaded: hooks move its weights at every call" if offloaded or accelerate else None


def run_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer | None = None, *, warming: bool = False
) -> Any:
    """Call a compiled pipeline and store the report in its state.

    Args:
        fast: the compiled pipeline.
        observer: called with every checkpoint.
        warming: record everything that calls like this one will need.
    """
    state = fast._srds
    state.last.report = state.last.trajectory = state.last.session = None
    timeline = telemetry.Timeline()
    diverged: DivergenceError | None = None
    try:
        with telemetry.call(type(fast).__name__, lambda: fast._execution_device, timeline):
            return _run_call(fast, args, kwargs, observer, warming)
    except DivergenceError as error:
        diverged = error
        raise
    finally:
        if state.last.report is not None:
            state.last.report = replace(state.last.report, timeline=timeline.sums)
            if diverged is not None:
                diverged.report = state.last.report


def _run_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer | None, warming: bool
) -> Any:
    state = fast._srds
    family = family_of(state.original)  # a component may have been replaced since compile
    arguments = bind(fast, args, kwargs)
    own = {name: kwargs[name] for name in OWN_ARGUMENTS if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
    if own.get("warm_start") is not None:
        check_warm_start_method(state.planner.options)
    reason = stock_reason(fast, family, arguments)
    if reason is not None:
        return _stock_call(fast, args, kwargs, arguments, reason, own)
    random = RandomState(fast, arguments)
    networks = [getattr(fast, name) for name in family.loop(fast, arguments).networks]
    with (
        _lora_lock(fast, arguments),
        state.tokenizers.borrow(fast) as tokenizers,
        acceleration.applied(networks, state.network_options, fast._execution_device) as made,
    ):
        for left_out in made.reasons:
            warn_left_out(fast, left_out)
        call = _AcceleratedCall(
            fast, family, arguments, observer, networks, tokenizers, made.replacements, warming, **own
        )
        lockstep = call.lockstep
        try:
            return call(args, kwargs)
        except Exception as why:
            # a callback or a stream has already seen results of this call: it cannot start again
            if observer is not None or call.notified or not call.may_retry_on_stock_loop(why):
                raise
            reason = str(why).partition(". ")[0]
            if isinstance(why, torch.OutOfMemoryError):
                assert lockstep.run is not None
                reason = no_room(lockstep.run.counts.peak_rows)
                lockstep.run.close()
            elif not isinstance(why, UnsupportedPipeline):
                reason = f"Its loop, when driven, ended in {type(why).__name__}: {reason}"
        finally:
            lockstep.close()
            # made.reasons grows during the call, in which compilation can fail
            state.last.report = lockstep.report(made.reasons)
            state.last.session = lockstep.session
            state.last.trajectory = lockstep.states() if own.get("keep_trajectory") else None
    random.restore()
    return _stock_call(fast, args, kwargs, arguments, reason[:1].lower() + reason[1:], own)


class _AcceleratedCall:
    """One call on a copy of the pipe whose scheduler and networks are proxies."""

    def __init__(
        self,
        fast: Any,
        family: Family,
        arguments: Arguments,
        observer: Observer | None,
        networks: list[nn.Module],
        tokenizers: dict[str, Any],
        replacements: Mapping[nn.Module, Callable[..., Any]],
        warming: bool,
        warm_start: Tensor | None = None,
        keep_trajectory: bool = False,
    ) -> None:
        state = fast._srds
        self._loop = loop = family.loop(fast, arguments)
        self._cls = type(state.original)
        self._shared = vars(fast)
        if self._shared.get("_interrupt"):  # left by the previous call; every stock call resets it too
            self._shared["_interrupt"] = False
        callback = arguments.get("callback_on_step_end")
        drive_reason = why_not(loop)
        if callback is not None:
            drive_reason = "callback_on_step_end is called by the loop, once per step"
        network: Any = networks[0]
        engine_reason = _engine_reason(network)
        turn = RecordedTurn(GuidanceCache(state.guidance, _guidance_key(self._cls, loop, network, arguments)))
        self.lockstep = LockstepLoop(
            fast.scheduler,
            loop,
            state.planner,
            networks,
            observer=observer,
            turn=turn if drive_reason is None else None,
            drive_reason=drive_reason,
            graphs=_graph_runner(fast, network, engine_reason, warming),
            engine_reason=engine_reason,
            overlap="batch" if state.overlap == "auto" and not _graphs_on(network.device) else state.overlap,
            keep_states=callback is not None or keep_trajectory,
            initial_guess=warm_start,
            interrupted=self._interrupted,
            notify=functools.partial(warn_fallback, fast, "step by step"),
            replacements=replacements,
            plan_only=state.plan_only,
        )
        self._proxied = copy_with_proxies(fast, self._cls, loop, self.lockstep, tokenizers)
        if state.quiet:
            self._proxied.__dict__["_progress_bar_config"] = {"disable": True}
        self._callback = None if callback is None else StepCallback(callback, self.lockstep)
        self._calls_back = self._callback is not None and not state.plan_only
        # diffusers' official callbacks name the tensors they need
        self._tensor_inputs = getattr(callback, "tensor_inputs", None)

    @property
    def notified(self) -> int:
        """Number of steps for which the user's callback was called."""
        return 0 if self._callback is None else self._callback.notified

    def may_retry_on_stock_loop(self, error: Exception) -> bool:
        """Whether the stock loop may succeed where this call failed.

        A loop that was not read by hand may contain code that does not work with rows. So its shape and type errors
        count too; if such an error has another cause, the stock loop raises it again.
        """
        if isinstance(error, torch.OutOfMemoryError):  # the stock loop's waves have one row
            run = self.lockstep.run
            return run is not None and run.sample is None and run.counts.peak_rows > 1
        misfits = (RuntimeError, ValueError, TypeError, IndexError)
        return isinstance(error, UnsupportedPipeline) or (
            not self._loop.checked and isinstance(error, misfits) and not isinstance(error, SrdsFastError)
        )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._callback is not None:
            bound = inspect.signature(self._cls.__call__).bind(self._proxied, *args, **kwargs)
            bound.arguments["callback_on_step_end"] = self._callback if self._calls_back else None
            if self._tensor_inputs is not None:
                bound.arguments["callback_on_step_end_tensor_inputs"] = self._tensor_inputs
            _, *args_after_self = bound.args
            args, kwargs = tuple(args_after_self), bound.kwargs
        telemetry.phase("encode")
        return self._cls.__call__(self._proxied, *args, **kwargs)

    def _interrupted(self) -> bool:
        return bool(getattr(self._proxied, "_interrupt", False) or self._shared.get("_interrupt", False))


def _graph_runner(fast: Any, network: Any, engine_reason: str | None, warming: bool) -> GraphRunner | None:
    """How a call may use graphs; None: not at all. engine_reason: why its network cannot be recorded."""
    state = fast._srds
    if state.engine not in GRAPH_ENGINES and not (state.engine == "auto" and _graphs_on(network.device)):
        return None
    if engine_reason is not None:
        warn_eager(fast, engine_reason)
        return None
    return GraphRunner(
        state.graphs,
        state.lazy_capture or warming,
        functools.partial(warn_eager, fast),
        whole=warming,
        weighed=state.engine == "auto",
        kind="graph" if state.engine == "auto" else state.engine,
    )


_lora_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def _lora_lock(fast: Any, arguments: Arguments) -> AbstractContextManager[Any]:
    """A lock for calls that scale a LoRA: diffusers scales the layers in place around every network call."""
    for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
        if (arguments.get(name) or {}).get("scale", 1.0) != 1.0:
            network = getattr(fast, "transformer", None) or fast.unet
            return _lora_locks.setdefault(network, threading.RLock())
    return nullcontext()


def _stock_call(
    fast: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    arguments: Arguments,
    reason: str,
    own: Iterable[str] = (),
) -> Any:
    state = fast._srds
    if state.quiet:
        raise InvalidArgument(no_plan(reason))
    warn_fallback(fast, "on its stock loop", reason)
    telemetry.phase("stock")
    started = time.perf_counter()
    output = type(state.original).__call__(state.original, *args, **kwargs)
    seconds = time.perf_counter() - started
    state.last.report = Report(
        "stock",
        "stock",
        "stock",
        steps_of(arguments),
        seconds=seconds,
        fallback_reason=reason,
        left_out=[f"{name} was left out: the stock loop has no use for it" for name in own],
    )
    return output
