"""What methods take at their defaults where the steps add noise: the part of `bench.quality.methods` for DDPM."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from bench.runner import SEQUENTIAL
from bench.speed.timing import reason, timed
from bench.workloads.problems import Problem, difference
from srds_fast import SrdsFastError
from srds_fast.cli.output import show_table
from srds_fast.telemetry.report import BY_LAW

METHODS = (SEQUENTIAL, "speculative", "srds", "collocation", "parataa")


@dataclass(frozen=True)
class Taken:
    """What one method took on a problem, sample by sample, each in a call of its own.

    Attributes:
        left_out: why it did not run; the rest is empty then.
        stopped_by: why each run ended, see `Report`.
        differences: to the sequential sample of the same seed, in grey levels; none where it is another sample of the
            same law.
        seconds: of each call, by the clock.
    """

    problem: str
    steps: int
    method: str
    left_out: str | None = None
    waves: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    peak_rows: int = 0
    stopped_by: tuple[str, ...] = ()
    differences: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()


def with_noise(posed: Problem, steps: int) -> Problem:
    """The same problem with DDPM in the place of its scheduler.

    The policy is trained with 100 levels of a cosine schedule. For more steps the schedule is finer, and the network is
    asked at the times between: its level is a function of (t + 1) / levels. Where all levels are taken, the offset of
    the digits' timesteps would lead beyond the last one, and is left out.
    """
    noisy, network = posed.with_noise(), posed.denoiser
    config = noisy.scheduler.config
    levels: int = config.num_train_timesteps
    if steps == levels:
        return noisy._replace(scheduler=DDPMScheduler.from_config(config, steps_offset=0))
    if steps < levels or config.beta_schedule != "squaredcos_cap_v2":
        return noisy

    def denoiser(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return network(x, (t + 1) * (levels / steps) - 1, **cond)

    finer = DDPMScheduler.from_config(config, num_train_timesteps=steps)
    return posed._replace(scheduler=finer, denoiser=denoiser)


def measured(problems: Sequence[Problem], steps: Sequence[int], methods: Sequence[str]) -> Iterator[Taken]:
    """Every method on every problem; progress is told on stderr."""
    for number in steps:
        for posed in (with_noise(each, number) for each in problems):
            reference = [_run(posed, number, SEQUENTIAL, sample).sample for sample in range(len(posed.x))]
            for method in methods:
                seconds, found = timed(partial(taken, posed, number, method, reference))
                print(f"{posed.name}, {number} steps, {method}: {seconds:.0f} s", file=sys.stderr)
                yield found


def taken(posed: Problem, steps: int, method: str, reference: Sequence[Tensor]) -> Taken:
    """Run a method on every sample. reference: the sequential samples."""
    try:
        runs = [timed(partial(_run, posed, steps, method, sample)) for sample in range(len(posed.x))]
    except SrdsFastError as error:  # a method that is not for this problem
        return Taken(posed.name, steps, method, reason(error))
    reports = [found.report for _, found in runs]
    stopped = tuple(by for report in reports for by in report.stopped_by)
    off = [difference(found.sample, each).item() for (_, found), each in zip(runs, reference, strict=True)]
    return Taken(
        posed.name,
        steps,
        method,
        waves=tuple(report.waves for report in reports),
        rows=tuple(report.rows for report in reports),
        peak_rows=max(report.peak_rows for report in reports),
        stopped_by=stopped,
        differences=() if BY_LAW in stopped else tuple(off),
        seconds=tuple(seconds for seconds, _ in runs),
    )


def _run(posed: Problem, steps: int, method: str, sample: int) -> Any:
    generator = torch.Generator().manual_seed(sample)
    return posed.one(sample).sampled(steps, method=method, generator=generator)


def show(found: Sequence[Taken]) -> None:
    """Print, for every problem and number of steps, the methods, fewest waves first."""
    for posed, steps in dict.fromkeys((each.problem, each.steps) for each in found):
        here = [each for each in found if (each.problem, each.steps) == (posed, steps)]
        ran = sorted((each for each in here if each.left_out is None), key=lambda each: statistics.mean(each.waves))
        show_table([_cells(each) for each in ran], text=("method",), title=f"\n{posed}, DDPM, N = {steps}")
        for each in here:
            if each.left_out is not None:
                print(f"left out: {each.method}: {each.left_out}")


def _cells(each: Taken) -> dict[str, object]:
    waves, rows = statistics.mean(each.waves), statistics.mean(each.rows)
    return {
        "N/waves": each.steps / waves,
        "N/rows": each.steps / rows,
        "waves": f"{waves:.1f}",
        "rows": f"{rows:.0f}",
        "peak": each.peak_rows,
        "max off": f"{max(each.differences):.2g}" if each.differences else None,
        "s": f"{statistics.median(each.seconds):.2f}",
        "method": each.method,
    }


def document(found: Sequence[Taken]) -> dict[str, Any]:
    """What is written as JSON."""
    return {"scheduler": "DDPM", "found": [asdict(each) for each in found]}


def read(saved: dict[str, Any]) -> list[Taken]:
    """What `document` has made; lists are tuples again."""
    return [
        Taken(**{name: tuple(value) if isinstance(value, list) else value for name, value in each.items()})
        for each in saved["found"]
    ]
