"""One call of a compiled pipeline: chooses takeover, lockstep or the stock loop, and runs it."""

from __future__ import annotations

import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from .. import progress, telemetry
from ..caches import signature_of
from ..engine import cancellation
from ..engine.distributed import call as distributed
from ..engine.distributed.call import SharedCall
from ..engine.distributed.digests import digest, digest_of_weights, versions
from ..engine.graphs.runner import GraphRunner
from ..engine.run import Observer
from ..errors import DivergenceError, RankFailed, SrdsFastError, UnsupportedPipeline
from ..sampling.recorded.calls import SCALING
from ..sampling.session import no_room
from ..schedulers.private_draws import PrivateDraws
from ..solvers.checks import check_switch
from ..solvers.registry import check_warm_start_method
from ..telemetry.report import Report, stock_report
from . import acceleration
from .context_parallel import by_clocks, check_ranks
from .hooks import execution_device, hooks_of, is_offloaded, on_device
from .interrupts import NAME, RunningCall
from .kinds import kind_of_loop
from .known_classes import is_known
from .lockstep.call_session import CallSettings
from .lockstep.callbacks import StepCallback
from .lockstep.loop import LockstepLoop
from .lockstep.own_enumerate import with_own_enumerate
from .lockstep.proxies import UsesWithheld, copy_with_proxies
from .modular.arguments import is_modular, why_stock
from .modular.blocks import driven, without_progress_bar, without_proxies
from .module_state import WeightsWritten
from .networks import check_pipeline, networks_of, own_guiders
from .notices import errors_held_back, warn_eager, warn_fallback, warn_left_out
from .previews import Previews
from .replaced import why_replaced
from .shown import settings_of
from .state import OWN_ARGUMENTS, Arguments, PipelineCall, RandomState, bind
from .stock import (
    NO_STEP,
    chosen_stock_call,
    kind_of_call,
    may_choose_stock,
    refuse_stock_loop,
    seconds_of_stock,
    stock_call,
)

logger = logging.getLogger("srds_fast")


def stock_reason(call: PipelineCall) -> str | None:
    """Why a call must run on the stock loop, or None."""
    fast, arguments = call.fast, call.arguments
    if arguments.get("callback") is not None:
        return "callback was given, which sees every step's latents: pass it as callback_on_step_end"
    if is_modular(fast) and (why := why_stock(fast, arguments)) is not None:
        return why
    if (why := why_replaced(fast)) is not None:
        return why
    if arguments.get("callback_on_step_end") is not None and fast._srds.planner.settings.max_iterations == 0:
        return "callback_on_step_end was given and max_iterations=0: no fine step is computed, so it is never called"
    networks = call.networks
    if not networks:
        return "it has no network: its loop has nothing to call"
    if (ranks := fast._srds.ranks) is not None:
        check_ranks(networks, ranks)
    elif fast._srds.planner.measures and (why := by_clocks(networks)) is not None:
        return why
    for name, network in networks.items():
        keeps_state = any(getattr(hook, "_is_stateful", False) for hook in hooks_of(call.hooked[name]))
        if getattr(network, "is_cache_enabled", False) or keeps_state:
            return f"a cache is enabled on the {name}: it takes the previous call for the previous step"
    return None


def _graphs_on(device: torch.device) -> bool:
    return device.type == "cuda"


def run_call(
    fast: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observer: Observer | None = None,
    draws: PrivateDraws | None = None,
    **asked: Any,
) -> Any:
    """Call a compiled pipeline and store its report.

    draws: what the pipeline draws without a generator, for calls that must leave the global ones alone.
    asked: see `_run_call`.
    """
    last = fast._srds.last
    last.report = last.trajectory = last.session = last.exploration = None
    last.settings = {}
    timeline = telemetry.Timeline()
    diverged: DivergenceError | None = None
    try:
        with (
            fast._srds.interrupts.running() as running,
            cancellation.watching(interrupted=running.is_asked, always=fast._srds.ranks is not None),
            telemetry.call(type(fast).__name__, lambda: execution_device(fast), timeline),
            distributed.sharing(fast._srds.ranks, running.is_asked, fast._srds.forget_calls) as shared,
            draws or nullcontext(),
            progress.configured_by(fast),
            _draws_of_first(fast, shared, aside=draws is not None) as of_first,
        ):
            return _run_call(fast, args, kwargs, observer, draws, of_first, running, **asked)
    except DivergenceError as error:
        diverged = error
        raise
    finally:
        if last.report is not None:
            if timeline.sums is not None:
                last.report = replace(last.report, timeline=timeline.sums)
            if diverged is not None:
                diverged.report = last.report
            logger.debug("%s: %s", type(fast).__name__, last.report)


def _given(fast: Any, arguments: Arguments, own: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what a call depends on: all ranks must be given the same."""
    options, networks = fast._srds.options, networks_of(fast).values()
    learns = options.audit, options.learn_stop
    # diffusers' notes beside what a scheduler was made with have no order that two processes share
    config = {name: value for name, value in getattr(fast.scheduler, "config", {}).items() if not name.startswith("_")}
    return {
        **versions(),
        "class of pipeline": type(fast).__qualname__,
        "scheduler": digest([type(fast.scheduler).__qualname__, config]),
        "setting of compile": repr(
            (options.settings, options.strict, options.overlap, options.network_options, learns)
        ),
        "plan": repr(None if options.plan is None else options.plan.signature),
        **{name: digest(value) for name, value in {**arguments, **own}.items() if name != "self"},
        "network": digest_of_weights(networks),
    }


def _draws_of_first(
    fast: Any, shared: SharedCall | None, *, aside: bool
) -> AbstractContextManager[PrivateDraws | None]:
    """In the block, what is drawn without a generator is what rank 0 draws.

    The global generators of ranks that would draw otherwise stay where they are. aside: so do those of all ranks.
    """
    if shared is None:
        return nullcontext()
    own = RandomState({}, execution_device(fast)).shared
    first = {device: shared.take(state) for device, state in own.items()}
    if not aside and all(torch.equal(own[device], state) for device, state in first.items()):
        return nullcontext()
    shared.random = first
    return PrivateDraws(first)


def _agreed_retry(shared: SharedCall, reason: str | None, why: Exception, seen: bool) -> str | None:
    """The reason for which all ranks start again: that of the first that has one. None: one of them cannot.

    reason, why: of this rank. A rank that was told of the failure of another one follows that one.
    """
    follows = not seen and isinstance(why, RankFailed)
    found = shared.agreed_reason("" if follows and reason is None else reason, "whether to start again")
    return found and (reason or found)


def _is_due(share: float, number: int) -> bool:
    """Whether the call with a number is one of a share of all calls."""
    return math.floor((number + 1) * share) > math.floor(number * share)


def _run_call(
    fast: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observer: Observer | None,
    draws: PrivateDraws | None,
    of_first: PrivateDraws | None,
    running: RunningCall,
    *,
    warming: bool = False,
    auditing: bool = False,
    previews: Previews | None = None,
) -> Any:
    """The call itself.

    warming: record everything that calls like this one will need. auditing: compare it with its sequential sample.
    previews: get what they need; the call need not decode its output.
    """
    state = fast._srds
    check_pipeline(state.original)  # a component may have been replaced since compile
    arguments = bind(fast, args, kwargs)
    own = {name: kwargs[name] for name in OWN_ARGUMENTS if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
    call = PipelineCall(fast, args, kwargs, arguments)
    check_switch("keep_trajectory", own.get("keep_trajectory", False))
    if own.get("warm_start") is not None:
        check_warm_start_method(state.planner.options)
    shared = distributed.current()
    if shared is not None:
        shared.compare(_given(fast, arguments, own))
    if (reason := stock_reason(call)) is not None:
        return stock_call(call, reason, own, running)
    loop, kind = kind_of_loop(fast, arguments), None
    any_loop = observer is None or previews is not None  # other observers are there for iterations
    if any_loop and not own and arguments.get("callback_on_step_end") is None and may_choose_stock(fast):
        kind = kind_of_call(fast, loop)
        chosen = None if kind is None else state.explorations.get(kind)
        refused = None if kind is None else state.refused.get(kind)
        if refused is not None:
            if observer is not None:
                refuse_stock_loop(refused)
            return stock_call(call, refused, own, running)
        if chosen is not None and chosen.chose_stock:
            state.last.exploration = chosen
            if previews is not None:
                previews.random = RandomState(arguments, call.device)
            return chosen_stock_call(call, chosen, running, observer)
    device = call.device
    random = RandomState(arguments, device)
    if previews is not None:
        previews.random = random
    cls, networks = type(state.original), list(call.networks.values())
    with (
        _lora_lock(fast, arguments),
        state.tokenizers.borrow(fast) as tokenizers,
        acceleration.applied(networks, state.options.network_options, device) as made,
        errors_held_back() if is_modular(fast) else nullcontext(),
    ):
        parts = {**tokenizers, **own_guiders(fast), **(without_progress_bar(fast) if state.quiet else {})}
        for left_out in made.reasons:
            warn_left_out(fast, left_out)
        audited = auditing or (not state.plan_only and _is_due(state.options.audit, next(state.calls)))
        function = arguments.get("callback_on_step_end")
        graphs, engine_reason = _graphs(call, warming)
        timed = kind is not None and observer is None
        settings = CallSettings(
            planner=state.planner,
            observer=observer,
            graphs=graphs,
            overlap="batch" if state.options.overlap == "auto" and not _graphs_on(device) else state.options.overlap,
            keep_states=function is not None or bool(own.get("keep_trajectory")),
            calls_back=function is not None,
            initial_guess=own.get("warm_start"),
            notify=functools.partial(warn_fallback, fast, "step by step"),
            plan_only=state.plan_only,
            strict=state.options.strict,
            networks=networks,
            replacements=made.replacements,
            generators=[generator for generator, _ in random.given],
            memory=state.loops,
            kind=loop,
            is_known=functools.partial(is_known, fast, networks),
            engine_reason=engine_reason,
            stock=functools.partial(seconds_of_stock, call, parts) if timed else None,
            audited=audited,
            draws=draws,
            draws_of_first=of_first,
            seen=None if previews is None else previews.seen,
        )
        lockstep = LockstepLoop(fast.scheduler, settings)
        proxied = copy_with_proxies(fast, on_device(cls, device), lockstep, parts)
        if is_modular(fast):
            proxied._blocks = driven(proxied._blocks, lockstep, whole=previews is None and not state.quiet)
        own_marks = vars(proxied)

        def interrupted() -> bool:  # a callback sets the attribute of the copy
            return bool(own_marks.get(NAME)) or running.is_asked()

        watch = cancellation.current()
        assert watch is not None
        watch.interrupted = interrupted
        asks: Callable[[], bool] = interrupted
        if shared is not None:  # the others end at the same wave
            shared.asks, watch.interrupted, asks = interrupted, lambda: shared.interrupted, shared.look
        callback, given = None, (args, kwargs)
        if function is not None:
            callback = StepCallback(function, lockstep, vars(fast), asks)
            bound = signature_of(cls.__call__).bind(proxied, *args, **kwargs)
            bound.arguments["callback_on_step_end"] = None if state.plan_only else callback
            lockstep.samples.callback = None if state.plan_only else callback
            # diffusers' official callbacks name the tensors they need
            if (names := getattr(function, "tensor_inputs", None)) is not None:
                bound.arguments["callback_on_step_end_tensor_inputs"] = names
            given = bound.args[1:], bound.kwargs
        without_steps: Report | None = None
        try:
            telemetry.phase("encode")
            with distributed.attempt("the pipeline's loop"):
                output = with_own_enumerate(cls.__call__)(proxied, *given[0], **given[1])
                if lockstep.had_no_step:
                    if observer is not None:
                        refuse_stock_loop(NO_STEP)
                    without_steps = stock_report(0, 0.0, fallback_reason=NO_STEP)
                elif not lockstep.finished:
                    raise UnsupportedPipeline("Its loop ended before its last step, or was not found.")
            state.last.settings = settings_of(proxied)
            return without_proxies(output) if is_modular(fast) else output
        except Exception as why:
            # a callback or a stream has already seen results of this call: it cannot start again
            seen = observer is not None or (callback is not None and lockstep.samples.told > 0)
            # a rank that failed alone has its own error behind the one that all ranks have
            cause = why.__cause__ if isinstance(why, RankFailed) and isinstance(why.__cause__, Exception) else why
            reason = None if seen else _why_retry(lockstep, cause)
            if shared is not None:
                reason = _agreed_retry(shared, reason, cause, seen)
            if reason is None:
                raise
        except BaseException:  # cancelled, Ctrl-C
            lockstep.driver.put_back()
            raise
        finally:
            lockstep.close()
            found = None if lockstep.session is None else lockstep.session.exploration
            # an entry is measured when it is written, which takes as long as a step of a small network
            if kind is not None and found is not None and state.explorations.get(kind) is not found:
                state.explorations[kind] = found
            report = lockstep.report(made.reasons) or without_steps
            state.last.report = report and replace(report, compile_seconds=made.compile_seconds)
            state.last.session = lockstep.session
            state.last.exploration = found
            state.last.trajectory = lockstep.samples.states() if own.get("keep_trajectory") else None
    lockstep.driver.restore_networks()
    if kind is not None and lockstep.driver.refused:
        state.refused[kind] = reason
    if shared is not None and shared.uneven:  # not all ranks have found out the same
        state.forget_calls()
    with random.replayed():
        output = stock_call(call, reason, own, running)
    if state.last.report is not None:
        state.last.report = replace(state.last.report, **lockstep.beside_the_waves())
    return output


def _graphs(call: PipelineCall, warming: bool) -> tuple[GraphRunner | None, str | None]:
    """What records and replays the call, or None; and, where something rules that out, why it runs eagerly."""
    state, eager = call.fast._srds, functools.partial(warn_eager, call.fast)
    lazy = state.options.lazy_capture or warming
    shared = distributed.current() is not None
    graphs = state.planner.graph_runner(state.graphs, _graphs_on(call.device), lazy, eager, warming, shared)
    if not any(is_offloaded(call.hooked[name]) for name in call.networks):
        return graphs, None
    why = "the network is offloaded: hooks move its weights at every call"
    if graphs is not None:
        eager(why)
    return None, why


def _why_retry(lockstep: LockstepLoop, error: Exception) -> str | None:
    """The reason for which the stock loop may succeed where this call failed, or None.

    A loop may contain code that does not work with proxies or random numbers. So its own errors count too; if such an
    error has another cause, the stock loop raises it again.
    """
    what = str(error).partition(". ")[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):  # the stock loop's waves have one row
        if lockstep.session is None or lockstep.run.sample is not None or lockstep.run.counts.peak_rows <= 1:
            return None
        lockstep.run.close()
        return no_room(lockstep.run.counts.peak_rows)
    if isinstance(error, UnsupportedPipeline | UsesWithheld) and not isinstance(error, WeightsWritten):
        return what[:1].lower() + what[1:]
    if isinstance(error, SrdsFastError) or lockstep.samples.network is not None:
        return None
    ended = f"ended in {type(error).__name__}: {what}"
    if (part := lockstep.driver.changed()) is not None:
        return (
            f"its loop puts hooks or other code into {part} and uses what these see in network calls: without such "
            f"calls it {ended}"
        )
    return f"its loop works with its own network and scheduler only: with objects of ours in their place it {ended}"


_lora_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def _lora_lock(fast: Any, arguments: Arguments) -> AbstractContextManager[Any]:
    """A lock for calls that scale a LoRA: diffusers scales the layers in place around every network call."""
    for name in SCALING:
        options = arguments.get(name)
        if isinstance(options, Mapping) and options.get("scale", 1.0) != 1.0:
            network = getattr(fast, "transformer", None) or fast.unet
            return _lora_locks.setdefault(network, threading.RLock())
    return nullcontext()
