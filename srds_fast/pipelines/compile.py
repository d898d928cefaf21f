"""`compile(pipe)`: a drop-in replacement for a diffusers pipeline."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from torch import Tensor

from .. import caches, clock
from ..engine import cancellation
from ..engine.cancellation import Cancel, OnWave
from ..engine.distributed import call as distributed
from ..engine.distributed.ranks import ranks_of
from ..engine.graphs.cache import GraphStats
from ..engine.run import Observer
from ..engine.streams import OVERLAPS
from ..errors import InvalidArgument
from ..planner.curve_cache import CurveCache
from ..planner.exploration import EXPLORING
from ..planner.plan import Plan, refuse_beside
from ..planner.settings import Settings
from ..sampling.sample import costs_of_denoisers
from ..sampling.stream import AsyncStream, Source, Stream, Worker
from ..schedulers.reader import replaced_methods
from ..schedulers.verify import adds_noise, check_scheduler
from ..solvers.checks import check_number, check_one_of, check_switch, check_whole
from ..solvers.method import Method
from ..telemetry.report import Report
from .acceleration import NetworkOptions
from .call import run_call, stock_reason
from .dry_run import calibrate, planned, turns_told
from .interrupts import NAME, interrupt_property
from .networks import check_pipeline, networks_of
from .own_draws import with_own_draws
from .previews import Previews
from .shown import shown_properties
from .state import Options, PipelineCall, State, new_state, undecoded, with_state
from .stock import refuse_stock_loop

# most calls in one warm-up: a call may show that another plan is faster, which must then be recorded too
MOST_WARM_UPS = 4
logger = logging.getLogger("srds_fast")


P = TypeVar("P", covariant=True)  # the class of the pipeline
T = TypeVar("T")  # the same, as an argument
A = ParamSpec("A")  # arguments of its call
R = TypeVar("R")  # what it returns

if TYPE_CHECKING:
    # Python has no type for "a P with more members": a type checker knows those of every pipeline, and takes the others
    # of P as Any
    from diffusers import DiffusionPipeline as _Pipeline
else:
    _Pipeline = object


class Compiled(Generic[P], _Pipeline):
    """The members that `compile` adds. An instance also belongs to the pipeline's class and shares its attributes."""

    __slots__ = ()
    _srds: State

    if TYPE_CHECKING:  # a compiled pipeline has the call of its own class

        @overload
        def __call__(self: Compiled[Callable[A, R]], *args: A.args, **kwargs: A.kwargs) -> R: ...
        @overload
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    def report(self) -> Report | None:
        """Report of this thread's last call; None before the first call, and after a call that raised early."""
        return self._srds.last.report

    @property
    def trajectory(self) -> Tensor | None:
        """The states of this thread's last call with `keep_trajectory=True`, [steps + 1, batch, ...].

        Pass it as `warm_start=` to a call with the same seed and steps and a related prompt. Methods that refine all
        points (collocation, parataa, paradigms) then need fewer waves for the same sample.
        """
        return self._srds.last.trajectory

    @property
    def original(self) -> P:
        """The pipeline that was compiled."""
        original: P = self._srds.original
        return original

    def __copy__(self) -> Any:
        """The same settings on a shallow copy of the pipeline."""
        return _made(copy.copy(self.original), self._srds.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same settings on a deep copy of the pipeline."""
        return _made(copy.deepcopy(self.original, memo), self._srds.options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the pipeline and the settings: what was measured and recorded belongs to this process."""
        return _made, (self.original, self._srds.options)

    def plan_for(self, *args: Any, measure: bool = False, **kwargs: Any) -> Plan:
        """The plan that a call with these arguments would run.

        Args:
            measure: measure the costs on which method="auto" decides, as the first call of a kind does. This needs all
                arguments of a call, and some tens of network calls. Otherwise nothing runs, and "auto" chooses as it
                does without measurements, unless the loop itself must tell how many steps it takes: of a modular
                pipeline, and with a `strength` or a part of the schedule.

        Raises:
            InvalidArgument: the call would run on the stock loop, which has no plan.
            PlanMismatch: the plan given to `compile` is for another number of steps.
        """
        call = PipelineCall.of(self, args, kwargs)
        turns = None if measure else turns_told(call)
        if turns is None:
            return planned(self, args, kwargs).plan
        refuse_stock_loop(stock_reason(call))
        plan, _ = self._srds.planner.choose(turns, adds_noise(self.scheduler, call.arguments.get("eta")))
        return plan

    def using(self, *, cancel: Cancel | None = None, on_wave: OnWave | None = None) -> AbstractContextManager[None]:
        """In the block, or in a function with it as its decorator, calls can be cancelled, and tell of their waves.

        `srds_fast.using`, where `cancel` and `on_wave` are described: it reaches every call of this package in this
        thread or asyncio task, not those of this pipeline alone.
        """
        return cancellation.using(cancel=cancel, on_wave=on_wave)

    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        """Call the pipeline and yield a whole image after every iteration; the last one is the result.

        Takes the arguments of a call; `output_type` and `return_dict` have no effect. Leaving the loop, or `close()`
        from any thread, ends the call at its next wave. `report` is set in the thread that iterates. Where the method
        has no whole image before its end ("sequential", windows that slide, or the stock loop where it was the
        fastest), the images on the way are what the network predicts after every few steps: `refinement.kind` is
        "x0 preview" then, and "iteration" elsewhere.

        Raises:
            InvalidArgument: the call cannot be accelerated, and would run on the stock loop for that reason.
        """
        return Stream(self._source(args, kwargs))

    def astream(self, *args: Any, **kwargs: Any) -> AsyncStream:
        """The same for asyncio: `async for refinement in fast.astream(prompt)`, see `AsyncStream`."""
        return AsyncStream(self._source(args, kwargs))

    def _source(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
        given, state = PipelineCall.of(self, args, kwargs), self._srds
        refuse_stock_loop(stock_reason(given))
        previews = Previews(given)

        def call(observer: Observer) -> None:
            run_call(self, args, {**kwargs, **undecoded(self)}, observer, previews=previews)

        # `last` is local to a thread
        def begun(worker: Worker) -> None:
            state.last.worker = worker

        def ended(report: Report | None) -> None:
            state.last.report = report

        network = next(iter(networks_of(self).values()))
        return Source(call, lambda: state.last.report, begun, ended, network.dtype, previews.decode)

    def warmup(self, *args: Any, audit: int = 0, freeze: bool = True, **kwargs: Any) -> Report:
        """Prepare calls with arguments like these: choose their plan, and record their graphs for all iterations.

        Takes the arguments of a call. Pass the `num_inference_steps`, `height`, `width`, numbers of prompts and images,
        and a `guidance_scale` on or off as in later calls. No random generator advances.

        Args:
            freeze: keep the plan of this kind of call for good: the same seed then gives the same bits, in threads with
                as many torch threads. It is not dropped if it turns out slower than the sequential loop later; a wave
                that does not fit into memory still ends it, and `report.plan_changed` says so. `reset` gives it up.
                False: later calls go on learning, may take other plans, and say so in `report.plan_changed`.
            audit: so many calls, each with other noise, are also compared with their sequential samples. From 19
                samples on, later calls of the kind stop by what this network showed: at most 5 % of samples like these
                are expected to end beyond the tolerance (conformal risk control). `report.stop_rule` says so.

        Returns:
            the report of the call; `engine_reason` says why nothing was recorded, if so. An interrupt ends the warm-up,
            with the report of the call that it has ended.
        """
        planner = self._srds.planner
        check_whole("audit", audit, 0)
        check_switch("freeze", freeze)
        if audit > 1 and kwargs.get("latents") is not None:
            raise InvalidArgument(
                "audit and latents were given. Calls with the same latents give the same sample, so they show "
                "nothing new. Leave latents out."
            )
        args, kwargs, draws = with_own_draws(PipelineCall.of(self, args, kwargs))

        def called(*, warming: bool = False, auditing: bool = False) -> Report:
            run_call(self, args, kwargs, warming=warming, auditing=auditing, draws=draws)
            assert self.report is not None
            return self.report

        with caches.keeping() if freeze else nullcontext():
            for _ in range(MOST_WARM_UPS):
                recorded = self.graphs.captured
                report = called(warming=True)
                if report.interrupted:
                    return report
                if not planner.settings.measures:
                    break
                with distributed.sharing(self._srds.ranks):  # another rank may have had nothing to record
                    captured = clock.agreed(self.graphs.captured - recorded, "the recordings of a warm-up")
                if not (captured or report.plan_state == EXPLORING):
                    break
            for _ in range(audit):
                report = called(auditing=True)
                if report.interrupted:
                    return report
            if freeze and self._srds.last.exploration is not None:
                self._srds.last.exploration.hold()
        # collect garbage now: a collection of all objects takes as long as many calls of a small network
        gc.collect()
        return report

    def calibrate(self, prompts: Sequence[Any], *, num_samples: int = 8, quantile: float = 0.95, **kwargs: Any) -> Plan:
        """Measure how many iterations each plan needs on this network, and use the fastest plan for later calls.

        Without calibration a call estimates its error from the change per iteration, and may run one more iteration to
        confirm it. Calibration measures the difference to the sequential sample instead. It fixes the number of
        iterations that keeps this share of the samples within the tolerance, for later calls with as many steps, the
        same guidance, and as many images and tokens. Other calls do not use the plan, as `report.left_out` says.

        Args:
            prompts: inputs like those of later calls, used in turn; each is a prompt, or a dict of arguments.
                One alone may be given.
            num_samples: number of calls, each with its own seed, of every plan that may be the fastest.
            quantile: share of the samples that must be within the tolerance.
            kwargs: arguments of the calls: `num_inference_steps`, `guidance_scale`, `height` and so on. No generator.

        Returns:
            the plan, with all candidates in its `prediction`; `Plan.save` writes it for another process.

        Raises:
            InvalidArgument: the call cannot be taken over, or an argument is out of range.
        """
        return calibrate(self, prompts, num_samples, quantile, kwargs)

    def reset(self) -> None:
        """Empty every cache: recordings, calibrated plans, measured costs and all else that calls have left.

        Those that all calls of the process share, such as tables and the costs measured by `sample`, are emptied too.
        Running calls are not affected.
        """
        self._srds.clear()
        costs_of_denoisers.clear()
        caches.clear()

    @property
    def graphs(self) -> GraphStats:
        """Counts of recordings and replays so far, in all threads."""
        return self._srds.graphs.stats


def compile(
    pipe: T,
    *,
    method: str | Method = "auto",
    tolerance: float = 4e-3,
    exact: bool = False,
    num_blocks: int | None = None,
    max_iterations: int | None = None,
    coarse_solver: str = "auto",
    pipelined: bool = True,
    in_flight: int | None = None,
    max_rows: int | None = None,
    engine: str = "auto",
    max_graphs: int = 8,
    lazy_capture: bool = True,
    attention: str = "auto",
    channels_last: bool | None = None,
    torch_compile: str | None = None,
    overlap: str = "batch",
    plan: Plan | None = None,
    strict: bool = False,
    explore: float = 3.0,
    cache_dir: str | os.PathLike[str] | None = None,
    latency: str = "adaptive",
    same: str = "sample",
    audit: float = 0.0,
    learn_stop: bool = False,
    parallel: Any = None,
) -> Compiled[T]:
    """A drop-in replacement for a diffusers pipeline that samples parallel in time.

    Call the result as you call the pipeline: it takes the same arguments and returns the same output. Its class has the
    same name, and it shares the pipeline's attributes, so LoRA, `.to()` and the rest act on both. The pipeline itself
    is not changed. Compiling a compiled pipeline gives a new one with the new settings.

    Args:
        pipe: a diffusers pipeline, modular or not. Its loop is rehearsed in the first call of a kind.
        method: the name of a method, such as "srds" or "sequential" (our path, one row per wave), or its options; see
            `srds_fast.methods`. "auto" takes the fastest for this network on this device: the first call of a kind
            measures what network calls cost, and the first three also time other plans, see `explore`. If the loop
            makes its own turns, no other plan is timed: merged calls and a turn are. Where the kind of call is unknown,
            nothing is: "auto" is then srds, or sequential below six steps.
        tolerance: bound on the mean absolute difference to the sequential sample, per sample, in the units of the
            state (data in [-1, 1]: one grey level is 1 / 127.5). 0: iterate until the sample no longer changes.
        exact: iterate until the result equals the sequential one by construction.
        num_blocks: B, number of blocks of steps. Default: blocks of about sqrt(N) / 2 steps.
        max_iterations: largest number of iterations. Default: B, where the result is exact.
        coarse_solver: "2m" (DPM-Solver++(2M) jump), "ddim" (first order) or "auto" (2m; ddim if steps add noise).
        pipelined: start rows of the next iteration as soon as their input exists.
        in_flight: number of SRDS iterations that run at once: fewer rows, but more waves where an iteration had to
            start earlier. Default: no bound, or what "auto" finds to pay.
        max_rows: widest wave allowed; memory grows with it.
        engine: "graph" replays a CUDA graph from one checkpoint to the next, or a graph of the network for each width
            of a wave where that is impossible; "network-graphs" always the second; "eager" runs every wave from Python;
            "auto": graphs on a CUDA device that is not busy all through a network call, measured once per kind of call.
        max_graphs: number of recordings kept; each is of a plan at one shape. The least recently used goes first.
        lazy_capture: record calls of a new kind when they come; False: in `warmup` alone.
        attention: "auto" changes nothing; "sdpa" is torch's attention, "xformers" that of the package, others are names
            of diffusers' attention backends. Switched for the time of a call.
        channels_last: True: channels-last weights in convolution networks; False: contiguous ones; None changes
            nothing. The layout stays after the call: to copy all weights twice a call would cost more than it saves.
        torch_compile: a mode of torch.compile for the networks, "default" or "max-autotune-no-cudagraphs"; graphs then
            hold the compiled code. Compiling takes seconds to minutes, once or twice: the number of rows is dynamic.
            "auto": mode "default", but each number of rows runs whichever was faster when it first came, compiled code
            or the network itself. What that takes is in the log and in `report.compile_seconds`.
        overlap: "batch": all rows of a wave in one network call; "streams": coarse rows in a separate network call, on
            a CUDA device in a parallel stream; "auto": batch, or the faster of the two where a loop graph is recorded.
        plan: a plan to run instead of choosing one for each number of steps; it fixes the settings from method to
            engine.
        strict: raise if a call would run on the stock loop, or eagerly although engine="graph" was given, or if the
            method diverges, instead of starting again one step after another.
        explore: the time that "auto" may spend on timing other plans, the sequential loop and the stock loop in the
            first three calls of a kind, in sequential calls. The fastest is then kept. It may be the stock loop, whose
            report has method "stock". 0: by measured network calls alone. `warmup` spends it before serving.
        cache_dir: a folder where measured costs are kept for other processes, by device, versions, and the shapes of
            network and call. Default: the folder that the environment variable SRDS_FAST_CACHE names, if any.
        latency: "adaptive": a call stops where its estimated error is within the tolerance; "constant": every call
            takes the same waves, for the iterations that the method mostly needs, or `max_iterations`, or what
            `calibrate` found. `report.missed` counts the samples whose estimated error is beyond the tolerance then.
        same: what "auto" keeps of the sequential sampler: "sample": its sample for the seed, within the tolerance;
            "law": where the scheduler adds noise, also another sample with the same distribution, if that is faster
            (method="speculative"). `report.stopped_by` is "same law" then.
        audit: share of the calls, 0 to 1, that are also compared with their sequential samples, see `warmup`. Such a
            call takes longer by a sequential one and a parallel one.
        learn_stop: let calls of srds learn from earlier ones of their kind when to stop after the first iteration: from
            19 samples on, where 95 % of these say that its change leaves an error within the tolerance. It costs no
            sequential sample. The same seed may then give another sample, within the tolerance, than it gave before.

        parallel: processes that make each sample together, one device each, started by torchrun or the like: "auto"
            (those of the default process group, if it is initialised), a ProcessGroup, or a DeviceMesh (its dimension
            "time"). All of them make the same calls with the same arguments. Each evaluates its share of a wave's rows
            and guidance branches; one gather a wave brings the outputs together, and all have the sample. Unseeded
            calls begin with the noise of rank 0, by whose clock plans are chosen. Such calls use no loop graphs.

    Returns:
        The compiled pipeline. It adds the members of `Compiled`, such as `report`, `plan_for` and `stream`.

    Raises:
        UnsupportedPipeline: it is no diffusers pipeline with a scheduler.
        UnsupportedScheduler: the scheduler is not supported; the message holds the line to write.
        InvalidArgument: a setting is out of its range.

    With `parallel` calls also raise, on all ranks: RankMismatch if ranks were called with different things, RankFailed
    if one of them left the call by an error, RankLost if one has ended or does not answer.
    """
    settings = Settings(
        method,
        tolerance,
        exact,
        num_blocks,
        max_iterations,
        coarse_solver,
        pipelined,
        max_rows,
        engine,
        in_flight,
        explore,
        latency,
        same,
    )
    check_number("audit", audit, 0, 1, why="It is a share of the calls.")
    refuse_beside(plan, settings, Settings())
    check_switch("lazy_capture", lazy_capture)
    check_switch("strict", strict)
    check_switch("learn_stop", learn_stop)
    check_one_of("overlap", overlap, OVERLAPS)
    original: Any = pipe.original if isinstance(pipe, Compiled) else pipe
    check_pipeline(original)
    if not replaced_methods(original.scheduler):  # calls then run on the stock loop
        check_scheduler(original.scheduler)
    network_options = NetworkOptions(attention, channels_last, torch_compile)
    cache = CurveCache.of(cache_dir, network_options)
    ranks_of(parallel)  # the ranks of a group are made together
    learned, recorded = (plan, cache, learn_stop), (strict, lazy_capture, max_graphs)
    made: Compiled[T] = _made(
        original, Options(settings, *learned, *recorded, network_options, overlap, audit, parallel)
    )
    return made


def _made(original: Any, options: Options) -> Any:
    return with_state(_fast_class(original.__class__), new_state(original, options))


@functools.cache
def _fast_class(base: Any) -> type:
    """A subclass of the pipeline's class with the same name; its own state is not in the shared attributes."""

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_call(self, args, kwargs)

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # `from_pipe` and `from_pretrained` come here
        logger.warning(
            "The class of a compiled %s makes pipelines that are not compiled: write srds_fast.compile(pipe).",
            base.__name__,
        )
        return base(*args, **kwargs)

    shown = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {"__call__": __call__, "__new__": __new__, NAME: interrupt_property()}
    own = {"__slots__": ("_srds",), **shown_properties(base), **methods, **shown}
    return type(base.__name__, (Compiled, base), own)
