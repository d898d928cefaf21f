"""The report of one call: what ran, how far it got, what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

# iterations that the table shows, the last ones
MOST_CHANGES = 4


@dataclass
class Report:
    """What a call did. `print(report)` is a table, `report.to_dict()` is ready for JSON.

    Attributes:
        method: its name, or "stock" when the pipeline's own loop ran.
        engine: what ran the waves: "eager"; "loop graph" (recorded before, one launch from checkpoint to checkpoint);
            "wave graphs" (recorded before, one launch a wave); "stock".
        kernels: what did the arithmetic between network calls: "triton", one launch a wave; "torch", where there is no
            CUDA device or no Triton; "triton interpreter", in tests; None where the stock loop ran.
        path: who fed the solver: "takeover" (our loop, with the calls that the pipeline's own made in one turn),
            "drive" (the pipeline's own loop, one turn a wave), "sample", or "stock".
        num_inference_steps, num_blocks, coarse_solver, pipelined, in_flight: of the plan (0 blocks, no solver: not
            SRDS).
        tolerance: error bound asked for; exact: whether the run was told to reach the sequential sample.
        iterations: iterations run, the most of any sample; iterations_per_sample: of each sample.
        waves: batched network calls; rows: evaluations at one (x, t), whatever the batch; peak_rows: widest wave.
        evaluations: rows times the samples that were still running then.
        change: per iteration from 1 on, per sample: mean |x^p - x^(p-1)|, see `Checkpoint`, None where the sample had
            finished before.
        converged: per sample: stopped by the tolerance, or exact.
        seconds: from the first to the last wave, network included.
        predicted_seconds: the plan's prediction, None where nothing was measured.
        network_seconds: what the network calls of the waves that ran cost as measured before: the sum of c(rows).
        plan_reason: why this plan was chosen, where costs were measured.
        planning_seconds: spent on measuring and choosing, not part of `seconds`.
        options: of the method, by name.
        interrupted: the call was ended early, by `pipe._interrupt` or by a callback.
        fallback_reason: why the stock loop ran instead, or why the run went on step by step; None when neither.
        drive_reason: why the pipeline's loop was driven and not taken over; None where it was, or where there is none.
        engine_reason: why the waves ran eagerly where a faster engine was asked for; None when one ran, or none was.
        overlap: "batch": a wave is one network call; "streams": its coarse rows are one beside it.
        left_out: what was asked for to make the network faster and could not be had, each with its reason.
        capture_seconds: spent on recording graphs for the calls to come; not part of `seconds`.
        dropped_waves: waves that graphs ran ahead of a decision to stop; not part of `waves`.
        timeline: under `srds_fast.profile`, the ranges of the call summed by phase: how often ("count"), "seconds" on
            the host, and where a trace is written on a CUDA device "device_seconds" by events, otherwise None. Phases
            are those of `telemetry`, all waves being one; they lie in one another, so they do not add up.
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
    planning_seconds: float = 0.0
    options: dict[str, Any] | None = None
    timeline: dict[str, dict[str, float | int | None]] | None = None
    in_flight: int | None = None

    @property
    def overhead(self) -> float | None:
        """Measured seconds over the sum of c(rows), None where that was not measured."""
        return self.seconds / self.network_seconds if self.network_seconds else None

    @property
    def iterations(self) -> int:
        """Iterations of the sample that needed most."""
        return max(self.iterations_per_sample, default=0)

    def _phases(self) -> Iterator[str]:
        for phase, found in (self.timeline or {}).items():
            on_device = "" if found["device_seconds"] is None else f", {found['device_seconds']:.4f} on the device"
            yield f"{phase:<12}{found['seconds']:.4f} seconds in {found['count']}{on_device}"

    def to_dict(self) -> dict[str, Any]:
        """All fields and `iterations`, as plain JSON types."""
        return {**asdict(self), "iterations": self.iterations}

    def __str__(self) -> str:
        lines = [
            ("method", self.method),
            ("engine", ", ".join(filter(None, (self.engine, self.path, self.kernels and f"{self.kernels} kernels")))),
            ("steps", str(self.num_inference_steps)),
        ]
        if self.num_blocks:
            held = "" if self.in_flight is None else f", {self.in_flight} in flight"
            lines.append(("blocks", f"{self.num_blocks} ({self.coarse_solver} jumps{held})"))
        if self.iterations:
            lines.append(("iterations", str(self.iterations)))
        if self.waves:
            saved = f" ({self.num_inference_steps / self.waves:.2f}x fewer than sequential)"
            lines.append(("waves", f"{self.waves}{saved if self.waves < self.num_inference_steps else ''}"))
            lines.append(("rows", f"{self.rows}, at most {self.peak_rows} in a wave"))
        if self.converged:
            goal = "exact" if self.exact else f"tolerance {self.tolerance:.2g}"
            lines.append(("converged", f"{sum(self.converged)} of {len(self.converged)} samples ({goal})"))
        for number, changes in enumerate(self.change, start=1):
            seen = [change for change in changes if change is not None]
            if seen and number > len(self.change) - MOST_CHANGES:
                lines.append((f"change {number}", f"mean {sum(seen) / len(seen):.2e}, largest {max(seen):.2e}"))
        lines.append(("seconds", f"{self.seconds:.3f}"))
        if self.overlap == "streams":
            lines.append(("overlap", "coarse rows on a stream of their own"))
        if self.capture_seconds:
            lines.append(("recording", f"{self.capture_seconds:.3f} seconds, for later calls"))
        if self.dropped_waves:
            lines.append(("dropped", f"{self.dropped_waves} waves, run ahead of the decision to stop"))
        if self.predicted_seconds is not None:
            lines.append(("predicted", f"{self.predicted_seconds:.3f}"))
        if self.overhead is not None:
            lines.append(("overhead", f"{self.overhead:.2f} times the sum of c(rows)"))
        if self.timeline is not None:
            lines += [("time went" if not number else "", line) for number, line in enumerate(self._phases())]
        if self.plan_reason is not None:
            lines.append(("plan", self.plan_reason))
        if self.planning_seconds >= 0.01:
            lines.append(("planning", f"{self.planning_seconds:.3f} seconds"))
        if self.interrupted:
            lines.append(("interrupted", "yes"))
        if self.fallback_reason is not None:
            lines.append(("stock loop because" if self.method == "stock" else "step by step", self.fallback_reason))
        if self.drive_reason is not None:
            lines.append(("driven because", self.drive_reason))
        if self.engine_reason is not None:
            lines.append(("eager because", self.engine_reason))
        lines += [("left out", reason) for reason in self.left_out]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
