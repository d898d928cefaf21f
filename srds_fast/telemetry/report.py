"""The report of one call: what ran, the iterations and their changes, the costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..solvers.registry import SEQUENTIAL

# the printed table shows the changes of the last iterations only
MOST_CHANGES = 4

# why the run of a sample ended
BY_EXACT, BY_SEQUENTIAL, BY_TOLERANCE = "exact", SEQUENTIAL, "tolerance"
BY_OWN_RULE, BY_ITERATIONS, BY_INTERRUPT = "method's own rule", "fixed iterations", "interrupted"
# such a sample is the sequential one up to rounding: no error is estimated
SURE = (BY_EXACT, BY_SEQUENTIAL)
# an estimate is divided by a factor that audits found, which may round it up
ROUNDING = 1e-9

# loops that calls are compared with
STOCK_LOOP, SEQUENTIAL_LOOP = "stock", SEQUENTIAL


@dataclass(frozen=True)
class Report:
    """The report of a call. `print(report)` shows a table; `report.to_dict()` is ready for JSON.

    Attributes:
        method: its name, or "stock" when the pipeline's own loop ran.
        engine: what ran the waves: "eager"; "loop graph" (recorded before, one launch from checkpoint to checkpoint);
            "network graphs" (recorded for each width of a wave, one launch a network call); "stock".
        kernels: what did the arithmetic between network calls: "triton", one launch a wave; "torch", where there is no
            CUDA device or no Triton; "triton interpreter", in tests; None where the stock loop ran.
        path: who fed the solver: "takeover" (our loop, with the network calls that turns of the pipeline's own made),
            "drive" (the pipeline's own loop, with turns for the rows of each wave), "sample", or "stock".
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
            ParaSolver); "fixed iterations" (all that the plan has: a calibrated one, latency="constant", or
            max_iterations); "interrupted". Empty if there is no sample, or if the pipeline's own loop ran.
        estimated_error: per sample: mean |x - sequential x| as estimated, in the units of the state; with audits,
            divided by the factor that they found. None where nothing was estimated: the sample is exact or sequential,
            too few changes were seen, or a callback changed the run after it.
        stop_rule: with audits or learn_stop: how the estimated error was made and compared with the tolerance, see
            `FastPipeline.warmup` and `compile`.
        seconds: from the first to the last wave, including the network; of a stock loop: of the whole call.
        predicted_seconds: the plan's prediction, made before the call; None without measurements.
        baseline, baseline_seconds: the loop that calls of this kind were compared with, and what it took, by the first
            of its turns in earlier calls or beside this one, in this process: "stock" (the pipeline's own, or of
            `sample` the denoiser's and the scheduler's), else "sequential" (ours). None where neither was timed, or
            where it is what ran.
        network_seconds: expected cost of the network calls that ran, from earlier measurements: the sum of c(rows).
        plan_reason: why this plan was chosen; None without measurements.
        plan_state: how the plan was chosen: "measured" (by c(rows) alone), "exploring" (other plans are still timed),
            "frozen" (for good, by the times of calls, or by c(rows) where none were taken), "dropped" (a plan turned
            out slower, and gave way to the next best); None where the planner had no choice, or could not measure.
        plan_changed: the plan of the call before, of the same kind, where this call takes another: the same seed then
            gives another sample, within the tolerance. After `warmup` only where a wave did not fit into memory.
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
        ranks: processes that shared the rows. rank_units: entries of network batches (row, guidance branch and sample)
            that this rank evaluated, that all ranks evaluated, and that the busiest rank of each wave did, summed;
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

        False for fixed iterations: so many were taken whatever the sample did.
        """
        judged = (*SURE, BY_TOLERANCE, BY_OWN_RULE)
        return [by in judged and close for by, close in zip(self.stopped_by, self._within, strict=True)]

    @property
    def missed(self) -> int:
        """Samples that may be beyond the tolerance: neither exact nor sequential, nor with an estimate within it.

        Calls of fixed iterations may have some.
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
        streams = self.overlap == "streams"
        held = "" if self.in_flight is None else f", {self.in_flight} in flight"
        dropped = f"{self.dropped_waves} waves, launched before the decision to stop was known"
        calls = f"{self.rehearsal_calls} network calls, {self.rehearsal_seconds:.3f} seconds"
        rehearsed = calls if self.rehearsal_calls or self.rehearsal_seconds >= 0.01 else None
        goal = "exact" if self.exact else f"tolerance {self.tolerance or 0.0:.2g}"
        counted = Counter(self.stopped_by)
        stopped = ", ".join(by if len(counted) == 1 else f"{by} ({number})" for by, number in counted.items())
        estimates = [error for error in self.estimated_error if error is not None]
        lines = [
            ("engine", ", ".join(filter(None, (self.engine, self.path, self.kernels and f"{self.kernels} kernels")))),
            ("blocks", self.num_blocks and f"{self.num_blocks} ({self.coarse_solver} jumps{held})"),
            ("iterations", self.iterations and str(self.iterations)),
            ("rows", self.waves and f"at most {self.peak_rows} in a wave"),
            ("stopped by", stopped),
            ("estimated", estimates and f"error at most {max(estimates):.2e} ({goal})"),
            ("converged", self.converged and f"{sum(self.converged)} of {len(self.converged)} samples ({goal})"),
            ("stop rule", self.stop_rule),
            *self._changes(),
            ("overlap", streams and "coarse rows on a separate stream"),
            ("ranks", self.ranks > 1 and self._shares()),
            ("recording", self.capture_seconds and f"{self.capture_seconds:.3f} seconds, for later calls"),
            ("dropped", self.dropped_waves and dropped),
            ("predicted", None if self.predicted_seconds is None else f"{self.predicted_seconds:.3f} seconds"),
            ("overhead", None if self.overhead is None else f"{self.overhead:.2f} times the sum of c(rows)"),
            *self._phases(),
            ("plan", self.plan_reason and ", ".join(filter(None, (self.plan_state, self.plan_reason)))),
            ("plan changed", self.plan_changed and f"the call before this one ran {self.plan_changed}"),
            ("planning", self.planning_seconds >= 0.01 and f"{self.planning_seconds:.3f} seconds"),
            ("exploring", self.exploring_seconds and f"{self.exploring_seconds:.3f} seconds for other plans"),
            ("rehearsal", rehearsed and f"{rehearsed}, for later calls too"),
            ("compiling", self.compile_seconds and f"{self.compile_seconds:.3f} seconds"),
            ("checking", self.check_calls and f"{self.check_seconds:.3f} seconds, {self.check_calls} network calls"),
            ("interrupted", self.interrupted and "yes"),
            ("stock loop because" if self.method == "stock" else "step by step", self.fallback_reason),
            ("driven because", self.drive_reason),
            (f"{'eager' if self.engine == 'eager' else 'no loop graph'} because", self.engine_reason),
            *(("left out", reason) for reason in self.left_out),
        ]
        shown = [(name, value) for name, value in lines if value]
        width = max(len(name) for name, _ in shown)
        return "\n".join([self._summary(), *(f"{name:<{width}}  {value}" for name, value in shown)])

    def _summary(self) -> str:
        """What ran, waves and rows against N, seconds, and against which loop, if one was timed."""
        steps = f"{self.num_inference_steps} step{'' if self.num_inference_steps == 1 else 's'}"
        ran = f"{self.waves} waves ({self.rows} rows) for {steps}" if self.waves else steps
        found = f"{self.method}: {ran}, {_time(self.seconds)}"
        if self.speedup is None:
            return found
        faster = f"{self.speedup:.2f}x faster" if self.speedup >= 1 else f"{1 / self.speedup:.2f}x slower"
        own = "the sequential loop"
        if self.baseline == STOCK_LOOP:
            own = "denoiser and scheduler alone" if self.path == "sample" else "this pipeline's own loop"
        return f"{found}, {faster} than {own} ({_time(self.baseline_seconds or 0.0)}, measured)"

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
        took = _time(self.gather_seconds)
        return f"{self.ranks}; this one had {own} of {of_all} units, balance {balance}, {took} gathering"

    def _phases(self) -> Iterator[tuple[str, str]]:
        for number, (phase, found) in enumerate((self.timeline or {}).items()):
            on_device = "" if found["device_seconds"] is None else f", {found['device_seconds']:.4f} on the device"
            line = f"{phase:<12}{found['seconds']:.4f} seconds in {found['count']}{on_device}"
            yield "" if number else "time went", line


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def stock_report(num_inference_steps: int, seconds: float, **rest: Any) -> Report:
    """The report of a call that ran on the stock loop. rest: other fields."""
    return Report("stock", "stock", "stock", num_inference_steps, seconds=seconds, **rest)
