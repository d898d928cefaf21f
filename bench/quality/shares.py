"""Shares: how many samples end beyond the tolerance, by method, number of blocks, network, steps and tolerance.

    python -m bench.quality.shares --networks build/networks --jobs 4       # trains what is not there yet
    python -m bench.quality.shares --problems clipped flow --methods srds --every-row
    python -m bench.quality.shares --from shares.json              # the tables of a run before

Networks are trained ones, smooth mixtures, and sharp ones: mixtures of few narrow Gaussians under DDIM, DPM-Solver++
and flow matching, and tanh under the default clip of DDIMScheduler. The constants of the rules were chosen with other
centres and other starting noise, but on the same trained networks and the same tanh. Found on networks of this command
were that collocation is careful in its fourth wave and ParaTAA takes a sixth (policies), and after how large a change
SRDS says nothing ahead (DPM-Solver++). A sample is beyond if its mean absolute difference
to the sequential sample is larger than the tolerance: one that ends in another mode of a mixture is. Every method of
the registry that iterates is asked, in its default form; SRDS also with few and with many blocks and as published,
CHORDS also with 8 cores. "auto" takes one of these. Networks of images are asked by a few of them.

A row is a method, a network, a number of steps and a tolerance. Its samples run in one batch, once, and are judged at
every tolerance as `bench.quality.stops` judges them. Methods whose window slides run once for every tolerance, each
sample with a window of its own: "told" are those samples beyond it that their report calls within. Elsewhere that is
all of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bench.command import parser, write, written
from bench.speed.timing import timed
from bench.workloads import sharp
from bench.workloads.problems import GREY_LEVEL, Problem
from srds_fast.cli.output import show_table
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.solvers.chords import Chords
from srds_fast.solvers.method import SAME_LAW, Method
from srds_fast.solvers.registry import REGISTERED
from srds_fast.solvers.sequential import Sequential
from srds_fast.solvers.srds import SRDS

from .recordings import Stop, recorded
from .stops import PROBLEMS, Networks

TOLERANCES = (4e-2, 4e-3, 4e-4)
# rows with a larger share are listed
MOST_OF_A_ROW = 0.02


@dataclass(frozen=True)
class Kind:
    """A problem, and how it is asked.

    Attributes:
        kind: "trained", "smooth" or "sharp".
        make: (samples, networks) -> the problem.
        steps: numbers of steps that it is solved with.
        samples: in one batch.
        methods: None: all.
    """

    kind: str
    make: Callable[[int, Networks], Problem]
    steps: tuple[int, ...]
    samples: int
    methods: tuple[str, ...] | None = None


# a row of a network of images costs many times one of the others
OF_IMAGES = ("srds", "srds, few blocks", "collocation", "parataa")
# one form of each method, where steps add noise
WITH_NOISE = ("srds", "collocation", "parataa", "paradigms", "parasolver", "chords")


def _images(name: str) -> Kind:
    return Kind("trained", PROBLEMS[name], (25,), 100, OF_IMAGES)


def _policy(name: str) -> Kind:
    return Kind("trained", PROBLEMS[name], (25, 50), 128)


def _noise(kind: str, name: str, steps: tuple[int, ...]) -> Kind:
    """A problem of `KINDS` with steps that add noise."""
    without = KINDS[name]
    return Kind(kind, lambda *given: without.make(*given).with_noise(), steps, 128, WITH_NOISE)


def _closed(kind: str, make: Callable[[int], Problem]) -> Kind:
    return Kind(kind, lambda samples, networks: make(samples), (20, 25, 50, 100), 128)


FLOW = FlowMatchEulerDiscreteScheduler
KINDS: dict[str, Kind] = {
    "digits-guided": _images("digits-guided"),
    "patches": _images("patches"),
    "patches-guided": _images("patches-guided"),
    "policy": _policy("policy"),
    "other-policy": _policy("other-policy"),
    "mixture": _closed("smooth", lambda samples: PROBLEMS["mixture"](samples, Networks(None, None))),
    "4-modes": _closed("sharp", partial(sharp.modes, count=4, size=16, std=0.15)),
    "8-modes": _closed("sharp", partial(sharp.modes, count=8, size=8, std=0.1)),
    "40-modes": _closed("sharp", partial(sharp.modes, count=40, size=32, std=0.2)),
    "multistep": _closed("sharp", partial(sharp.modes, count=8, size=8, std=0.1, scheduler=sharp.multistep)),
    "flow": _closed("sharp", partial(sharp.modes, count=8, size=8, std=0.1, scheduler=FLOW)),
    "clipped": _closed("sharp", sharp.clipped),
}
KINDS |= {
    "policy, DDPM": _noise("trained", "policy", (25, 50, 100)),
    "other-policy, DDPM": _noise("trained", "other-policy", (25, 50)),
    "mixture, DDPM": _noise("smooth", "mixture", (25, 50)),
    "4-modes, DDPM": _noise("sharp", "4-modes", (25, 50)),
    "8-modes, DDPM": _noise("sharp", "8-modes", (25, 50)),
    "clipped, DDPM": _noise("sharp", "clipped", (25, 50)),
}


def variants(steps: int) -> dict[str, Method]:
    """What is asked for N steps, by name; forms that are the same are left out."""
    given = [each for each in REGISTERED if each is not Sequential and each.promise != SAME_LAW]
    found: dict[str, Method] = {each.name: each() for each in given}
    usual = max(1, round(steps / max(2, round(math.sqrt(steps) / 2))))
    found["srds, few blocks"] = SRDS(num_blocks=max(2, round(math.sqrt(steps) / 1.3)))
    if usual < steps // 2:
        found["srds, many blocks"] = SRDS(num_blocks=steps // 2)
    return found | {"srds, published": SRDS.published(steps), "chords, 8 cores": Chords(num_cores=8)}


METHODS = tuple(variants(100))


@dataclass(frozen=True)
class Share:
    """A row.

    Attributes:
        beyond: so many samples are beyond the tolerance; told: so many of them are told to be within.
        worst: the largest error of a sample that is told to be within, in tolerances.
        waves: mean.
    """

    method: str
    problem: str
    steps: int
    tolerance: float
    samples: int
    beyond: int
    told: int
    worst: float
    waves: float

    @classmethod
    def of(cls, method: str, problem: str, steps: int, tolerance: float, stops: Sequence[Stop]) -> Share:
        errors = [stop.error * GREY_LEVEL / tolerance for stop in stops]
        beyond = [stop.told for stop, error in zip(stops, errors, strict=True) if error > 1]
        worst = max((error for stop, error in zip(stops, errors, strict=True) if stop.told), default=0.0)
        waves = sum(stop.waves for stop in stops) / len(stops)
        return cls(method, problem, steps, tolerance, len(stops), len(beyond), sum(beyond), worst, waves)

    @property
    def share(self) -> float:
        """Of the samples that are beyond the tolerance and told to be within."""
        return self.told / self.samples


def shares(
    problems: Sequence[str], methods: Sequence[str], networks: Networks, smoke: bool, jobs: int = 1
) -> Iterator[Share]:
    """Every method on every problem; progress is told on stderr.

    smoke: 8 steps, few samples. jobs: processes that take one problem after another.
    """
    rows = partial(rows_of, methods=methods, networks=networks, smoke=smoke)
    if jobs == 1:
        yield from chain.from_iterable(map(rows, problems))
        return
    for name in problems:
        KINDS[name].make(1, networks)  # networks that are not there yet are trained once
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from chain.from_iterable(pool.map(rows, problems))


def rows_of(name: str, methods: Sequence[str], networks: Networks, smoke: bool) -> list[Share]:
    """The rows of a problem."""
    rows: list[Share] = []
    kind = KINDS[name]
    posed = kind.make(2 if smoke else kind.samples, networks)._replace(name=name)
    for steps in (8,) if smoke else kind.steps:
        reference = posed.sequential(steps)
        for method, options in variants(steps).items():
            if method in methods and (kind.methods is None or method in kind.methods):
                seconds, found = timed(partial(judged, posed, method, options, steps, reference))
                print(f"{name}, {steps} steps, {method}: {seconds:.1f} s", file=sys.stderr)
                rows.extend(found)
    return rows


def judged(posed: Problem, method: str, options: Method, steps: int, reference: torch.Tensor) -> list[Share]:
    """The row of each tolerance. reference: the sequential samples."""
    plans = {tolerance: choose(steps, Settings(method=options, tolerance=tolerance)) for tolerance in TOLERANCES}
    tightest = plans[min(TOLERANCES)]
    if not tightest.slides:
        whole = recorded(posed, method, tightest, reference, further=None)
    found = []
    for tolerance, plan in plans.items():
        if plan.slides:
            stops = recorded(posed, method, plan, reference).ends
        else:
            stops = whole.stops(tolerance, plan.options.contraction_of(stochastic=posed.adds_noise))
        found.append(Share.of(method, posed.name, steps, tolerance, stops))
    return found


def show(found: Sequence[Share], every_row: bool) -> None:
    """Print the shares by method and network, those of every method, and what misses a goal."""
    if every_row:
        show_table([_line(each) | {"waves": each.waves} for each in found], text=("method", "network"))
        print()
    rows, by_method = [], []
    for method in dict.fromkeys(each.method for each in found):
        theirs = [each for each in found if each.method == method]
        by_method.append({"method": method} | _by_tolerance(theirs))
        for name in dict.fromkeys(each.problem for each in theirs):
            rows.append({"method": method, "network": name} | _by_tolerance([e for e in theirs if e.problem == name]))
    show_table(rows, text=("method", "network"))
    print()
    show_table(by_method, text=("method",))
    print()
    missed = [each for each in found if each.share > MOST_OF_A_ROW]
    if missed:
        print(f"rows with more than {MOST_OF_A_ROW:.0%} beyond:")
        show_table([_line(each) for each in missed], text=("method", "network"))
    for kind in dict.fromkeys(each.kind for each in KINDS.values()):
        _total(kind, [each for each in found if KINDS[each.problem].kind == kind])
    _total("all", found)


def _line(share: Share) -> dict[str, object]:
    place = {"method": share.method, "network": share.problem, "N": share.steps, "tolerance": f"{share.tolerance:.0e}"}
    counts = {"samples": share.samples, "beyond": share.beyond, "told": share.told, "share": f"{share.share:.1%}"}
    return place | counts | {"worst": f"{share.worst:.1f}"}


def _by_tolerance(rows: Sequence[Share]) -> dict[str, object]:
    found: dict[str, object] = {"samples": sum(each.samples for each in rows) // len(TOLERANCES)}
    for tolerance in TOLERANCES:
        here = [each for each in rows if each.tolerance == tolerance]
        share = sum(each.told for each in here) / sum(each.samples for each in here)
        waves = sum(each.waves * each.samples for each in here) / sum(each.samples for each in here)
        found[f"{tolerance:.0e}"] = f"{share:.1%} {max(each.worst for each in here):.1f}"
        found[f"waves {tolerance:.0e}"] = f"{waves:.2f}"
    return found


def _total(name: str, rows: Iterable[Share]) -> None:
    rows = list(rows)
    if rows:
        samples, told, beyond = (sum(getattr(each, what) for each in rows) for what in ("samples", "told", "beyond"))
        largest = max(rows, key=lambda each: each.share)
        worst = max(each.worst for each in rows)
        print(
            f"{name}: {told} of {samples} beyond and told to be within, {told / samples:.2%}; {beyond - told} more "
            f"beyond and told so; at most {largest.share:.1%} in a row of {len(rows)}; worst {worst:.1f} tolerances"
        )


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    told = parser("bench.quality.shares", __doc__)
    told.add_argument("--problems", nargs="*", choices=list(KINDS), default=list(KINDS), metavar="PROBLEM")
    told.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, metavar="METHOD")
    told.add_argument("--networks", type=Path, metavar="FOLDER", help="where trained networks are kept")
    told.add_argument("--training-steps", type=int, help="of every network; left out: as many as each needs")
    told.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    told.add_argument("--every-row", action="store_true", help="print every row, with its mean waves")
    told.add_argument("--from", dest="saved", type=written, help="JSON of this command: nothing is run")
    told.add_argument("--smoke", action="store_true", help="a tiny size: 8 steps, 2 samples, hardly trained")
    options = told.parse_args(arguments)
    found: list[Share] = []
    if options.saved is not None:
        found = [Share(**each) for each in options.saved["shares"]]
    else:
        networks = Networks(options.networks, 3 if options.smoke else options.training_steps)
        for each in shares(options.problems, options.methods, networks, options.smoke, options.jobs):
            found.append(each)
            write(options.json, None, shares=[asdict(one) for one in found])
    show(found, options.every_row)


if __name__ == "__main__":
    main()
