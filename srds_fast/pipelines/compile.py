"""`compile(pipe)`: a drop-in for a diffusers pipeline."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..engine.costs_kept import Costs
from ..engine.graphs.cache import Graphs, GraphStats
from ..engine.run import Observer
from ..engine.streams import OVERLAPS
from ..errors import InvalidArgument, UnsupportedPipeline
from ..planner.plan import Plan, refuse_beside
from ..planner.settings import Settings
from ..sampling.session import Planner
from ..schedulers.builders import adds_noise
from ..schedulers.verify import check_scheduler
from ..solvers.method import Method
from ..telemetry.report import Report
from .acceleration import NetworkOptions
from .call import run_call, stock_reason
from .dry_run import calibrate, planned
from .families import family_of
from .state import RandomState, State, bind, steps_of, undecoded
from .stream import Refinement, refinements


class FastPipeline:
    """What `compile` adds to a pipeline. Instances also are of the pipeline's own class and share its attributes."""

    __slots__ = ()
    _srds: State

    @property
    def report(self) -> Report | None:
        """Report of the last call made in this thread; None before the first, and after one that raised early."""
        return self._srds.last.report

    @property
    def trajectory(self) -> Tensor | None:
        """The states of the last call made in this thread with `keep_trajectory=True`, [steps + 1, batch, ...].

        Given to another call as `warm_start=`, with the same seed and steps and a related prompt, methods that refine
        all points (collocation, parataa, paradigms) begin with them: the nearer, the fewer waves. The sample they come
        to is the same.
        """
        return self._srds.last.trajectory

    @property
    def original(self) -> Any:
        """The pipeline that was compiled."""
        return self._srds.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same settings on a deep copy of the pipeline."""
        state = self._srds
        original = copy.deepcopy(state.original, memo)
        graphs = Graphs(state.graphs.max_graphs)
        return _fast(
            State(
                original,
                replace(state.planner, costs=Costs(), calibrated=dict(state.planner.calibrated)),
                state.strict,
                state.lazy_capture,
                graphs,
                state.network_options,
                state.overlap,
            )
        )

    def plan_for(self, *args: Any, measure: bool = False, **kwargs: Any) -> Plan:
        """The plan a call with these arguments would run.

        Args:
            measure: find the costs out that method="auto" chooses by, as the first call of a kind does; it takes the
                arguments of a whole call then, and some tens of network calls. Otherwise nothing is run, and "auto"
                is what it takes where nothing can be measured.

        Raises:
            InvalidArgument: the call would run on the stock loop, which has no plan.
            PlanMismatch: the plan given to `compile` is for another number of steps.
        """
        arguments = bind(self, args, kwargs)
        reason = stock_reason(self, family_of(self._srds.original), arguments)
        if measure and reason is None:
            return planned(_fast, self._srds, args, kwargs).plan
        if reason is not None:
            raise InvalidArgument(f"This call has no plan: {reason}. It runs on the stock loop. Change what is named.")
        stochastic = adds_noise(self.scheduler, float(arguments.get("eta") or 0.0))  # type: ignore[attr-defined]
        return self._srds.planner.choose(steps_of(arguments), stochastic)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Refinement]:
        """Call the pipeline and yield a whole image after every iteration, the last one being the result.

        Takes the arguments of the call; `output_type` and `return_dict` do not matter. Closing the iterator ends the
        call. `report` is set in the thread that iterates.

        Raises:
            InvalidArgument: the call would run on the stock loop, which has no iterations.
        """
        arguments = bind(self, args, kwargs)
        reason = stock_reason(self, family_of(self._srds.original), arguments)
        if reason is not None:
            raise InvalidArgument(
                f"This call cannot be streamed: {reason}. The stock loop has no iterations to show. "
                "Leave the argument out, or call without stream."
            )
        return _stream(self, args, kwargs)

    def warmup(self, *args: Any, **kwargs: Any) -> Report:
        """Make a call for its graphs alone: what it needs is recorded, for all iterations it could take.

        Takes the arguments of the call; what they hold does not matter, what they are does (shapes, steps, guidance on
        or off). A generator given is not advanced, nor is the global random state. Give `num_inference_steps`,
        `height`, `width`, the number of prompts and of images, and whether guidance is on, as the calls to come will.

        Returns:
            the report of the call; `engine_reason` says why, if nothing could be recorded.
        """
        return _warmup(self, args, kwargs)

    def calibrate(self, prompts: Sequence[Any], *, num_samples: int = 8, quantile: float = 0.95, **kwargs: Any) -> Plan:
        """Find out how many iterations each plan needs on this network, and take the fastest for the calls to come.

        A tolerance stops a call by what its change lets expect, and a call that has come within it may go on to
        confirm. Here the difference to the sequential sample is measured instead, and the iterations that keep it
        within the tolerance for that share of the samples are fixed: later calls of this number of steps all take the
        same time, and none confirms.

        Args:
            prompts: what calls like those to come are given, in turn: each a prompt, or a dict of arguments.
            num_samples: calls of every plan that may be the fastest, and of the sequential sampler; each with another
                seed.
            quantile: share of the samples that must be within the tolerance.
            kwargs: of the call: `num_inference_steps`, `guidance_scale`, `height` and the like. No generator.

        Returns:
            the plan, with all candidates in its `prediction`; `Plan.save` keeps it for another process.

        Raises:
            InvalidArgument: the call cannot be taken over, so that nothing can be measured; or tolerance or quantile
                are out of range.
        """
        return calibrate(_fast, self._srds, list(prompts), num_samples, quantile, kwargs)

    def reset(self) -> None:
        """Give up all recordings and their memory, measured costs and calibrated plans.

        Calls made before go on undisturbed.
        """
        self._srds.graphs.clear()
        self._srds.planner.costs.clear()
        self._srds.planner.calibrated.clear()

    @property
    def graphs(self) -> GraphStats:
        """What was recorded and replayed so far, in all threads."""
        return self._srds.graphs.stats


def compile(
    pipe: Any,
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
) -> Any:
    """A drop-in for a diffusers pipeline that samples parallel in time.

    The result is called as the pipeline is, with the same arguments and the same output; it is an instance of a class
    of the same name that shares the pipeline's attributes, so LoRA, `.to()` and the rest act on both. The pipeline
    itself is not changed and can be called as before. No device work is done here. Compiling a compiled pipeline gives
    it the new settings.

    Args:
        pipe: a diffusers pipeline. The loops of many are known, those of others are read; see the table in README.
        method: the name of one, as "srds" or "sequential" (our path, one row a wave), or its options;
            `srds_fast.methods` has all of them. "auto" takes the fastest for this network on this device: what
            calls of it cost is measured in the first call of its kind. Where the loop is driven nothing can be measured
            ahead: it is srds then, and sequential below six steps.
        tolerance: bound of the mean absolute difference to the sequential sample, per sample, in the units of the
            latents (data in [-1, 1]: one grey level is 1 / 127.5). 0 runs until nothing moves.
        exact: run until the result is the sequential one by construction.
        num_blocks: B, blocks the steps are cut into. Default: blocks of about sqrt(N) / 2 steps.
        max_iterations: iterations at most. Default: B, where the result is exact.
        coarse_solver: "2m" (DPM-Solver++(2M) jump), "ddim" (first order) or "auto" (2m; ddim where steps add noise).
        pipelined: start rows of the next iteration as soon as their input exists.
        in_flight: iterations of SRDS under way at once: rows of iteration p wait for the sample of iteration
            p - in_flight, which may be enough. Fewer rows, but more waves where it is not. Default: no bound; "auto"
            takes what it finds to pay.
        max_rows: widest wave allowed; memory grows with it.
        engine: "graph" records the waves of a call and replays them in later ones of its kind: a CUDA graph from one
            checkpoint to the next (or one for each width of a wave, where that is too long), on the CPU a tape of
            operations, for tests. "wave-graphs": one for each width at once. "eager" runs every wave from Python.
            "auto": graphs on a CUDA device, where it is not busy all through a network call: that is measured once for
            each kind of call.
        max_graphs: recordings kept; one is of a plan at one shape. The least recently used goes first.
        lazy_capture: record calls of a new kind when they come; False: in `warmup` alone.
        attention: "auto" leaves the networks' attention as it is; "sdpa" is torch's, "xformers" that of the package,
            others are names of diffusers' attention backends. Switched for the time of a call, and put back.
        channels_last: lay the weights of convolution networks out so (False: contiguous); None leaves them. The layout
            stays: values and results are the same, and copying all weights twice a call would cost more than it brings.
        torch_compile: a mode of torch.compile for the networks, "default" or "max-autotune-no-cudagraphs"; graphs then
            hold the compiled code. Compiles anew for every width of a wave: seconds to minutes in the first calls.
        overlap: "batch": all rows of a wave in one network call; "streams": the coarse ones in a call of their own, on
            a CUDA device beside the others, in a stream of high priority; "auto": one batch, but where a loop graph is
            recorded on a CUDA device, whichever its replay shows to be faster (to record both takes twice as long).
        plan: a plan to run instead of choosing one for each number of steps; it fixes all settings above.
        strict: raise where a call would run on the stock loop, or eagerly though engine="graph" was asked for.

    Returns:
        The drop-in, with `report`, `plan_for`, `stream` and `original` added.

    Raises:
        UnsupportedPipeline: its loop, or its network, is not understood; the message says what in it.
        UnsupportedScheduler: its scheduler is not supported; the message holds the line to write.
        InvalidArgument: a setting is out of its range.
    """
    settings = Settings(
        method, tolerance, exact, num_blocks, max_iterations, coarse_solver, pipelined, max_rows, engine, in_flight
    )
    refuse_beside(plan, settings, Settings())
    switches = {"exact": exact, "pipelined": pipelined, "lazy_capture": lazy_capture, "strict": strict}
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise InvalidArgument(f"{name} is {switch!r}. It is a switch. Pass True or False.")
    if isinstance(max_graphs, bool) or not isinstance(max_graphs, int) or max_graphs < 1:
        raise InvalidArgument(
            f"max_graphs is {max_graphs!r}. It must be a whole number, 1 or more. "
            "To record nothing, pass engine='eager'."
        )
    original = pipe.original if isinstance(pipe, FastPipeline) else pipe
    family_of(original)
    check_scheduler(original.scheduler)
    network_options = NetworkOptions(attention, channels_last, torch_compile)
    if overlap not in OVERLAPS:
        raise InvalidArgument(f"overlap is {overlap!r}. Known are {', '.join(OVERLAPS)}. Pass one of these.")
    graphs = Graphs(max_graphs)
    return _fast(State(original, Planner(settings, plan), strict, lazy_capture, graphs, network_options, overlap))


def _fast(state: State) -> Any:
    original = state.original
    cls = _fast_class(original.__class__)
    fast: Any = object.__new__(cls)
    # the very same dictionary: what is loaded into one is there in the other
    object.__setattr__(fast, "__dict__", original.__dict__)
    object.__setattr__(fast, "_srds", state)
    return fast


@functools.cache
def _fast_class(base: Any) -> type:
    """A subclass of the pipeline's class, of the same name, whose own state lies outside the shared attributes."""

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_call(self, args, kwargs)

    members = {"__slots__": ("_srds",), "__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
    cls = type(base.__name__, (FastPipeline, base), members)
    cls.__qualname__ = base.__qualname__
    return cls


# calls of a kind: what one has taken may show that another plan is faster, which is then recorded too
MOST_WARM_UPS = 4


def _warmup(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    arguments = bind(fast, args, kwargs)
    random = RandomState(fast, arguments)
    try:
        for _ in range(MOST_WARM_UPS):
            recorded = fast.graphs.captured
            run_call(fast, args, kwargs, warming=True)
            if fast.graphs.captured == recorded or not fast._srds.planner.settings.measures:
                break
        fast._srds.planner.costs.settle()  # it has been recorded
    finally:
        random.restore()
    report: Report = fast.report
    return report


def _stream(fast: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Refinement]:
    state = fast._srds
    reports: list[Report | None] = []
    arguments = bind(fast, args, kwargs)
    family = family_of(state.original)

    def call(observer: Observer) -> None:
        try:
            run_call(fast, args, {**kwargs, **undecoded(fast)}, observer)
        finally:
            reports.append(state.last.report)  # of the thread that made the call

    def decode(latents: Any) -> Any:
        if family.decode is None:
            raise UnsupportedPipeline(
                f"How {type(fast).__name__} decodes its latents is not known. Refinement.latents are there all the "
                "same. Decode them as the pipeline does."
            )
        return family.decode(fast, latents, arguments)

    network = getattr(fast, family.loop(fast, arguments).networks[0])
    try:
        yield from refinements(call, network.dtype, decode)
    finally:
        if reports:
            state.last.report = reports[-1]
