"""Stops: waves and rows of samples that stop by themselves, against the fewest that would have been enough.

    python -m bench.quality.stops --networks build/networks --json stops.json      # trains what is not there yet
    python -m bench.quality.stops --from stops.json                                # judges again what was recorded
    python -m bench.quality.stops --problems mixture policy --steps 50 --samples 96

Problems: the bundled digits pipeline at guidance 1 and 5, a robot policy, two Gaussian mixtures in closed form, and two
networks that no default was tuned on: a UNet over 16 x 16 pixels at guidance 1 and 5, and a policy that has learned
other motions with another seed. Steps are those of DDIM; more than a network was trained for are left out.

All samples of a problem run together, and each a little further than it would have gone. The columns, waves/rows:

    tolerance   where the product stops each sample at its default tolerance, 4e-3; a mean
    fixed       the fewest waves from which on the 95th percentile of the differences stays within 0.5 grey levels
    oracle      each sample told from which wave on it stays within 0.5 grey levels; a mean
    over        waves by tolerance less those of the oracle
    beyond      samples that ended beyond the tolerance (0.51 grey levels) where the product stopped them
    largest     difference of any sample there, in grey levels

The difference of a sample is the mean absolute one to the sequential sample. Rows of "fixed" and "oracle" are of a run
that is told before where it ends. The window of ParaDiGMS has no whole samples before its end: it is only stopped by
itself, at its own default tolerance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from bench.command import parser, write, written
from bench.speed.timing import timed
from bench.workloads import demonstrations, untuned
from bench.workloads.problems import GREY_LEVEL, GUIDANCE, Problem, digits_problem, mixture
from bench.workloads.samplers import policy
from srds_fast.cli.output import show_table
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings
from srds_fast.solvers.chords import Chords

from .recordings import Recording, mean_cost, recorded

METHODS: dict[str, Any] = {
    "srds": "srds",
    "collocation": "collocation",
    "parataa": "parataa",
    "paradigms": "paradigms",
    "chords, 8 cores": Chords(num_cores=8),
}
# these evaluate every point in every wave, or sample by sample: fewer samples will do
FEWER = ("parataa", "paradigms", "chords, 8 cores")
NARROW = 0.1  # standard deviation of a component, where that of the other mixture is 0.3
# how each network is built, and how it is trained
TRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module]]] = {
    "policy": (demonstrations.network, demonstrations.train),
    "other-policy": (demonstrations.network, untuned.train_other_policy),
    "patches": (untuned.patches_network, untuned.train_patches),
}


class Networks:
    """Trained networks by name, kept in a folder if there is one; steps: of training, None: as many as each needs."""

    def __init__(self, folder: Path | None, steps: int | None) -> None:
        self._folder, self._steps = folder, steps
        self._kept: dict[str, nn.Module] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._kept:
            self._kept[name] = self._found(name)
        return self._kept[name]

    def _found(self, name: str) -> nn.Module:
        build, train = TRAINED[name]
        path = None if self._folder is None else self._folder / f"{name}.pt"
        if path is not None and path.exists():
            network = build().eval()
            network.load_state_dict(torch.load(path))
            return network
        print(f"trains {name}", file=sys.stderr)
        network = train() if self._steps is None else train(self._steps)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), path)
        return network


def _policy(name: str, samples: int, networks: Networks) -> Problem:
    found = policy(networks(name), samples).problem
    assert found is not None
    return found


def _patches(guidance: float, samples: int, networks: Networks) -> Problem:
    return untuned.patches_problem(networks("patches"), samples, guidance)


PROBLEMS: dict[str, Callable[[int, Networks], Problem]] = {
    "digits": lambda samples, networks: digits_problem(samples, 1.0)[1],
    "digits-guided": lambda samples, networks: digits_problem(samples)[1],
    "policy": partial(_policy, "policy"),
    "mixture": lambda samples, networks: mixture(samples),
    "narrow-mixture": lambda samples, networks: mixture(samples, spread=NARROW),
    "patches": partial(_patches, 1.0),
    "patches-guided": partial(_patches, GUIDANCE),
    "other-policy": partial(_policy, "other-policy"),
}


def plan_of(method: str, steps: int) -> Plan:
    """The plan at the default tolerance."""
    return choose(steps, Settings(method=METHODS[method]))


def recordings(
    problems: Sequence[str], steps: Sequence[int], methods: Sequence[str], samples: int, fewer: int, networks: Networks
) -> Iterator[Recording]:
    """Every method on every problem; progress is told on stderr. fewer: samples of the methods of FEWER."""
    for name in problems:
        posed = PROBLEMS[name](samples, networks)._replace(name=name)
        most = posed.scheduler.config.num_train_timesteps
        for number in [each for each in steps if each <= most]:
            reference = posed.sequential(number)
            for method in methods:
                some = slice(min(samples, fewer) if method in FEWER else samples)
                asked = posed.only(some), method, plan_of(method, number), reference[some]
                seconds, found = timed(partial(recorded, *asked))
                print(f"{name}, {number} steps, {method}: {seconds:.0f} s", file=sys.stderr)
                yield found


def show(found: Iterable[Recording]) -> None:
    """Print every recording, and the sums of each method."""
    rows: list[dict[str, object]] = []
    totals: dict[str, list[tuple[int, int, float | None]]] = {}
    for each in sorted(found, key=lambda one: list(METHODS).index(one.method)):
        plan = plan_of(each.method, each.steps)
        stops = each.stops(plan.tolerance, plan.options.contraction)
        by_tolerance, oracle = mean_cost(stops), each.oracle()
        over = None if oracle is None else by_tolerance.waves - oracle.waves
        beyond = sum(stop.error > plan.tolerance / GREY_LEVEL for stop in stops)
        costs = {"tolerance": by_tolerance, "fixed": each.fixed(), "oracle": oracle}
        rows.append(
            {"method": each.method, "problem": each.problem, "N": each.steps}
            | {name: cost and f"{cost.waves:.3g}/{cost.rows:.0f}" for name, cost in costs.items()}
            | {"over": over, "samples": len(stops), "beyond": beyond, "largest": max(stop.error for stop in stops)}
        )
        totals.setdefault(each.method, []).append((len(stops), beyond, over))
    show_table(rows, text=("method", "problem"))
    print()
    for method, parts in totals.items():
        samples, beyond = (sum(each) for each in list(zip(*parts, strict=True))[:2])
        overs = [over for *_, over in parts if over is not None]
        more = f", {mean(overs):.2f} waves over the oracle, at most {max(overs):.2f}" if overs else ""
        print(f"{method}: {beyond} of {samples} samples beyond the tolerance, {beyond / samples:.1%}{more}")


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    told = parser("bench.quality.stops", __doc__)
    told.add_argument("--problems", nargs="*", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="PROBLEM")
    told.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    told.add_argument("--steps", nargs="*", type=int, default=[25, 50, 100, 200])
    told.add_argument("--samples", type=int, default=40)
    told.add_argument("--fewer", type=int, default=8, help="samples of parataa, paradigms and chords")
    told.add_argument("--networks", type=Path, metavar="FOLDER", help="where trained networks are kept")
    told.add_argument("--training-steps", type=int, help="of every network; left out: as many as each needs")
    told.add_argument("--from", dest="saved", type=written, nargs="*", help="JSON of this command: nothing is run")
    told.add_argument("--smoke", action="store_true", help="a tiny size: 8 steps, 2 samples, hardly trained")
    options = told.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples, options.training_steps = [8], 2, 3
    found: list[Recording] = []
    if options.saved is not None:
        found = [Recording.read(each) for saved in options.saved for each in saved["recordings"]]
    else:
        networks = Networks(options.networks, options.training_steps)
        asked = options.problems, options.steps, options.methods, options.samples, options.fewer, networks
        for each in recordings(*asked):
            found.append(each)
            write(options.json, None, recordings=[asdict(one) for one in found])
    show(found)


if __name__ == "__main__":
    main()
