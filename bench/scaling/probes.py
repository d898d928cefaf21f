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
CALLS = 4
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
            by_itself = _seconds(own)
            dist.barrier()
            with distributed.sharing(ranks):
                self.gather[rows].append(_seconds(call) - by_itself)
        for number, (way, costs) in enumerate(zip(self.ways, pricing, strict=True)):
            dist.barrier()
            self.outside[number].append(costs.measure_overhead(way.plan))
        if not kept:
            for each in (self.alone, self.beside, self.gather, self.outside):
                each.clear()

    def document(self) -> dict[str, Any]:
        """As `models.measured` reads it."""
        of_wave, of_row = outside(
            [(self.ways[number].widths, statistics.median(each)) for number, each in self.outside.items()]
        )
        return {
            "units": list(UNITS),
            "seconds": [statistics.median(self.beside[units]) for units in UNITS],
            "seconds_alone": [statistics.median(self.alone[units]) for units in UNITS],
            "gather_latency": statistics.mean(statistics.median(each) for each in self.gather.values()),
            "gather_by_rows": {rows: statistics.median(each) for rows, each in self.gather.items()},
            "outside": of_wave,
            "outside_of_a_row": of_row,
        }


@torch.no_grad()
def _seconds(call: Call) -> float:
    call()
    whole, _ = timed(lambda: [call() for _ in range(CALLS)])
    return whole / CALLS


def _time(calls: dict[int, Call], found: dict[int, list[float]]) -> None:
    for units, call in calls.items():
        found[units].append(_seconds(call))


def outside(found: Sequence[tuple[Sequence[int], float]]) -> tuple[float, float]:
    """Seconds of a wave and of a row, by least squares of relative errors. found: of runs, rows by wave and seconds."""
    counts = torch.tensor([[len(widths) / seconds, sum(widths) / seconds] for widths, seconds in found])
    of_wave, of_row = torch.linalg.lstsq(counts.double(), torch.ones(len(found), 1, dtype=torch.float64)).solution
    return max(0.0, float(of_wave)), max(0.0, float(of_row))
