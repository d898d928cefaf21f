"""One call of a compiled pipeline: which way it runs, and what is said where that is not the fastest."""

from __future__ import annotations

import functools
import inspect
import logging
import numbers
import re
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import takeover, telemetry
from .drive import Drive, Loop, driven_copy
from .drive.callbacks import StepCallback
from .engine.graphs import Graphs, GraphUse
from .engine.overlap import has_two_lanes
from .errors import CaptureFailed, InvalidArgument, PlanMismatch, SrdsFastError, UnsupportedPipeline
from .families import Arguments, Family, family_of
from .methods import check_warm_start_method, options_of
from .pipelines import acceleration
from .plan import GRAPH_ENGINES, MOST_STEPS, Plan, Settings, choose
from .pricing import Costs
from .program import Program
from .report import Report
from .run import Observer, no_room
from .search import Pricing, usual
from .spares import Spares

logger = logging.getLogger("srds_fast")


class Last(threading.local):
    """What the last call of each thread left behind."""

    report: Report | None = None
    trajectory: Tensor | None = None


class Planned(BaseException):
    """Ends a call that was made to learn its plan alone, or its costs."""

    def __init__(self, plan: Plan | None, costs: tuple[int, bool, Pricing] | None) -> None:
        self.plan, self.costs = plan, costs


OURS = ("warm_start", "keep_trajectory")
"""Arguments of a call that are not the pipeline's."""


@dataclass
class State:
    """What a compiled pipeline knows beyond the pipeline itself."""

    original: Any
    settings: Settings
    plan: Plan | None
    strict: bool
    lazy_capture: bool
    graphs: Graphs
    network_options: acceleration.NetworkOptions
    overlap: str
    last: Last = field(default_factory=Last)
    told: set[str] = field(default_factory=set)
    tokenizers: Spares = field(default_factory=Spares)
    guidance: dict[Hashable, Tensor] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    calibrated: dict[tuple[int, bool], tuple[Plan, Hashable]] = field(default_factory=dict)
    quiet: bool = False

    @property
    def engine(self) -> str:
        """The engine asked for."""
        return self.settings.engine if self.plan is None else self.plan.engine

    def plan_for(self, num_steps: int, stochastic: bool, pricing: Callable[[], Pricing] | None = None) -> Plan:
        """The plan of a call. pricing: tells its costs; None: nobody can, and no device is asked."""
        if self.plan is None:
            calibrated = self.calibrated.get((num_steps, stochastic))
            if calibrated is not None and pricing is not None:
                plan, kind = calibrated
                costs = pricing()
                if (kind, plan.context) == (costs.kind, costs.context):  # calls of another kind know nothing of it
                    return plan
            if self.settings.measures and pricing is not None:
                return usual(num_steps, self.settings, stochastic, pricing())
            return choose(num_steps, self.settings, stochastic)
        if self.plan.num_inference_steps != num_steps:
            raise PlanMismatch(
                f"The plan is for {self.plan.num_inference_steps} steps, this call has {num_steps}. A plan fits one "
                "number of steps. Compile without plan, or with one saved for this number."
            )
        return self.plan


def bind(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a call by name, defaults filled in, **kwargs flattened. A TypeError is the pipeline's own.

    Raises:
        InvalidArgument: a number of steps that no loop can have.
    """
    theirs = {name: value for name, value in kwargs.items() if name not in OURS}
    bound = inspect.signature(type(fast.original).__call__).bind(fast, *args, **theirs)
    bound.apply_defaults()
    arguments: Arguments = dict(bound.arguments)
    extra: Arguments = arguments.pop("kwargs", {})
    arguments |= extra
    steps = arguments.get("num_inference_steps")
    if isinstance(steps, int) and not 1 <= steps <= MOST_STEPS:
        raise InvalidArgument(
            f"num_inference_steps is {steps}. A loop has 1 to {MOST_STEPS} steps. Pass such a number."
        )
    return arguments


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


def steps_of(arguments: Arguments) -> int:
    """Steps the loop will walk, as far as the arguments tell: `denoising_start` and `_end` ask the scheduler."""
    given = arguments.get("timesteps")
    given = arguments.get("sigmas") if given is None else given
    steps = int(arguments["num_inference_steps"] if given is None else len(given))
    if arguments.get("strength") is not None and arguments.get("denoising_start") is None:
        return max(1, min(int(steps * arguments["strength"]), steps))
    return steps


def stock_reason(fast: Any, family: Family, arguments: Arguments) -> str | None:
    """Why this call must run on the stock loop, or None."""
    if arguments.get("callback") is not None:
        return "callback was given, which sees every step's latents: pass it as callback_on_step_end"
    if arguments.get("callback_on_step_end") is not None and fast._srds.settings.max_iterations == 0:
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
    state.last.report = state.last.trajectory = None
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
        plan = state.plan
        check_warm_start_method(options_of(state.settings.method)[1] if plan is None else plan.options)
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
        self._drive_reason = takeover.why_not(loop)
        if callback is not None:
            self._drive_reason = "callback_on_step_end is told of every step in the loop's own turns"
        network = getattr(fast, loop.networks[0])
        self._engine_reason = _engine_reason(network)
        stepwise = functools.partial(_fallback, fast, "step by step")
        make: Callable[..., Drive] = functools.partial(
            Drive, keep_states=callback is not None or keep_trajectory, stepwise=stepwise, guess=warm_start
        )
        if self._drive_reason is None:
            kind = _kind_of(self._cls, loop, network, arguments)
            make = functools.partial(
                takeover.Takeover,
                keep_states=keep_trajectory,
                stepwise=stepwise,
                guess=warm_start,
                graph_use=self._graph_use(fast, network, warming),
                guidance=takeover.KnownGuidance(state.guidance, kind),
                costs=state.costs,
                max_rows=state.settings.max_rows,
                overlap="batch" if state.overlap == "auto" and not _graphs_on(network.device) else state.overlap,
            )
        elif _wants_graphs(state, network):
            self._engine_reason = f"the loop is driven: {self._drive_reason}"
            _eagerly(fast, self._engine_reason)
        self.drive = make(
            fast.scheduler, loop, state.plan_for, observer, interrupted=self._interrupted, instead=instead
        )
        self._twin = driven_copy(fast, self._cls, loop, self.drive, tokenizers)
        if state.quiet:
            self._twin.__dict__["_progress_bar_config"] = {"disable": True}
        self._callback = None if callback is None else StepCallback(callback, self.drive)
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
            bound.arguments["callback_on_step_end"] = self._callback
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


def undecoded(fast: Any) -> dict[str, Any]:
    """Arguments that spare a call its decoding."""
    known = inspect.signature(type(fast.original).__call__).parameters
    return {"output_type": "latent"} if "latents" in known else {}


class RandomState:
    """The generators a call may draw from, to be put back where it has to begin again."""

    def __init__(self, pipe: Any, arguments: Arguments) -> None:
        given = arguments.get("generator")
        generators = given if isinstance(given, list | tuple) else [given]
        self._generators = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
        self._cpu = torch.get_rng_state()
        self._device = pipe.device if pipe.device.type == "cuda" else None
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device is not None else None

    def restore(self) -> None:
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


_lora_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def _scaling_lora(fast: Any, arguments: Arguments) -> AbstractContextManager[Any]:
    """A lock for calls that scale a LoRA: diffusers scales the layers in place, before and after every network call."""
    for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
        if (arguments.get(name) or {}).get("scale", 1.0) != 1.0:
            network = getattr(fast, "transformer", None) or fast.unet
            return _lora_locks.setdefault(network, threading.RLock())
    return nullcontext()


def _fallback(fast: Any, how: str, reason: str) -> None:
    """Say once that and why calls are not driven in parallel; with strict=True raise it."""
    state = fast._srds
    if state.strict:
        raise UnsupportedPipeline(
            f"This call cannot be accelerated: {reason}. strict=True forbids to run it {how}. "
            "Change what the reason names, or compile without strict."
        )
    kind = re.sub(r" at step \d+", "", reason)
    if kind not in state.told:
        state.told.add(kind)
        logger.warning("%s runs %s: %s.", type(fast).__name__, how, reason)


def _left_out(fast: Any, reason: str) -> None:
    """Say once what was asked of the networks and cannot be had; with strict=True raise it."""
    state = fast._srds
    if state.strict:
        raise UnsupportedPipeline(
            f"The network cannot be made faster as asked: {reason}. strict=True forbids to leave it out. "
            "Change what the reason names, or compile without strict."
        )
    if reason not in state.told:
        state.told.add(reason)
        logger.warning("%s: %s.", type(fast).__name__, reason)


def _tell_of_overlap(fast: Any, program: Program) -> None:
    report = fast._srds.last.report
    if fast._srds.overlap == "streams" and report.overlap == "batch" and has_two_lanes(program):
        how = "a graph of a wave's width holds one batch" if report.path == "takeover" else "the loop is driven"
        report.left_out.append(f"overlap='streams' was left out: {how}")


def _eagerly(fast: Any, reason: str) -> None:
    """Say once that and why calls are not replayed; where graphs were asked for by name, strict=True raises it."""
    state = fast._srds
    if state.engine in GRAPH_ENGINES and state.strict:
        raise CaptureFailed(
            f"This call cannot be replayed: {reason}. strict=True forbids to run it eagerly. "
            "Change what the reason names, pass engine='auto', or compile without strict."
        )
    if reason not in state.told:
        state.told.add(reason)
        logger.warning("%s runs eagerly: %s.", type(fast).__name__, reason)


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
