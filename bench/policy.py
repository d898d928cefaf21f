"""A robot policy: latency of one trajectory, 100 DDIM steps, every method against the sequential loop.

    python -m bench.policy                          # trains for a minute, then measures
    python -m bench.policy --weights policy.pt      # keeps the weights there, and trains only if there are none
    python -m bench.policy --json policy.json

A 1-D UNet over 16 actions of 7 dimensions, trained here on synthetic demonstrations, see bench/demonstrations.py. One
observation, one trajectory: batch 1. Loops take turns in one process, every round with another observation and noise;
of their times the median counts. First comes how many times faster than our sequential loop a call is, then the same
against the best sequential loop by hand: coefficients computed before, nothing between two network calls but the
arithmetic. "overhead" is the fastest call over the sum of c(rows) of its waves, the fastest of the same run as well: a
shared machine disturbs medians. The difference to the sequential trajectory is the mean absolute one, in grey levels
(1 / 127.5): the median of the rounds, and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from srds_fast.cli.table import Table
from srds_fast.errors import SrdsFastError
from srds_fast.telemetry.environment import environment
from srds_fast.telemetry.report import Report

from . import curves, demonstrations
from .curves import Curve
from .policy_loops import BY_HAND, SEQUENTIAL, Case, Loop, cases, loops
from .reaching import difference
from .rows import PolicyNetwork

STEPS = 100
ROWS = (1, 2, 4, 8, 12, 16, 20, 24, 32)


class Result(NamedTuple):
    """What a loop took, medians over the rounds.

    Attributes:
        loop: its name.
        method: that ran; "-" by hand.
        over_sequential, over_by_hand: how many times faster than these.
        seconds, fastest, slowest: of a call.
        waves, rows, peak_rows: of a call; means, and the most.
        network_seconds: what its network calls take alone, by c(rows); overhead: the fastest call over these.
        difference, largest_difference: to the sequential trajectory, in grey levels.
        predicted_seconds: by the report, or None.
    """

    loop: str
    method: str
    over_sequential: float
    over_by_hand: float
    seconds: float
    fastest: float
    slowest: float
    waves: float
    rows: float
    peak_rows: int
    network_seconds: float
    overhead: float
    difference: float
    largest_difference: float
    predicted_seconds: float | None


def c_of_rows(network: PolicyNetwork) -> Curve:
    """The time of a network call by its rows."""

    def call(rows: int) -> Callable[[], object]:
        x = torch.randn(rows, demonstrations.ACTIONS, demonstrations.HORIZON)
        t, observation = torch.arange(rows) % STEPS, torch.randn(1, demonstrations.OBSERVATION).expand(rows, -1)
        return lambda: network(x, t, observation)

    return curves.measure("policy, this CPU", call, ROWS, repeat=25)


def refused(every: dict[str, Loop], case: Case) -> dict[str, str]:
    """Loops that cannot run here, and why."""
    found = {}
    for name, loop in every.items():
        try:
            loop(*case)
        except SrdsFastError as why:
            found[name] = str(why)
    return found


def widths_of(network: PolicyNetwork, loop: Loop, rounds: list[Case]) -> list[list[int]]:
    """Rows of every wave of every round."""
    found: list[list[int]] = []
    hook = network.register_forward_pre_hook(lambda _, given: found[-1].append(len(given[0])))
    for case in rounds:
        found.append([])
        loop(*case)
    hook.remove()
    return found


def measured(network: PolicyNetwork, every: dict[str, Loop], rounds: list[Case], curve: Curve) -> list[Result]:
    """Every loop in every round, after one round of each that is not timed, of which the rows are counted."""
    widths = {name: widths_of(network, loop, rounds) for name, loop in every.items()}
    times: dict[str, list[float]] = {name: [] for name in every}
    samples: dict[str, list[Tensor]] = {name: [] for name in every}
    reports: dict[str, list[Report]] = {name: [] for name in every}
    for case in rounds:
        for name, loop in every.items():
            started = time.perf_counter()
            sample, report = loop(*case)
            times[name].append(time.perf_counter() - started)
            samples[name].append(sample)
            reports[name] += [] if report is None else [report]
    reference = torch.cat(samples[SEQUENTIAL])
    medians = {name: statistics.median(of_loop) for name, of_loop in times.items()}
    found = []
    for name, of_loop in times.items():
        away = difference(torch.cat(samples[name]), reference)
        network_seconds = statistics.median(curve.cost.of(each) for each in widths[name])
        predicted = [report.predicted_seconds for report in reports[name] if report.predicted_seconds is not None]
        found.append(
            Result(
                loop=name,
                method=reports[name][0].method if reports[name] else "-",
                over_sequential=medians[SEQUENTIAL] / medians[name],
                over_by_hand=medians[BY_HAND] / medians[name],
                seconds=medians[name],
                fastest=min(of_loop),
                slowest=max(of_loop),
                waves=statistics.mean(map(len, widths[name])),
                rows=statistics.mean(map(sum, widths[name])),
                peak_rows=max(map(max, widths[name])),
                network_seconds=network_seconds,
                overhead=min(of_loop) / network_seconds,
                difference=float(away.median()),
                largest_difference=float(away.max()),
                predicted_seconds=statistics.median(predicted) if predicted else None,
            )
        )
    return found


def table(results: list[Result]) -> list[str]:
    """Lines, fastest first."""
    columns = Table(
        [
            ("x sequential", 0),
            ("x by hand", 0),
            ("ms", 7),
            ("fastest..slowest", 0),
            ("waves", 6),
            ("rows", 6),
            ("peak", 0),
            ("overhead", 0),
            ("difference (largest)", 0),
            ("predicted ms", 0),
            ("loop", -22),
            ("ran", -1),
        ]
    )
    lines = [columns.heading()]
    for each in sorted(results, key=lambda result: result.seconds):
        lines.append(
            columns.line(
                f"{each.over_sequential:.2f}",
                f"{each.over_by_hand:.2f}",
                f"{1e3 * each.seconds:.1f}",
                f"{1e3 * each.fastest:.1f}..{1e3 * each.slowest:.1f}",
                f"{each.waves:.1f}",
                f"{each.rows:.1f}",
                each.peak_rows,
                f"{each.overhead:.2f}",
                f"{each.difference:.3f} ({each.largest_difference:.3f})",
                None if each.predicted_seconds is None else f"{1e3 * each.predicted_seconds:.1f}",
                each.loop,
                each.method,
            )
        )
    return lines


def trained(weights: Path | None, training_steps: int) -> PolicyNetwork:
    """The network, from a file or trained."""
    if weights is not None and weights.exists():
        network = demonstrations.policy()
        network.load_state_dict(torch.load(weights, weights_only=True))
        return network.eval()
    network = demonstrations.train(training_steps)
    if weights is not None:
        torch.save(network.state_dict(), weights)
    return network


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.policy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--training-steps", type=int, default=demonstrations.TRAINING_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=15, help="calls of every loop that are timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny size: 10 steps, hardly trained, 2 rounds")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.rounds, options.training_steps = 10, 2, 3
    network = trained(options.weights, options.training_steps)
    print(f"{sum(each.numel() for each in network.parameters()) / 1e3:.0f} thousand parameters, {options.steps} steps")
    rounds = cases(options.rounds)
    every = loops(network, options.steps)
    left_out = refused(every, rounds[0])
    every = {name: loop for name, loop in every.items() if name not in left_out}
    curve = c_of_rows(network)
    print("rows  " + "".join(f"{rows:>14}" for rows in curve.cost.rows))
    cells = [f"{1e3 * each:8.2f}{each / curve.cost.seconds[0]:5.2f}x" for each in curve.cost.seconds]
    print("ms    " + "".join(cells))
    results = measured(network, every, rounds, curve)
    print(*table(results), sep="\n")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    references = torch.cat([every[SEQUENTIAL](*case)[0] for case in rounds])
    off = float(demonstrations.away(references, torch.cat([case.observation for case in rounds])).mean())
    print(f"sequential trajectories are {off:.3f} off the nearer demonstrated way, in actions of [-1, 1]")
    if options.json is not None:
        whole = {
            "environment": environment(),
            "curve": curve.to_dict(),
            "results": [result._asdict() for result in results],
            "left_out": left_out,
            "away": off,
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
