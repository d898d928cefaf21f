"""One call of a compiled pipeline: which way it runs, and what is said where that is not the fastest."""

from __future__ import annotations

import functools
import inspect
import numbers
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import telemetry
from ..engine.graphs.use import GraphUse
from ..engine.run import Observer, no_room
from ..errors import InvalidArgument, SrdsFastError, UnsupportedPipeline
from ..planner.settings import GRAPH_ENGINES
from ..solvers.registry import check_warm_start_method
from ..telemetry.report import Report
from . import acceleration
from .families import Family, family_of
from .lockstep.callbacks import StepCallback
from .lockstep.loop import LockstepLoop, driven_copy
from .loop import Arguments, Loop
from .notices import _eagerly, _fallback, _left_out, _tell_of_overlap
from .state import OURS, RandomState, State, bind, steps_of
from .takeover.guidance import KnownGuidance
from .takeover.turn import RecordedTurn, why_not


def _kind_of(cls: type, loop: Loop, network: Any, arguments: Arguments) -> Hashable | None:
    """All that the guidance of a call can depend on: every number, and as what the other arguments were given.

    None where it may depend on more: a subclass of the user's, a number in the shape of a tensor, an unknown object.
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
            found.append((name, type(value), repr(value) if _holds_numbers(value) else None))
        elif not type(value).__module__.startswith("PIL."):
            return None
    return tuple(found)


def _holds_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, numbers.Number) for each in value)


def stock_reason(fast: Any, family: Family, arguments: Arguments) -> str | None:
    """Why this call must run on the stock loop, or None."""
    if arguments.get("callback") is not None:
        return "callback was given, which sees every step's latents: pass it as callback_on_step_end"
    if arguments.get("callback_on_step_end") is not None and fast._srds.planner.settings.max_iterations == 0:
        return "callback_on_step_end was given and max_iterations=0: no fine step is computed that it could be told of"
    for name in family.loop(fast, {"guidance_scale": 0.0} | arguments).networks:
        network = getattr(fast, name)
        if getattr(network, "is_cache_enabled", False) or any(_hooks(network, stateful=True)):
            return f"a cache is enabled on the {name}: it takes the previous call for the previous step"
    return family.stock_if(fast, arguments)


def _hooks(network: Any, stateful: bool) -> Iterator[Any]:
    """diffusers' hooks on the network and its parts that keep (or do not keep) something from call to call."""
    for module in network.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in [] if registry is None else registry.hooks.values():
            if bool(getattr(hook, "_is_stateful", False)) == stateful:
                yield hook


def _wants_graphs(state: State, network: Any) -> bool:
    return state.engine in GRAPH_ENGINES or (state.engine == "auto" and _graphs_on(network.device))


def _graphs_on(device: torch.device) -> bool:
    """Whether graphs can save time there."""
    return device.type == "cuda"


def _engine_reason(network: Any) -> str | None:
    """Why calls of this network cannot be recorded, or None."""
    offloaded = any(hasattr(hook, "next_group") or hasattr(hook, "group") for hook in _hooks(network, stateful=False))
    accelerate = any(hasattr(module, "_hf_hook") for module in network.modules())
    return "the network is offloaded: hooks move its weights at every call" if offloaded or accelerate else None


def run_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer | None = None, *, warming: bool = False
) -> Any:
    """Call a compiled pipeline; leaves its report in the state.

    Args:
        fast: the drop-in.
        observer: sees every checkpoint.
        warming: record all that calls like this one will need.
    """
    state = fast._srds
    state.last.report = state.last.trajectory = state.last.session = None
    timeline = telemetry.Timeline()
    try:
        with telemetry.call(type(fast).__name__, lambda: fast._execution_device, timeline):
            return _run_call(fast, args, kwargs, observer, warming)
    finally:
        if state.last.report is not None:
            state.last.report.timeline = timeline.sums


def _run_call(
    fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer | None, warming: bool
) -> Any:
    state = fast._srds
    family = family_of(state.original)  # a component may have been replaced since compile
    arguments = bind(fast, args, kwargs)
    ours = {name: kwargs[name] for name in OURS if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in OURS}
    if ours.get("warm_start") is not None:
        check_warm_start_method(state.planner.options)
    reason = stock_reason(fast, family, arguments)
    if reason is not None:
        return _stock_call(fast, args, kwargs, arguments, reason, ours)
    random = RandomState(fast, arguments)
    networks = [getattr(fast, name) for name in family.loop(fast, arguments).networks]
    with (
        _scaling_lora(fast, arguments),
        state.tokenizers.lent(fast) as tokenizers,
        acceleration.applied(networks, state.network_options, fast._execution_device) as made,
    ):
        for left_out in made.reasons:
            _left_out(fast, left_out)
        call = _DrivenCall(fast, family, arguments, observer, tokenizers, made.instead, warming, **ours)
        try:
            return call(args, kwargs)
        except Exception as why:
            # what a callback or a stream has been told cannot be taken back
            if observer is not None or call.told or not call.is_at_fault(why):
                raise
            reason = str(why).partition(". ")[0]
            if isinstance(why, torch.OutOfMemoryError):
                reason = no_room(call.peak_rows)
                assert call.drive.run is not None
                call.drive.run.close()
            elif not isinstance(why, UnsupportedPipeline):
                reason = f"Its loop, driven, ended in {type(why).__name__}: {reason}"
        finally:
            if call.drive.run is not None:
                state.last.report = call.drive.run.report
                state.last.session = call.drive.session
                state.last.trajectory = call.drive.states() if ours.get("keep_trajectory") else None
                # compiling may fail as late as in the call
                state.last.report.left_out = made.reasons
                _tell_of_overlap(fast, call.drive.run.program)
    random.restore()
    return _stock_call(fast, args, kwargs, arguments, reason[:1].lower() + reason[1:], ours)


class _DrivenCall:
    """One call on a driven copy of the pipe."""

    def __init__(
        self,
        fast: Any,
        family: Family,
        arguments: Arguments,
        observer: Observer | None,
        tokenizers: dict[str, Any],
        instead: Mapping[nn.Module, Callable[..., Any]],
        warming: bool,
        warm_start: Tensor | None = None,
        keep_trajectory: bool = False,
    ) -> None:
        state = fast._srds
        self._loop = loop = family.loop(fast, arguments)
        self._cls = type(state.original)
        self._shared = vars(fast)
        if self._shared.get("_interrupt"):  # of the call before; every stock call begins so
            self._shared["_interrupt"] = False
        callback = arguments.get("callback_on_step_end")
        self._drive_reason = why_not(loop)
        if callback is not None:
            self._drive_reason = "callback_on_step_end is told of every step in the loop's own turns"
        network = getattr(fast, loop.networks[0])
        self._engine_reason = _engine_reason(network)
        turn, graphs = None, None
        if self._drive_reason is None:
            kind = _kind_of(self._cls, loop, network, arguments)
            turn = RecordedTurn(KnownGuidance(state.guidance, kind))
            graphs = self._graph_use(fast, network, warming)
        elif _wants_graphs(state, network):
            self._engine_reason = f"the loop is driven: {self._drive_reason}"
            _eagerly(fast, self._engine_reason)
        self.drive = LockstepLoop(
            fast.scheduler,
            loop,
            state.planner,
            observer,
            turn=turn,
            graphs=graphs,
            overlap="batch" if state.overlap == "auto" and not _graphs_on(network.device) else state.overlap,
            keep_states=callback is not None or keep_trajectory,
            guess=warm_start,
            interrupted=self._interrupted,
            notify=functools.partial(_fallback, fast, "step by step"),
            instead=instead,
            plan_only=state.plan_only,
        )
        self._twin = driven_copy(fast, self._cls, loop, self.drive, tokenizers)
        if state.quiet:
            self._twin.__dict__["_progress_bar_config"] = {"disable": True}
        self._callback = None if callback is None else StepCallback(callback, self.drive)
        self._calls_back = self._callback is not None and not state.plan_only
        # an official callback says itself which tensors it needs
        self._tensor_inputs = getattr(callback, "tensor_inputs", None)

    def _graph_use(self, fast: Any, network: Any, warming: bool) -> GraphUse | None:
        state = fast._srds
        if not _wants_graphs(state, network):
            return None
        if self._engine_reason is not None:
            _eagerly(fast, self._engine_reason)
            return None
        return GraphUse(
            state.graphs,
            state.lazy_capture or warming,
            functools.partial(_eagerly, fast),
            whole=warming,
            weighed=state.engine == "auto",
            kind="graph" if state.engine == "auto" else state.engine,
        )

    @property
    def told(self) -> int:
        """Steps that the user's callback has been told of."""
        return 0 if self._callback is None else self._callback.told

    @property
    def peak_rows(self) -> int:
        """Of the widest wave so far."""
        return 0 if self.drive.run is None else self.drive.run.report.peak_rows

    def is_at_fault(self, error: Exception) -> bool:
        """Whether the stock loop may do what ended in this error when it was driven.

        In a loop that was not read by hand, rows may have met what they do not fit: that is such an error too. If it is
        not, the stock loop ends in it as well.
        """
        if isinstance(error, torch.OutOfMemoryError):  # the stock loop's waves have one row
            return self.peak_rows > 1 and self.drive.run is not None and self.drive.run.sample is None
        misfits = (RuntimeError, ValueError, TypeError, IndexError)
        return isinstance(error, UnsupportedPipeline) or (
            not self._loop.checked and isinstance(error, misfits) and not isinstance(error, SrdsFastError)
        )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._callback is not None:
            bound = inspect.signature(self._cls.__call__).bind(self._twin, *args, **kwargs)
            bound.arguments["callback_on_step_end"] = self._callback if self._calls_back else None
            if self._tensor_inputs is not None:
                bound.arguments["callback_on_step_end_tensor_inputs"] = self._tensor_inputs
            _, *args_after_self = bound.args
            args, kwargs = tuple(args_after_self), bound.kwargs
        telemetry.phase("encode")
        output = self._cls.__call__(self._twin, *args, **kwargs)
        if self.drive.run is not None:
            report = self.drive.run.report
            report.engine_reason = report.engine_reason or self._engine_reason
            report.drive_reason = report.drive_reason or self._drive_reason
        return output

    def _interrupted(self) -> bool:
        return bool(getattr(self._twin, "_interrupt", False) or self._shared.get("_interrupt", False))


_lora_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def _scaling_lora(fast: Any, arguments: Arguments) -> AbstractContextManager[Any]:
    """A lock for calls that scale a LoRA: diffusers scales the layers in place, before and after every network call."""
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
    ours: Iterable[str] = (),
) -> Any:
    state = fast._srds
    if state.quiet:
        raise InvalidArgument(f"This call has no plan: {reason}. It runs on the stock loop. Change what is named.")
    _fallback(fast, "on its stock loop", reason)
    telemetry.phase("stock")
    started = time.perf_counter()
    output = type(state.original).__call__(state.original, *args, **kwargs)
    seconds = time.perf_counter() - started
    state.last.report = Report("stock", "stock", "stock", steps_of(arguments), seconds=seconds, fallback_reason=reason)
    state.last.report.left_out = [f"{name} was left out: the stock loop has no use for it" for name in ours]
    return output
