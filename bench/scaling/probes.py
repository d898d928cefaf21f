"""What the simulator is given of a network and of a gather, measured by the processes that are timed, in turn.

A machine changes its speed from minute to minute. So every round of timed calls also measures the costs that predict
them once more. A cost is a mean over a few calls in a row, as a loop takes the sum of its calls, and then a median over
the rounds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.speed.timing import timed
from srds_fast.engine.costs import wave_of
from srds_fast.engine.distributed import call as distributed
from srds_fast.engine.distributed.ranks import Ranks
from srds_fast.engine.eager import Evaluator
from srds_fast.kernels.wave_update import NetworkInput
from srds_fast.planner.search import Pricing
from srds_fast.solvers.fixed_point.program import of_widths
from srds_fast.solvers.program import Program

from .predict import Way

UNITS = (1, 2, 4, 8, 16, 32, 64)
# rows of the waves that show what a gather adds to a call
SHARED = (1, 2, 4, 16)
# in a row: of one unit, and at least
CALLS, FEWEST_CALLS = 32, 4
Call = Callable[[], object]


@dataclass(frozen=True)
class Rows:
    """Network calls of a kind. evaluator: as in a session; steps: N; x: [1, ...]; units: of a row."""

    evaluator: Callable[[Program], Evaluator]
    steps: int
    x: Tensor
    network: NetworkInput
    units: int

    def call(self, rows: int) -> Call:
        """A function that makes one call of so many rows."""
        program = of_widths(self.steps, (rows,))
        evaluate, wave = self.evaluator(program), wave_of(program, 0, self.x, self.network)
        return lambda: evaluate(wave)


@dataclass(frozen=True)
class Probes:
    """Costs of one subject, round by round.

    single: its calls, a row of one unit; whole: as they are shared. ways: its runs. alone, beside: seconds of a call by
    one process, by units, while the other one waits, and while it does the same. gather: what a call by both takes
    longer, by rows. outside: seconds between the calls of a run, by way.
    """

    single: Rows
    whole: Rows
    ways: Sequence[Way]
    alone: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    beside: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    gather: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    outside: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, ranks: Ranks, pricing: Sequence[Pricing], *, kept: bool) -> None:
        """One more round, on both processes. pricing: of each way; kept: False warms up."""
        calls = {units: self.single.call(units) for units in UNITS}
        dist.barrier()
        if dist.get_rank() == 0:
            _time(calls, self.alone)
        dist.barrier()
        _time(calls, self.beside)
        for rows in SHARED:
            busiest = -(-rows * self.whole.units // ranks.size)
            own, call = self.single.call(busiest), self.whole.call(rows)
            dist.barrier()
            by_itself = _seconds(own, busiest)
            dist.barrier()
            with distributed.sharing(ranks):
                self.gather[rows].append(_seconds(call, busiest) - by_itself)
        for number, (way, costs) in enumerate(zip(self.ways, pricing, strict=True)):
            dist.barrier()
            self.outside[number].append(costs.measure_overhead(way.plan))
        if not kept:
            for each in (self.alone, self.beside, self.gather, self.outside):
                each.clear()

    def document(self, unit_bytes: int) -> dict[str, Any]:
        """As `models.measured` and `models.link_of` read it. unit_bytes: of the output of a unit."""
        gather = {rows: statistics.median(each) for rows, each in self.gather.items()}
        # half of the outputs come in from the other process
        received = unit_bytes * self.whole.units / 2
        latency, of_byte = fitted([(1, rows * received, seconds) for rows, seconds in gather.items()])
        widths = [self.ways[number].widths for number in self.outside]
        between = map(statistics.median, self.outside.values())
        of_wave, of_row = fitted(
            [(len(each), sum(each), seconds) for each, seconds in zip(widths, between, strict=True)]
        )
        return {
            "units": list(UNITS),
            "seconds": [statistics.median(self.beside[units]) for units in UNITS],
            "seconds_alone": [statistics.median(self.alone[units]) for units in UNITS],
            "gather_latency": latency,
            "gather_seconds_of_a_byte": of_byte,
            "gather_by_rows": gather,
            "outside": of_wave,
            "outside_of_a_row": of_row,
        }


@torch.no_grad()
def _seconds(call: Call, units: int) -> float:
    """Of a call of so many units, the mean."""
    call()
    times = max(FEWEST_CALLS, CALLS // units)
    whole, _ = timed(lambda: [call() for _ in range(times)])
    return whole / times


def _time(calls: dict[int, Call], found: dict[int, list[float]]) -> None:
    for units, call in calls.items():
        found[units].append(_seconds(call, units))


def fitted(found: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b), at least 0, by least squares: a * one + b * other = seconds.

    found: (one, other, seconds).
    """
    terms = torch.tensor([[one, other] for one, other, _ in found], dtype=torch.float64)
    seconds = torch.tensor([[seconds] for *_, seconds in found], dtype=torch.float64)
    a, b = map(float, torch.linalg.lstsq(terms, seconds).solution)
    if min(a, b) >= 0:
        return a, b
    # one of the two alone
    of_one, of_other = (max(0.0, float(each @ seconds) / float(each @ each)) for each in terms.T)
    return (of_one, 0.0) if b < 0 else (0.0, of_other)
