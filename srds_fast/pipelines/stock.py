"""The stock loop of a pipeline: calls run on it where ours cannot or should not, and it is timed beside ours."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import telemetry
from ..caches import signature_of
from ..engine import cancellation
from ..engine.cancellation import Watch
from ..engine.compiled import AUTO
from ..engine.distributed import call as distributed
from ..engine.distributed.call import SharedCall
from ..engine.merging.rule import Call
from ..engine.run import Observer
from ..errors import InvalidArgument
from ..planner.exploration import STOCK, Exploration
from ..sampling.trials import TurnClock
from ..schedulers.own_loop import copy_scheduler
from ..schedulers.private_draws import PrivateDraws
from ..telemetry.report import stock_report
from .acceleration import NetworkOptions
from .hooks import on_device
from .interrupts import RunningCall, own_attributes, with_shared_mark
from .kinds import KindOfLoop
from .lockstep.proxies import NetworkProxy
from .modular.blocks import without_progress_bar
from .networks import own_guiders
from .notices import warn_fallback
from .own_draws import with_own_draws
from .previews import StockPreviews
from .replaced import functions_of, shallow_copy
from .shown import settings_of
from .state import PipelineCall, undecoded

NO_STEP = "its loop has no step"


def refuse_stock_loop(reason: str | None) -> None:
    """Raise InvalidArgument if there is a reason for the stock loop, where a plan or iterations are asked for."""
    if reason is not None:
        raise InvalidArgument(
            f"This call has no plan and no previews: {reason}. It would run in the pipeline's own loop. Change what "
            "the reason names."
        )


def stock_call(call: PipelineCall, reason: str, own: Iterable[str], running: RunningCall) -> Any:
    """Call the pipeline itself, for a reason. own: arguments of ours that it does not take. running: this call."""
    fast, state = call.fast, call.fast._srds
    if state.quiet:
        refuse_stock_loop(reason)
    warn_fallback(fast, "in its own loop, without srds_fast", reason)
    left_out = [f"{name} has no effect: the pipeline's own loop does not use it" for name in own]
    reported = {"fallback_reason": reason, "left_out": left_out}
    if distributed.current() is not None:
        with _looked_at(call, running), _twin(call, {}, None, lambda: None) as twin:
            try:
                return _called(call, twin, **reported)
            finally:  # what the loop leaves on the pipeline
                vars(state.original).update(own_attributes(twin))
    with state.interrupts.on_pipeline_itself(running), _looked_at(call, running):
        return _called(call, state.original, **reported)


@contextmanager
def _looked_at(call: PipelineCall, running: RunningCall) -> Iterator[None]:
    """In the block, what is to end this call is looked at before every network call of its pipeline.

    The pipeline is the user's own, and no copy. Its networks may be called by other threads too, so nothing is hung on
    them: the hook is torch's global one, which costs every module of the call a look, while somebody asks for it.
    """
    watch = cancellation.current()
    if not running.asked and (watch is None or not watch.asks):
        yield
        return
    networks = set(map(id, call.networks.values()))

    def look(module: nn.Module, args: Any) -> None:
        if id(module) in networks and cancellation.current() is watch:
            if running.asked:
                running.end_early()  # the loop has taken its mark away when it began
            if watch is not None:
                step = getattr(call.fast.scheduler, "step_index", None)
                watch.wave(1, step if isinstance(step, int) else None, interrupts=False)

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


class _StockWaves:
    """Looks, before the network calls of a twin's loop, whether its call is to end; see `NetworkProxy`."""

    def __init__(self, watch: Watch, *, interrupts: bool) -> None:
        self._watch, self._interrupts = watch, interrupts
        self._steps, self._begun = 0, False

    def call(self, call: Call) -> Any:
        if self._begun:
            self._watch.look_within()
        else:
            self._watch.wave(1, self._steps, interrupts=self._interrupts)
            self._begun = True
        return call()

    def stepped(self) -> None:
        """The scheduler has made a step."""
        self._steps, self._begun = self._steps + 1, False


@contextmanager
def _twin(
    call: PipelineCall,
    parts: dict[str, Any],
    watch: Watch | None,
    stepped: Callable[[], None],
    *,
    interrupts: bool = False,
) -> Iterator[Any]:
    """A shallow copy of the pipeline with these parts and its own scheduler, which calls `stepped` after each step.

    watch: its networks look whether the call is to end, where somebody asks; None: they do not. interrupts: also by
    `_interrupt`.

    Where several ranks run the loop, each goes on from the sample of rank 0 after every step, and they end early at
    the same step: so all have the same sample, whatever has happened on one of them.

    Behind the block the scheduler calls nothing: the function that does holds the scheduler, and the call the copy.
    What was recorded or cached on them would stay in memory until the collector comes.
    """
    if watch is not None and watch.asks:
        waves = _StockWaves(watch, interrupts=interrupts)
        parts = {**parts, **{name: NetworkProxy(each, waves) for name, each in call.networks.items()}}
        each_step = [waves.stepped, stepped]
    else:
        each_step = [stepped]
    shared, cls = distributed.current(), on_device(type(call.fast.original), call.device)
    scheduler = copy_scheduler(call.fast.scheduler)
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def step_and_tell(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        if shared is not None:
            found = _of_first(found, shared)
        for tell in each_step:
            tell()
        return found

    scheduler.step = step_and_tell
    try:
        cls = cls if shared is None else with_shared_mark(cls, shared)
        yield shallow_copy(call.fast, cls, **parts, scheduler=scheduler)
    finally:
        del scheduler.step


def _of_first(found: Any, shared: SharedCall) -> Any:
    """What a scheduler's step has returned, with the sample of rank 0."""
    if isinstance(found, tuple) and isinstance(found[0], Tensor):
        return (shared.take(found[0]), *found[1:])
    if isinstance(found, dict) and isinstance(found.get("prev_sample"), Tensor):
        found["prev_sample"] = shared.take(found["prev_sample"])
    return found


def chosen_stock_call(call: PipelineCall, chosen: Exploration, running: RunningCall, observer: Observer | None) -> Any:
    """Run the stock loop because it was the fastest, on a twin of the pipeline: calls may run in several threads.

    observer: of a stream.
    """
    fast, shared = call.fast, distributed.current()

    def stepped() -> None:
        if shared is None and running.is_asked():
            twin._interrupt = True

    with (
        fast._srds.tokenizers.borrow(fast) as tokenizers,
        _twin(call, {**tokenizers, **own_guiders(fast)}, _watch(), stepped) as twin,
    ):
        previews = None if observer is None else StockPreviews(observer)
        if previews is not None:
            previews.look_at(twin.scheduler)
        plan = {"plan_reason": chosen.why, "plan_state": chosen.state, "plan_changed": chosen.taken(STOCK)}
        output = _called(call, twin, **plan)
        fast._srds.last.settings = settings_of(twin)
        if previews is not None:
            previews.end()
        return output


def seconds_of_stock(call: PipelineCall, parts: dict[str, Any], turns: int) -> float:
    """Seconds that all turns of a call's stock loop take, by its first ones. No random generator advances.

    The pipeline's own code runs, on a shallow copy. parts: of the copy, that belong to the call, which is under way.
    """
    fast, watch = call.fast, _watch()
    clock = TurnClock(turns, call.device)

    def stepped() -> None:
        watch.look()
        clock.turned()

    args, kwargs, draws = with_own_draws(call)
    with (
        _twin(call, {**parts, **without_progress_bar(fast)}, watch, stepped, interrupts=True) as twin,
        draws or nullcontext(),
        ExitStack() as timed,
    ):
        loop = type(twin).__call__
        bound = signature_of(loop).bind(twin, *args, **kwargs)
        bound.arguments.update(undecoded(fast))
        if draws is not None:
            twin.scheduler.step = _in_private(twin.scheduler.step, draws, timed)
        return clock.seconds(lambda: loop(*bound.args, **bound.kwargs))


def _watch() -> Watch:
    watch = cancellation.current()
    assert watch is not None  # a call of a pipeline has one
    return watch


def _called(call: PipelineCall, pipe: Any, **reported: Any) -> Any:
    telemetry.phase("stock")
    started = time.perf_counter()
    output = type(pipe).__call__(pipe, *call.args, **call.kwargs)
    seconds = time.perf_counter() - started
    turns = settings_of(pipe).get("_num_timesteps", len(pipe.scheduler.timesteps))
    call.fast._srds.last.report = stock_report(
        -(-turns // order_of(pipe.scheduler)), seconds, ranks=distributed.size(), **reported
    )
    return output


def order_of(scheduler: Any) -> int:
    """How many turns of its loop a step takes."""
    return int(getattr(scheduler, "order", 1))  # a few schedulers of first order do not say so


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


def kind_of_call(fast: Any, kind: KindOfLoop | None) -> Hashable | None:
    """What the time of a call depends on, known before it begins; None if an argument is of an unknown type."""
    return None if kind is None else (kind, repr(sorted(fast.scheduler.config.items())), torch.get_num_threads())


def may_choose_stock(fast: Any) -> bool:
    """Whether the stock loop is an answer to calls of this pipeline: not if it lacks what was asked for.

    Nor is it timed where functions of the user's would then be called once more, and might count.
    """
    state = fast._srds
    options = NetworkOptions(torch_compile=state.options.network_options.torch_compile)
    asked = state.options.network_options != options or options.torch_compile not in (None, AUTO)
    return not (state.options.strict or state.quiet or state.plan_only or asked or any(functions_of(fast)))
