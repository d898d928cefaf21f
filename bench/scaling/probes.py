"""What the simulator is given of a network, a gather and the host, measured in place: as a loop spends it.

A wave is a network call, a gather, and what the host does before the next wave. Each takes longer between the others
than in a row of its own kind. So they are measured in turn, by all processes at the same time: a network call with its
gather, and behind it the host's part of a wave of one of the methods, whose core is given zeros. Some calls of one
width follow each other, as in runs; the order of the widths is shuffled. Calls and cores do not belong together, and no
run is timed that is to be predicted.

A machine changes its speed from minute to minute. So every round of timed runs also measures the costs that predict
them once more. A cost is a mean over the calls of a round, as a loop takes the sum of its calls, and then a median over
the rounds.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from bench.speed.timing import timed
from srds_fast.engine.costs import wave_of
from srds_fast.engine.distributed import call as distributed
from srds_fast.engine.distributed.ranks import Ranks
from srds_fast.engine.run import Run
from srds_fast.solvers.fixed_point.program import of_widths

from .predict import Way
from .subjects import Parts

# of the process that evaluates most of a wave
UNITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
# calls of a round: of one unit, and at least
CALLS, FEWEST_CALLS = 32, 2
# calls of one width in a row, as runs make them
IN_A_ROW = 8
Times = dict[int, list[float]]


@dataclass(frozen=True)
class Costs:
    """Costs of one kind of waves: means of each round. size: processes that share a wave.

    network: seconds of a call by units of the process that evaluates most; gather: what the wave takes beyond it, by
    rows; host: seconds of all waves of a run outside network and gather, by way.
    """

    parts: Mapping[int, Parts]  # by steps
    ways: Sequence[Way]
    size: int
    network: Times = field(default_factory=lambda: defaultdict(list))
    gather: Times = field(default_factory=lambda: defaultdict(list))
    host: Times = field(default_factory=lambda: defaultdict(list))

    @torch.no_grad()
    def measure(self, number: int) -> None:
        """One more round, with this number, on all processes that share waves."""
        of, shared = self.parts[self.ways[0].steps], distributed.dividing()
        widths = sorted({1, *(max(1, units * self.size // of.units) for units in UNITS)})
        program = of_widths(of.noise.num_steps, widths)
        evaluate = of.evaluator(program)
        waves = [wave_of(program, each, of.state, of.inputs.network) for each in range(len(widths))]
        busiest = [-(-rows * of.units // self.size) for rows in widths]
        calls = [max(FEWEST_CALLS, CALLS // units) for units in busiest]
        blocks = [
            [each] * min(IN_A_ROW, count) for each, count in enumerate(calls) for _ in range(-(-count // IN_A_ROW))
        ]
        blocks *= 1 + sum(len(way.widths) for way in self.ways) // sum(map(len, blocks))  # more than the host's waves
        random.Random(number).shuffle(blocks)
        network, gather = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
        for each in waves:
            evaluate(each)
        host = self._host()
        for each in itertools.chain.from_iterable(blocks):
            before = shared.work if shared is not None else distributed.NOTHING_DONE
            seconds, _ = timed(lambda: evaluate(waves[each]))  # noqa: B023
            others = 0.0 if shared is None else shared.work.since(before).seconds
            network[busiest[each]].append(seconds - others)
            gather[widths[each]].append(others)
            next(host, None)
        for found, kept in ((network, self.network), (gather, self.gather)):
            for key, times in found.items():
                kept[key].append(statistics.mean(times))

    def _host(self) -> Iterator[None]:
        """Make the host's part of all waves, one a turn."""
        for number, way in enumerate(self.ways):
            of = self.parts[way.steps]
            seconds, run = timed(lambda: Run(way.plan, of.state, of.noise, of.inputs.unseen()))  # noqa: B023
            run.watch, output = None, None  # no network is called
            while True:
                of_wave, wave = timed(lambda: run.next(output))  # noqa: B023
                seconds += of_wave
                if wave is None:
                    break
                output = wave.x.new_zeros(of.inputs.branches * len(wave.positions), *wave.x.shape[1:])
                yield
            self.host[number].append(seconds)

    def clear(self) -> None:
        for each in (self.network, self.gather, self.host):
            each.clear()

    def document(self, row_bytes: int) -> dict[str, Any]:
        """As `models.measured` and `models.link_of` read it. row_bytes: of the outputs of a row."""
        units, gather = (
            sorted(self.network),
            {rows: statistics.median(self.gather[rows]) for rows in sorted(self.gather)},
        )
        received = row_bytes * (self.size - 1) / self.size  # the others come in from other processes
        latency, of_byte = fitted([(1, rows * received, seconds) for rows, seconds in gather.items()])
        host = [
            (way.plan.method, way.widths, statistics.median(self.host[number])) for number, way in enumerate(self.ways)
        ]
        methods = dict.fromkeys(method for method, _, _ in host)

        def fit(wanted: Collection[str]) -> tuple[float, float]:
            return fitted([(len(each), sum(each), seconds) for method, each, seconds in host if method in wanted])

        return {
            "units": units,
            "seconds": [statistics.median(self.network[each]) for each in units],
            "gather_latency": latency,
            "gather_seconds_of_a_byte": of_byte,
            "gather_by_rows": gather,
            "host": fit(methods),
            "host_by_method": {method: fit({method}) for method in methods},
        }


def measure(alone: Costs, together: Costs, ranks: Ranks, number: int) -> None:
    """One more round: rank 0 by itself, while the others wait; then all of them together. number: -1 warms up."""
    dist.barrier()
    if dist.get_rank() == 0:
        alone.measure(number)
    dist.barrier()
    with distributed.sharing(ranks):
        together.measure(number)
    if number < 0:
        alone.clear()
        together.clear()


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
