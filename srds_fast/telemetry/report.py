"""The report of one call: what ran, the iterations and their changes, the costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..solvers.method import SAME_LAW
from ..solvers.registry import SEQUENTIAL
from ..words import counted, duration
from . import layout

# why the run of a sample ended
BY_EXACT, BY_SEQUENTIAL, BY_TOLERANCE = "exact", SEQUENTIAL, "tolerance"
BY_OWN_RULE, BY_ITERATIONS, BY_INTERRUPT = "method's own rule", "fixed iterations", "interrupted"
BY_LAW = SAME_LAW
# such a sample is the sequential one up to rounding: no error is estimated
SURE = (BY_EXACT, BY_SEQUENTIAL)
# an estimate is divided by a factor that audits found, which may round it up
ROUNDING = 1e-9

# the table shows the changes of the last iterations only
MOST_CHANGES = 4
# a time shorter than this is no news, in seconds
SHORT = 0.01
# what `engine` and `path` mean, for the table
ENGINES = {
    "eager": "eager (each wave is called from Python)",
    "loop graph": "loop graph (recorded before, with all waves up to a checkpoint)",
    "network graphs": "network graphs (one recorded before for each width of a wave)",
}
PATHS = {
    "takeover": "ours, in the place of the pipeline's own loop (takeover)",
    "drive": "the pipeline's own, which runs for the rows of each wave (drive)",
}
# loops that calls are compared with
STOCK_LOOP, SEQUENTIAL_LOOP = "stock", SEQUENTIAL


@dataclass(frozen=True)
class Report:
    """The report of a call. `print(report)` and notebooks show a table; `report.to_dict()` is ready for JSON.

    Attributes:
        method: its name, or "stock" when the pipeline's own loop ran.
        engine: what ran the waves: "eager"; "loop graph" (recorded before, one launch from checkpoint to checkpoint);
            "network graphs" (recorded for each width of a wave, one launch a network call); "stock".
        kernels: what did the arithmetic between network calls: "triton", one launch a wave; "torch", where there is no
            CUDA device or no Triton; "triton interpreter", in tests; None where the stock loop ran.
        path: who fed the solver: "takeover" (our loop, with the network calls that turns of the pipeline's own made),
            "drive" (the pipeline's own loop, with turns for the rows of each wave), "sample" (also where its stock
            loop ran), or "stock".
        num_inference_steps, num_blocks, coarse_solver, pipelined, in_flight: of the plan (0 blocks, no solver: not
            SRDS).
        state_vectors: how many states the scheduler passes on from step to step: 1 for first-order ones, 2 for those
            that keep one x0, 3 for UniPC, 4 for PNDM.
        tolerance: the error bound that was set; exact: whether the run had to reach the sequential sample.
        iterations: largest number of iterations of any sample; iterations_per_sample: of each sample.
        waves: batched network calls; rows: evaluations at one (x, t), for any batch size; peak_rows: widest wave.
        evaluations: rows times the samples that still ran then.
        change: per iteration from 1 on, per sample: mean |x^p - x^(p-1)|, see `Checkpoint`; None if the sample had
            already finished.
        stopped_by: per sample, why its run ended: "exact" (it is the sequential sample by construction, or nothing
            moved by a bit any more); "sequential" (the steps were taken one after another); "tolerance" (its estimated
            error came within the tolerance); "method's own rule" (a window slid to the end: ParaDiGMS, ParaTAA,
            ParaSolver); "same law" (it is another sample than the sequential one, with the same distribution:
            speculative); "fixed iterations" (all that the plan has: a calibrated one, latency="constant", or
            max_iterations); "interrupted". Empty if there is no sample, or if the pipeline's own loop ran.
        fixed_by: where the number of fixed iterations comes from, as a clause; None where the plan allows no more.
        estimated_error: per sample: mean |x - sequential x| as estimated, in the units of the state; with audits,
            divided by the factor that they found. None where nothing was estimated: the sample is exact, sequential or
            of the same law, too few changes were seen, or a callback changed the run after it.
        stop_rule: with audits or learn_stop: how the estimated error was made and compared with the tolerance, see
            `Compiled.warmup` and `compile`.
        seconds: from the first to the last wave, including the network, without what functions of the user take
            between them (a callback, an observer, `on_wave`); of a stock loop: of the whole call.
        predicted_seconds: the plan's prediction, made before the call; None without measurements.
        baseline, baseline_seconds: the loop that calls of this kind were compared with, and what it took, by the first
            of its turns in earlier calls or beside this one, in this process: "stock" (the pipeline's own, or of
            `sample` the denoiser's and the scheduler's), else "sequential" (ours). None where neither was timed, where
            it is what the call was to run, or where there is no sample.
        estimated_baseline_seconds: what the sequential loop is predicted to take, from measured network calls; None
            without measurements, and where `baseline_seconds` would be None because of what ran. Never in `speedup`.
        network_seconds: expected cost of the network calls that ran, from earlier measurements: the sum of c(rows).
        plan: method and options of the plan, by the name that lists of plans give it; None where the stock loop ran.
        plan_reason: why this plan was chosen; None without measurements.
        plan_state: how the plan was chosen: "measured" (by c(rows) alone), "exploring" (other plans are still timed),
            "frozen" (for good, by the times of calls, or by c(rows) where none were taken), "dropped" (a plan turned
            out slower, and gave way to the next best); None where the planner had no choice, or could not measure.
        plan_changed: the plan of the call before, of the same kind, where this call takes another: the same seed then
            gives another sample, within the tolerance, or with same="law" of the same law. After `warmup` only where a
            wave did not fit into memory.
        planning_seconds: time for measuring and choosing; not part of `seconds`.
        exploring_seconds: time for running other plans; not part of `seconds`.
        rehearsal_calls: network calls, beyond those of the waves, that showed what the loop asks of its network,
            and how the calls of several rows become one. rehearsal_seconds: time for the rehearsal of the loop; not
            part of `seconds`. Later calls of the kind make none of these calls, and only compare a few turns.
        compile_seconds: time for compiling networks and timing that, with torch_compile="auto"; what came in a wave is
            part of `seconds`.
        check_calls: network calls that compared, in the first call of a kind, rows with turns of the loop, which also
            shows whether the networks are functions of their rows; check_seconds: the time for it. Neither is part of
            `waves` and `seconds`.
        options: of the method, by name.
        interrupted: `pipe._interrupt` or a callback ended the call early.
        fallback_reason: why the stock loop ran, or why the run continued step by step; None if neither happened.
        drive_reason: why the pipeline's loop was driven instead of taken over; None if it was taken over, or if
            there is no pipeline.
        engine_reason: why a slower engine than the one asked for ran the waves; None otherwise.
        overlap: "batch": one network call per wave; "streams": a separate, parallel call for the coarse rows.
        left_out: the options that were not applied, each with its reason.
        capture_seconds: time for recording graphs for later calls; not part of `seconds`.
        dropped_waves: waves that graphs ran before the decision to stop was known; not part of `waves`.
        ranks: processes that made the call together. rank_units: of the rows that they shared, entries of network
            batches (row, guidance branch and sample) that this rank evaluated, that all ranks evaluated, and that the
            busiest rank of each wave did, summed; 0 where each evaluated all rows itself, as in a replicated plan.
            gather_seconds: what this rank spent on waiting for others and on gathering outputs, part of `seconds`.
        timeline: under `srds_fast.profile`, the ranges of the call summed by phase: "count", "seconds" on the host, and
            "device_seconds" measured by events (None unless a trace is written on a CUDA device). Phases are those of
            `telemetry`, with all waves as one phase. Phases are nested, so their sum is not the total.
    """

    method: str
    engine: str
    path: str
    num_inference_steps: int
    num_blocks: int = 0
    coarse_solver: str | None = None
    pipelined: bool = True
    tolerance: float | None = None
    exact: bool = False
    waves: int = 0
    rows: int = 0
    peak_rows: int = 0
    evaluations: int = 0
    change: list[list[float | None]] = field(default_factory=list)
    stopped_by: list[str] = field(default_factory=list)
    estimated_error: list[float | None] = field(default_factory=list)
    stop_rule: str | None = None
    iterations_per_sample: list[int] = field(default_factory=list)
    seconds: float = 0.0
    predicted_seconds: float | None = None
    baseline: str | None = None
    baseline_seconds: float | None = None
    estimated_baseline_seconds: float | None = None
    interrupted: bool = False
    fallback_reason: str | None = None
    engine_reason: str | None = None
    kernels: str | None = None
    drive_reason: str | None = None
    overlap: str = "batch"
    left_out: list[str] = field(default_factory=list)
    capture_seconds: float = 0.0
    dropped_waves: int = 0
    network_seconds: float | None = None
    plan: str | None = None
    plan_reason: str | None = None
    plan_state: str | None = None
    plan_changed: str | None = None
    planning_seconds: float = 0.0
    exploring_seconds: float = 0.0
    rehearsal_calls: int = 0
    rehearsal_seconds: float = 0.0
    compile_seconds: float = 0.0
    check_calls: int = 0
    check_seconds: float = 0.0
    options: dict[str, Any] | None = None
    timeline: dict[str, dict[str, float | int | None]] | None = None
    in_flight: int | None = None
    ranks: int = 1
    rank_units: list[int] = field(default_factory=list)
    gather_seconds: float = 0.0
    state_vectors: int = 1
    fixed_by: str | None = None

    @property
    def overhead(self) -> float | None:
        """Measured seconds divided by the sum of c(rows); None if c(rows) was not measured."""
        return self.seconds / self.network_seconds if self.network_seconds else None

    @property
    def iterations(self) -> int:
        """Largest number of iterations of any sample."""
        return max(self.iterations_per_sample, default=0)

    @property
    def converged(self) -> list[bool]:
        """Per sample: it is exact or sequential, or stopped where its estimated error was within the tolerance.

        False for fixed iterations: so many were taken whatever the sample did. False for "same law": it is another
        sample than the sequential one.
        """
        judged = (*SURE, BY_TOLERANCE, BY_OWN_RULE)
        return [by in judged and close for by, close in zip(self.stopped_by, self._within, strict=True)]

    @property
    def missed(self) -> int:
        """Samples that may be beyond the tolerance: neither exact nor sequential, nor with an estimate within it.

        Calls of fixed iterations may have some. Samples of the same law all count: they are other samples.
        """
        return sum(not each for each in self._within)

    @property
    def speedup(self) -> float | None:
        """`baseline_seconds` over `seconds`, both measured; None if no loop was timed."""
        return self.baseline_seconds / self.seconds if self.baseline_seconds and self.seconds else None

    @property
    def _within(self) -> list[bool]:
        limit = (self.tolerance or 0.0) * (1 + ROUNDING)
        found = zip(self.stopped_by, self.estimated_error, strict=True)
        return [by in SURE or (error is not None and error <= limit) for by, error in found]

    def to_dict(self) -> dict[str, Any]:
        """All fields, `iterations`, `converged`, `missed` and `speedup`, as plain JSON types."""
        names = "iterations", "converged", "missed", "speedup"
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        return layout.plain(self._headline(), list(self._table()))

    def _repr_html_(self) -> str:
        return layout.html(self._headline(), list(self._table()))

    @property
    def _own_loop(self) -> str:
        """What the user would call without this package."""
        return "a plain loop of the denoiser and the scheduler" if self.path == "sample" else "this pipeline's own loop"

    def _headline(self) -> str:
        """The time, against what, and, if so, that it is another sample."""
        time = self._time()
        return f"{time}; another sample than that loop's, of the same law" if BY_LAW in self.stopped_by else time

    def _time(self) -> str:
        """The time, and against what: a loop that was timed, an estimate, or nothing."""
        took = duration(self.seconds)
        if self.method == STOCK_LOOP:
            return f"{took}, on {self._own_loop}"
        if self.interrupted:
            return f"{took}, until the call was interrupted"
        if not self.stopped_by:
            return f"{took}, until the call ended without a sample"
        if self.baseline_seconds:
            loop = self._own_loop if self.baseline == STOCK_LOOP else "one step after another"
            return f"{took}, {_compared(self.seconds, self.baseline_seconds, loop)}, measured)"
        if self.estimated_baseline_seconds:
            compared = _compared(self.seconds, self.estimated_baseline_seconds, "one step after another")
            return f"{took}, {compared}, estimated)"
        return f"{took}; {self._own_loop} was not timed"

    def _table(self) -> Iterator[tuple[str, str]]:
        """(name, text) of what ran and why, without what did not happen."""
        lines = [
            ("method", self._method()),
            ("network calls", self.waves and self._calls()),
            ("loop", _because(PATHS.get(self.path), self.drive_reason)),
            ("stop", self._stops()),
            ("error", self._error()),
            ("stop rule", self.stop_rule),
            *self._changes(),
            ("fallback", self.fallback_reason),
            ("engine", _because(ENGINES.get(self.engine), self.engine_reason)),
            ("arithmetic", self.kernels and f"{self.kernels} kernels"),
            ("overlap", self.overlap == "streams" and "coarse rows run on a CUDA stream of their own"),
            ("ranks", self.ranks > 1 and self._shares()),
            ("plan", self.plan_reason and ": ".join(filter(None, (self.plan_state, self.plan_reason)))),
            ("plan changed", self.plan_changed and f"the call before this one ran {self.plan_changed}"),
            ("predicted", self._predicted()),
            ("overhead", self.overhead and f"{self.overhead:.2f} times what its network calls were predicted to take"),
            (
                "dropped",
                self.dropped_waves and f"{counted(self.dropped_waves, 'wave')}, begun too early",
            ),
            ("left out", "; ".join(self.left_out)),
            *self._beside(),
            *self._phases(),
        ]
        yield from ((name, text) for name, text in lines if text)

    def _method(self) -> str:
        steps = counted(self.num_inference_steps, "step")
        if self.method == STOCK_LOOP:
            return f"none: {self._own_loop} ran, {steps}"
        iterations = f", {counted(self.iterations, 'iteration')}" if self.iterations else ""
        return f"{self.plan or self.method}{iterations}"

    def _calls(self) -> str:
        steps = counted(self.num_inference_steps, "step")
        calls = f"{counted(self.waves, 'wave')} for {steps}; {counted(self.rows, 'row')}"
        return calls if self.peak_rows <= 1 else f"{calls}, at most {self.peak_rows} in one wave"

    def _stops(self) -> str:
        """Why the samples ended, and how many for which reason where these differ."""
        found = Counter(map(self._stop, self.stopped_by, self.estimated_error, self._within))
        if len(found) == 1:
            return next(iter(found))
        return "; ".join(f"{words}: {counted(samples, 'sample')}" for words, samples in found.items())

    def _stop(self, by: str, error: float | None, within: bool) -> str:
        if by == BY_SEQUENTIAL:
            return "exact: the steps were taken one after another"
        if by == BY_TOLERANCE:
            return "within tolerance (estimated)"
        if by == BY_LAW:
            return "same law as the sequential sampler's, another sample"
        if by == BY_OWN_RULE:
            if error is None or not self.tolerance:
                return "own rule, not compared with the tolerance"
            return f"own rule, {'within' if within else 'beyond'} tolerance (estimated)"
        if by == BY_ITERATIONS:
            return f"fixed iterations, {self.fixed_by or 'as many as were allowed'}"
        return by

    def _error(self) -> str | None:
        known = [error for error in self.estimated_error if error is not None]
        if set(self.stopped_by) == {BY_LAW}:
            return None
        goal = "the run had to be exact" if self.exact else f"tolerance {self.tolerance or 0.0:.2g}"
        beyond = f", beyond it or unknown: {counted(self.missed, 'sample')}" if self.missed else ""
        if known:
            return f"estimated, {max(known):.2e} at most; {goal}{beyond}"
        return f"not estimated; {goal}{beyond}" if beyond else None

    def _predicted(self) -> str | None:
        if self.predicted_seconds is None:
            return None
        plan = f"{duration(self.predicted_seconds)} for this plan"
        base = self.estimated_baseline_seconds
        return f"{plan}, {duration(base)} one step after another" if base and self.method != SEQUENTIAL else plan

    def _beside(self) -> Iterator[tuple[str, str]]:
        """What the call did beside its run, most of it once for a kind of call; no part of its seconds."""
        found = (
            ("planning", self.planning_seconds, "to measure and to choose"),
            ("exploring", self.exploring_seconds, "to time other plans"),
            (
                "rehearsal",
                self.rehearsal_seconds,
                f"to watch the loop, {counted(self.rehearsal_calls, 'network call')}",
            ),
            ("checking", self.check_seconds, f"to compare rows, {counted(self.check_calls, 'network call')}"),
            ("recording", self.capture_seconds, "to record graphs"),
            ("compiling", self.compile_seconds, "to compile networks"),
        )
        calls = {"rehearsal": self.rehearsal_calls, "checking": self.check_calls}
        for name, seconds, what in found:
            # every call spends a little on these two
            if seconds > (SHORT if name in ("planning", "rehearsal") else 0.0) or calls.get(name):
                yield name, f"{duration(seconds)} {what} (not part of the time above)"

    def _changes(self) -> Iterator[tuple[str, str]]:
        for number, changes in enumerate(self.change, start=1):
            known = [change for change in changes if change is not None]
            if known and number > len(self.change) - MOST_CHANGES:
                yield f"change {number}", f"mean {sum(known) / len(known):.2e}, largest {max(known):.2e}"

    def _shares(self) -> str:
        own, of_all, busiest = self.rank_units or (0, 0, 0)
        if not of_all:
            return f"{self.ranks}, which shared no rows"
        balance = f"{of_all / (self.ranks * busiest):.0%}"
        took = duration(self.gather_seconds)
        return f"{self.ranks}; this one had {own} of {of_all} units, balance {balance}, {took} gathering"

    def _phases(self) -> Iterator[tuple[str, str]]:
        for number, (phase, found) in enumerate((self.timeline or {}).items()):
            on_device = "" if found["device_seconds"] is None else f", {found['device_seconds']:.4f} s on the device"
            line = f"{phase:<12}{found['seconds']:.4f} s, {counted(int(found['count'] or 0), 'time')}{on_device}"
            yield "" if number else "time went", line


def _compared(seconds: float, others: float, loop: str) -> str:
    """How a time compares with that of a loop; the bracket is left open."""
    ratio, word = (others / seconds, "faster than") if seconds <= others else (seconds / others, "slower than")
    times = f"{ratio:.2f}" if ratio < 1.095 else f"{ratio:.1f}"
    how = "as fast as" if times == "1.00" else f"{times}x {word}"
    return f"{how} {loop} ({duration(others)}"


def _because(what: str | None, reason: str | None) -> str | None:
    return what if what is None or reason is None else f"{what}, because {reason}"


def stock_report(num_inference_steps: int, seconds: float, *, path: str = STOCK_LOOP, **rest: Any) -> Report:
    """The report of a call that ran on the stock loop. rest: other fields."""
    return Report(STOCK_LOOP, STOCK_LOOP, path, num_inference_steps, seconds=seconds, **rest)
