"""One sampling run, from plan to report: plan, measure costs, run (graph or eager), recover, learn.

`sample()` and compiled pipelines differ only in how they call the network. Everything else happens here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import clock
from ..engine.distributed import call as distributed
from ..engine.eager import Evaluator
from ..engine.graphs.runner import GraphRunner
from ..engine.run import Counts, EngineUse, Observer, Run
from ..engine.streams import TwoLanes
from ..errors import DivergenceError, UnsupportedPipeline
from ..kernels.common.clamping import Threshold
from ..kernels.common.dispatch import implementation
from ..planner.choose import choose
from ..planner.context import KIND_OF_CALL, Context, context_of
from ..planner.exploration import Exploration
from ..planner.plan import PREVIEWS, Plan
from ..planner.search import Pricing
from ..planner.settings import Settings
from ..schedulers.table import NoiseTable
from ..solvers.contract import Checkpoint, Evaluate, SolverInputs
from ..solvers.convergence import Diverged, NotFinite
from ..solvers.registry import SEQUENTIAL
from ..telemetry.report import BY_INTERRUPT, SEQUENTIAL_LOOP, Report
from ..words import counted
from .network import Network, price_of
from .planner import Planner
from .stop_rule import stop_rule
from .trials import Advance, StartAgain, TimeStock, TooSlow, Trials, all_waves, audit, cut_off


@dataclass(eq=False)
class Session:
    """One sampling run.

    Either `complete` runs all waves, or a caller that evaluates them itself takes them one by one with `next`. The
    current `run` is replaced by a recovery.

    Raises:
        PlanMismatch: the given plan is not valid for the call.
        UnsupportedScheduler: the method of the plan cannot run the steps.
        DivergenceError: (`next`, `complete`) the network returned NaN or Inf; with `strict` also: the method diverged.
    """

    planner: Planner
    state: Tensor  # starting noise, [batch, ...], in the dtype of the state
    noise: NoiseTable
    inputs: SolverInputs
    path: str
    network: Network | None = None  # None: the caller evaluates the waves, and costs cannot be measured
    graphs: GraphRunner | None = None  # None: the waves run eagerly
    observer: Observer | None = None
    started: float | None = None  # perf_counter() at the first network call, if that was before the session was made
    # called with the reason why the call falls back to one step after another; may raise
    notify: Callable[[str], None] = lambda reason: None
    # runs the loop that the call would run on without this package, and returns its seconds; None: it cannot be run
    # beside this call, or does not give what is asked for
    stock: TimeStock | None = None
    audited: bool = False  # compare this call with the sequential one, to learn when calls like it may stop
    previews: bool = False  # show the observer predicted x0 too, where a run has no whole sample before its end
    strict: bool = False  # raise a DivergenceError instead of starting again step by step
    together: bool = False  # no sample leaves the batch before all have converged: they may depend on each other
    pricing: Pricing | None = None  # costs of the call; None if they were not measured
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.stochastic = self.noise.spread is not None
        begun = time.perf_counter()
        self.planner = self.planner.fitting(self.noise)
        measurable = self.network is not None and self.noise.num_steps > 1
        pricing = self.price if measurable or self.pricing is not None else None
        self.plan, self.exploration = self.planner.choose(self.noise.num_steps, self.stochastic, pricing, self.context)
        self.plan.options.check_steps(self.noise)
        planning = time.perf_counter() - begun
        given = self.planner.plan
        if given is not None and given.context is not None:  # the other plans were made for this call
            given.context.check(self.context())
        if self.started is not None:
            self.started += planning
        self._planning_seconds = planning if self.plan.prediction is not None else 0.0
        self._exploring_seconds = 0.0
        # seconds before the first wave, which calls of every plan take
        self._lead = 0.0 if self.started is None else time.perf_counter() - self.started
        self._fallback_reason: str | None = None
        self._repeats = False  # the run repeats one whose sample was not finite
        self._plan_changed: str | None = None
        self._begun, self._pauses = False, clock.pauses()
        self._shared = distributed.current()
        # what ranks had done before the run, and did in it; None until it has ended
        self._before = distributed.NOTHING_DONE
        self._work: distributed.Work | None = None
        self._stop_rule = stop_rule(
            self.planner, self.network, self.plan, self.state.shape, audited=self.audited, stochastic=self.stochastic
        )
        self.run = self._reported = self._new_run(self.observer)

    @property
    def seconds(self) -> float:
        """Seconds of the run that tell what others take: without collections of garbage."""
        return self.run.counts.seconds - (clock.pauses() - self._pauses)

    def context(self) -> Context:
        """What a plan for this call depends on."""
        network = self.network
        if network is None:
            return context_of(self.state.device, self.noise)
        conditions = tuple(self.state.shape), network.conditions
        return context_of(self.state.device, self.noise, network.modules, conditions)

    def next(self, output: Tensor | None) -> Evaluate | None:
        """Take the output of the last wave and return the next wave; None when `run.sample` is complete."""
        self._begin()
        try:
            wave = self.run.next(output)
        except Diverged as error:
            self._recover(error)
            wave = self.run.next(None)
        if wave is None:
            self._check_repeated()
        return wave

    def _begin(self) -> None:
        """The call takes its plan: note it if the one before took another."""
        if self.exploration is not None and not self._begun:
            self._plan_changed = self.exploration.taken(self.plan)
        self._begun = True

    def complete(self, advance: Advance = all_waves) -> Run:
        """Run all waves, from a recording if there is one. While the kind of call is explored, run other plans too."""
        self._begin()
        if self.exploration is None or self.pricing is None:
            run = self._complete(advance)
        else:
            run = self._explore(advance, self.exploration, self.pricing)
        if self._fallback_reason is None:
            self._stop_rule.record(run.change)
            if self.audited and self._stop_rule.audit is not None:
                audit(self._stop_rule, self.plan, max(run.iterations), self._trial)
        return run

    def _explore(self, advance: Advance, exploration: Exploration, pricing: Pricing) -> Run:
        if self.stock is not None:
            exploration.offer_stock(on_a_tie=self.path != "sample")  # which copies its scheduler once more for it
        # without lazy capture another plan would have no recording
        explores = exploration.begin(may_explore=self.graphs is None or self.graphs.lazy)
        seconds, work = None, 1.0
        try:
            if explores:
                advance = cut_off(advance, exploration.sequential_seconds)
            run = self._complete(advance)
            if not clock.agreed(run.engine.capture_seconds, "the seconds of recording"):
                seconds = clock.agreed(self.seconds, "the seconds of a call")
                if ended := self._fallback_reason is None:
                    work = pricing.work(self.plan, max(run.iterations))
                if explores:
                    exploration.record(self.plan, seconds, ended=ended, work=work)
            if explores:
                lead = clock.agreed(self._lead, "the seconds before the first wave")
                trials = Trials(exploration, pricing, self._trial, self.stock, lead)
                self._exploring_seconds = trials.run_due()
        finally:
            exploration.end(self.plan, seconds, explored=explores, work=work)
        return run

    def _trial(self, plan: Plan, observer: Observer | None = None) -> Session:
        """The session of another run on this input, which the user does not see."""
        return replace(
            self,
            planner=replace(self.planner, plan=replace(plan, prediction=None, context=None), learn_stop=False),
            inputs=self.inputs.unseen(),
            observer=observer,
            started=None,
            notify=lambda reason: None,
            stock=None,
            audited=False,
            previews=False,
            strict=True,
        )

    def _complete(self, advance: Advance) -> Run:
        assert self.network is not None
        if self._shared is not None:
            self._before = self._shared.work
        evaluate = self._evaluator()
        try:
            with distributed.attempt("a run"), distributed.replicating(self.plan.replicated):
                self._run_waves(evaluate, advance)
        except Diverged as error:
            self._recover(error)
        except TooSlow as why:
            if self.exploration is None:  # a trial
                raise
            self._cut(why)
        except StartAgain as why:
            self.take_steps(str(why))
        except torch.OutOfMemoryError:
            rows = self.run.counts.peak_rows
            if rows <= 1 or self.run.sample is not None:
                raise
            if self.pricing is not None:
                self.pricing.known.experience.record_oom(rows)
            self.take_steps(no_room(rows))
        else:
            self._learn(completed=True)
        evaluate.forget()
        while self.run.sample is None:  # outside the handlers: their exceptions keep the memory of the waves alive
            evaluate = self._evaluator()
            try:
                advance(self.run, evaluate)
            except Diverged as error:
                self._recover(error)
            except TooSlow as why:
                self._cut(why)
            evaluate.forget()
        self._check_repeated()
        if self._shared is not None:  # what comes is of other runs
            self._work = self._shared.work.since(self._before)
        return self.run

    def _evaluator(self) -> Evaluator:
        assert self.network is not None
        evaluate = self.network.evaluator(self.run.program)
        if isinstance(evaluate, TwoLanes):
            evaluate.prepare()
            self.run.engine.overlap = "streams"
        return evaluate

    def _cut(self, why: TooSlow) -> None:
        self.run.leave()
        self.take_steps(f"{self.plan.short()} was stopped: {why}", tell=False)

    def take_steps(self, why: str, *, tell: bool = True) -> None:
        """Start again, one step after another. why: for the report. tell: the user too; strict calls raise then."""
        failed = self.run
        failed.close()
        failed.counts.network_seconds = None
        self._fallback_reason = f"{why}. The steps were then taken one after another"
        self.run = self._reported = Run(
            choose(self.noise.num_steps, Settings(method=SEQUENTIAL)),
            self.state,
            self.noise,
            replace(self.inputs, initial_guess=None),
            self.observer,
            counts=failed.counts,
            engine=self._left_engine(),
            previews=self.previews,
        )
        if tell:
            self.notify(self._fallback_reason)

    def _left_engine(self) -> EngineUse:
        """The engine of the run that follows one that failed: eager, but a driven loop calls the network as before."""
        engine = self.run.engine
        return engine if self.network is None else replace(engine, name="eager", overlap="batch")

    def fall_back(self, why: str) -> None:
        """Note that the rest of the call runs one step after another; only the first reason is kept."""
        if self._fallback_reason is None:
            self._fallback_reason = why
            self.notify(why)

    def go_on_from(self, state: Tensor, noise: NoiseTable, inputs: SolverInputs) -> None:
        """Leave the run and continue from a state, [batch, ...], with the remaining steps one after another."""
        self.run.leave()
        plan = choose(noise.num_steps, Settings(method=SEQUENTIAL))
        done = self.noise.num_steps - noise.num_steps
        self.run = Run(
            plan, state, noise, inputs, counts=self.run.counts, engine=self._left_engine(), settled_before=done
        )

    def report(
        self, drive_reason: str | None = None, engine_reason: str | None = None, left_out: Sequence[str] = ()
    ) -> Report:
        """What the call has done until now. engine_reason: of the report, unless the engine has its own reason."""
        run, plan, prediction = self.run, self._reported.plan, self._reported.plan.prediction
        work = self._work or distributed.NOTHING_DONE
        if self._work is None and self._shared is not None:
            work = self._shared.work.since(self._before)
        stopped_by, estimated_error = self._stops()
        baseline, baseline_seconds, estimated_baseline_seconds = self._baseline()
        fused = plan.options.fused(self.noise, constrained=self.inputs.constrain is not None)
        fused &= not isinstance(self.noise.clip, Threshold)
        calibrated = self.planner.calibrated.values()
        if self.planner.has_calibrated(self.noise.num_steps, self.stochastic) and self.plan not in calibrated:
            left_out = [*left_out, f"a calibrated plan was left out: it is for {KIND_OF_CALL}"]
        return Report(
            method=plan.method,
            engine=run.engine.name,
            path=self.path,
            num_inference_steps=plan.num_inference_steps,
            state_vectors=self.noise.state_vectors,
            tolerance=plan.tolerance,
            exact=plan.exact,
            **vars(run.counts),
            change=self._reported.change,
            stopped_by=stopped_by,
            estimated_error=estimated_error,
            fixed_by=plan.fixed_by,
            stop_rule=self._stop_rule.words,
            iterations_per_sample=run.iterations,
            predicted_seconds=None if prediction is None else prediction.chosen.seconds,
            baseline=baseline,
            baseline_seconds=baseline_seconds,
            estimated_baseline_seconds=estimated_baseline_seconds,
            interrupted=self.interrupted,
            fallback_reason=self._fallback_reason,
            engine_reason=run.engine.reason or engine_reason,
            kernels=implementation(self.state.device) if fused else "torch",
            drive_reason=drive_reason,
            overlap=run.engine.overlap,
            left_out=list(left_out),
            capture_seconds=run.engine.capture_seconds,
            dropped_waves=run.engine.dropped_waves,
            plan=plan.short(),
            plan_reason=None if prediction is None else prediction.why,
            plan_state=None if self.exploration is None else self.exploration.state,
            plan_changed=self._plan_changed,
            planning_seconds=self._planning_seconds,
            exploring_seconds=self._exploring_seconds,
            ranks=1 if self._shared is None else self._shared.ranks.size,
            rank_units=list(work[:3]),
            gather_seconds=work.seconds,
            **plan.options.reported(),
        )

    def _stops(self) -> tuple[list[str], list[float | None]]:
        """Why the run of each sample ended, and its estimated error; empty if there is no sample."""
        run, before = self.run, self._reported
        unknown: list[float | None] = [None] * len(self.state)
        if run.sample is None:
            return [], []
        if self.interrupted:
            return [BY_INTERRUPT] * len(unknown), unknown
        if run is not before and (before.sample is not None or before.plan.slides):
            # the run was left at a state that was no better than this
            return before.stopped_by, unknown
        return run.stopped_by, run.estimated_error

    def _baseline(self) -> tuple[str | None, float | None, float | None]:
        """The loop to compare this call with, its seconds, and those of the sequential loop as predicted.

        Each is None where it is not known, where that loop is what the call was to run, or where there is no sample.
        """
        if self.interrupted or self.run.sample is None:
            return None, None, None
        found = None if self.exploration is None else self.exploration.baseline
        if self.plan.is_sequential:
            return (None, None, None) if found is None or found[0] == SEQUENTIAL_LOOP else (*found, None)
        prediction = self.plan.prediction
        compared = () if prediction is None else prediction.candidates
        predicted = next((each.seconds for each in compared if each.name == SEQUENTIAL), None)
        return (None, None, predicted) if found is None else (*found, predicted)

    def _recover(self, error: Diverged) -> None:
        """Start again: once more by the method if a sample was not finite, then step by step.

        Raises a DivergenceError if the steps themselves have diverged, or if the call is strict.
        """
        reported = DivergenceError(str(error), self.report())
        if self.strict or self.run.plan.is_sequential:
            self._learn(completed=False)
            raise reported from None
        if isinstance(error, NotFinite) and not self._repeats:
            self._repeats = True
            self._begin_again(self.run.counts, self._left_engine())
            return
        self._learn(completed=False)
        try:
            self.take_steps(str(error).partition(". ")[0])
        except UnsupportedPipeline:  # strict: the divergence is more informative
            raise reported from None

    def _check_repeated(self) -> None:
        """Raise a DivergenceError if the sample was not finite, and is when the method has run again.

        An unstable method fails in the same way again. If it does not, the network gave two answers to one input.
        """
        if self._repeats and self._fallback_reason is None:
            raise DivergenceError(
                f"A sample of {self.plan.method} was NaN or Inf, and finite when the same waves were run again. The "
                "network gave two answers to the same input, so no sample of it can be called right. Check whether it "
                "keeps something between calls, and whether the device makes errors.",
                self.report(),
            )

    def _run_waves(self, evaluate: Evaluator, advance: Advance) -> None:
        assert self.network is not None
        if self.graphs is not None:
            try:
                call = self.network.capturable(self.plan, self.run.program)
                if self.previews and not self.plan.options.shows_iterations:
                    # with a key of its own: calls that nobody looks at have a loop graph
                    call = replace(call, signature=(call.signature, PREVIEWS), why_no_loop=call.why_no_loop or PREVIEWS)
            except ValueError as why:
                self.graphs.refused(str(why))
                self.run.engine.reason = str(why)
            else:
                with torch.no_grad():
                    self.graphs.run(call, self._runs().__next__, evaluate, advance)
                return
        advance(self.run, evaluate)

    def _runs(self) -> Iterator[Run]:
        """The run; after a failed recording a new one."""
        yield self.run
        self._begin_again()
        yield self.run

    def _begin_again(self, counts: Counts | None = None, engine: EngineUse | None = None) -> None:
        """A new run of the plan, whose observer sees no checkpoint again. counts, engine: of the run before."""
        shown, observer = self.run.shown, self.observer

        def observe_unseen(checkpoint: Checkpoint) -> None:
            if observer is not None and checkpoint.iteration > shown:
                observer(checkpoint)

        self.run = self._reported = self._new_run(observer and observe_unseen, counts, engine)

    def _new_run(self, observer: Observer | None, counts: Counts | None = None, engine: EngineUse | None = None) -> Run:
        started = self.started if counts is None else None
        given = self.plan, self.state, self.noise, self.inputs, observer, started, counts, engine
        return Run(*given, self._stop_rule.factor, self._stop_rule.contraction, self.together, previews=self.previews)

    def _learn(self, *, completed: bool) -> None:
        # without lazy capture a new plan would have no recording, so do not learn
        if self.pricing is not None and (self.graphs is None or self.graphs.lazy):
            self.pricing.record(self.plan, self.report() if completed else None)

    def price(self) -> Pricing:
        """The costs of the call, measured now if they are unknown."""
        if self.pricing is None:
            assert self.network is not None
            replayed = self.graphs is not None and self.state.is_cuda
            self.pricing = price_of(self.network, self.planner, self.state, self.noise, self.inputs, replayed=replayed)
        return self.pricing


def no_room(rows: int) -> str:
    """The message for a wave that ran out of memory. rows: of the widest that was tried."""
    return f"a wave of up to {counted(rows, 'row')} did not fit into the device's memory: pass a smaller max_rows"
