"""The report of one call: what ran, the iterations and their changes, the costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

# the printed table shows the changes of the last iterations only
MOST_CHANGES = 4


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
        converged: per sample: its estimated error is within the tolerance, or it is exact.
        stop_rule: with audits or learn_stop: how the estimated error was made and compared with the tolerance, see
            `FastPipeline.warmup` and `compile`.
        seconds: from the first to the last wave, including the network.
        predicted_seconds: the plan's prediction; None without measurements.
        network_seconds: expected cost of the network calls that ran, from earlier measurements: the sum of c(rows).
        plan_reason: why this plan was chosen; None without measurements.
        plan_state: how the plan was chosen: "measured" (by c(rows) alone), "exploring" (other plans are still timed),
            "frozen" (by the times of calls), "dropped" (a plan turned out slower, and gave way to the next best); None
            where the planner had no choice, or could not measure.
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
    converged: list[bool] = field(default_factory=list)
    stop_rule: str | None = None
    iterations_per_sample: list[int] = field(default_factory=list)
    seconds: float = 0.0
    predicted_seconds: float | None = None
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
    def missed(self) -> int:
        """Samples that ended with an estimated error beyond the tolerance; calls of constant latency may have some."""
        return sum(not each for each in self.converged)

    def to_dict(self) -> dict[str, Any]:
        """All fields, `iterations` and `missed`, as plain JSON types."""
        return {**asdict(self), "iterations": self.iterations, "missed": self.missed}

    def __str__(self) -> str:
        steps, waves, streams = self.num_inference_steps, self.waves, self.overlap == "streams"
        fewer = f" ({steps / waves:.2f}x fewer than sequential)" if 0 < waves < steps else ""
        held = "" if self.in_flight is None else f", {self.in_flight} in flight"
        dropped = f"{self.dropped_waves} waves, launched before the decision to stop was known"
        calls = f"{self.rehearsal_calls} network calls, {self.rehearsal_seconds:.3f} seconds"
        rehearsed = calls if self.rehearsal_calls or self.rehearsal_seconds >= 0.01 else None
        goal = "exact" if self.exact else f"tolerance {self.tolerance or 0.0:.2g}"
        lines = [
            ("method", self.method),
            ("engine", ", ".join(filter(None, (self.engine, self.path, self.kernels and f"{self.kernels} kernels")))),
            ("steps", str(steps)),
            ("blocks", self.num_blocks and f"{self.num_blocks} ({self.coarse_solver} jumps{held})"),
            ("iterations", self.iterations and str(self.iterations)),
            ("waves", waves and f"{waves}{fewer}"),
            ("rows", waves and f"{self.rows}, at most {self.peak_rows} in a wave"),
            ("converged", self.converged and f"{sum(self.converged)} of {len(self.converged)} samples ({goal})"),
            ("stopped by", self.stop_rule),
            *self._changes(),
            ("seconds", f"{self.seconds:.3f}"),
            ("overlap", streams and "coarse rows on a separate stream"),
            ("recording", self.capture_seconds and f"{self.capture_seconds:.3f} seconds, for later calls"),
            ("dropped", self.dropped_waves and dropped),
            ("predicted", None if self.predicted_seconds is None else f"{self.predicted_seconds:.3f}"),
            ("overhead", None if self.overhead is None else f"{self.overhead:.2f} times the sum of c(rows)"),
            *self._phases(),
            ("plan", self.plan_reason and ", ".join(filter(None, (self.plan_state, self.plan_reason)))),
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
        return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)

    def _changes(self) -> Iterator[tuple[str, str]]:
        for number, changes in enumerate(self.change, start=1):
            known = [change for change in changes if change is not None]
            if known and number > len(self.change) - MOST_CHANGES:
                yield f"change {number}", f"mean {sum(known) / len(known):.2e}, largest {max(known):.2e}"

    def _phases(self) -> Iterator[tuple[str, str]]:
        for number, (phase, found) in enumerate((self.timeline or {}).items()):
            on_device = "" if found["device_seconds"] is None else f", {found['device_seconds']:.4f} on the device"
            line = f"{phase:<12}{found['seconds']:.4f} seconds in {found['count']}{on_device}"
            yield "" if number else "time went", line


def stock_report(num_inference_steps: int, seconds: float, **rest: Any) -> Report:
    """The report of a call that ran on the stock loop. rest: other fields."""
    return Report("stock", "stock", "stock", num_inference_steps, seconds=seconds, **rest)
