"""Methods side by side: the waves and rows that each needs to be within half a grey level, and within a twentieth.

    python -m bench.quality.methods                                 # every method and problem, N = 25, 50, 100, 200
    python -m bench.quality.methods --problems digits --steps 100 --json methods.json --picture methods.png
    python -m bench.quality.methods --noise --samples 4             # DDPM, N = 100 and 1000, every method as it is

Problems: the bundled digits pipeline under guidance (ten prompts in turn), a Gaussian mixture in closed form, and the
bundled robot policy in states of its episodes (with --noise, or if it is named). The difference of a sample is the mean
absolute one to the sequential sample, in grey levels (1 / 127.5 in units of x); its 95th percentile over the samples
must be within the bound.

Most methods run all samples together and are stopped from outside: at the first iteration from which on the percentile
stays within the bound, with the waves and rows of a run that is told before to end there. Where samples stop by
themselves ("stops itself", and sliding windows) there is a run for each of several tolerances, and the cheapest within
the bound counts, with means over the samples. A dash: not within the bound before N waves, or at any tolerance.

With --noise the steps are DDPM's, which add noise, and methods run at their defaults, one sample in a call: the waves
and rows are means over the samples, "s" is the median call, "max off" the largest difference to the sequential sample.
Speculative sampling gives other samples of the same law, so it has none. The policy knows 100 levels; for more steps
its schedule is finer, and the network is asked at times between those that it is trained for.

N/waves is the speed-up where a call costs the same whatever its rows, N/rows where it costs as much as its rows.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.command import parser, revision, writable, write, written
from bench.pictures import waves_picture
from bench.speed.timing import timed
from bench.workloads.problems import Problem, digits_problem, mixture, policy_problem
from srds_fast.cli.output import show_table

from . import noise
from .contestants import CONTESTANTS
from .search import Point, cheapest, line

BOUNDS = (0.5, 0.05)
PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "digits": lambda samples: digits_problem(samples)[1],
    "mixture": mixture,
    "policy": policy_problem,
}
USUAL = ("digits", "mixture")
HEADINGS = ("N/waves", "N/rows", "waves", "rows", "peak", "p95", "method", "at")


@dataclass(frozen=True)
class Found:
    """All points of a method on a problem for a number of steps."""

    problem: str
    steps: int
    method: str
    points: list[Point]


def measured(problems: Sequence[Problem], steps: Sequence[int], methods: Sequence[str]) -> Iterator[Found]:
    """Every method on every problem; progress is told on stderr."""
    for number in steps:
        for posed in problems:
            reference = posed.sequential(number)
            for method in methods:
                seconds, points = timed(lambda: line(CONTESTANTS[method], posed, number, reference, BOUNDS))  # noqa: B023
                print(f"{posed.name}, {number} steps, {method}: {seconds:.0f} s", file=sys.stderr)
                yield Found(posed.name, number, method, points)


def show(found: Sequence[Found]) -> None:
    """Print, for every problem, number of steps and bound, the methods, fewest waves first."""
    for posed, steps in dict.fromkeys((each.problem, each.steps) for each in found):
        here = [each for each in found if (each.problem, each.steps) == (posed, steps)]
        for bound in BOUNDS:
            rows: list[dict[str, object]] = []
            reached = [(each.method, cheapest(each.points, bound)) for each in here]
            for method, point in sorted(reached, key=lambda pair: pair[1].waves if pair[1] else float("inf")):
                cells: list[object] = [*[None] * 6, method, None]
                if point is not None:
                    counts = [f"{each:.4g}" for each in (point.waves, point.rows, point.peak_rows)]
                    ratios = steps / point.waves, steps / point.rows
                    cells = [*ratios, *counts, f"{point.difference:.3f}", method, point.setting]
                rows.append(dict(zip(HEADINGS, cells, strict=True)))
            title = f"\n{posed}, N = {steps}, 95th percentile within {bound:g} grey levels"
            show_table(rows, text=("method", "at"), title=title)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    told = parser("bench.quality.methods", __doc__)
    told.add_argument("--noise", action="store_true", help="DDPM, every method at its defaults")
    told.add_argument("--problems", nargs="*", choices=PROBLEMS, help=f"{', '.join(USUAL)}; with --noise all")
    told.add_argument("--methods", nargs="*", metavar="METHOD", help="all; with --noise of the package's methods some")
    told.add_argument("--steps", nargs="*", type=int, help="25 50 100 200; with --noise 100 1000")
    told.add_argument("--samples", type=int, default=16)
    told.add_argument("--from", dest="saved", type=written, help="JSON of this command: nothing is run")
    told.add_argument("--picture", type=writable, help="PNG: difference against waves, for the most steps up to 100")
    told.add_argument("--smoke", action="store_true", help="a tiny size: 5 steps, 2 samples, to see that it runs")
    options = told.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples = [5], 2
    if options.noise and options.picture is not None:
        told.error("--picture is of runs without --noise")
    known = list(noise.METHODS) if options.noise else list(CONTESTANTS)
    options.methods = known if options.methods is None else options.methods
    if unknown := sorted(set(options.methods) - set(known)):
        told.error(f"there is no method {unknown[0]}: use {', '.join(known)}")
    (_with_noise if options.noise else _without_noise)(options)


def _posed(options: Namespace, usual: Sequence[str]) -> list[Problem]:
    names = usual if options.problems is None else options.problems
    return [PROBLEMS[name](options.samples) for name in names]


def _with_noise(options: Namespace) -> None:
    found: list[noise.Taken] = []
    if options.saved is not None:
        found = noise.read(options.saved)
    else:
        about = {"commit": revision(Path.cwd()), "samples": options.samples, "threads": torch.get_num_threads()}
        problems = _posed(options, list(PROBLEMS))
        for each in noise.measured(problems, options.steps or [100, 1000], options.methods):
            found.append(each)
            write(options.json, None, **about, **noise.document(found))
    noise.show(found)


def _without_noise(options: Namespace) -> None:
    found: list[Found] = []
    if options.saved is not None:
        saved, options.samples = options.saved, options.saved["samples"]
        found = [Found(**{**each, "points": [Point(**point) for point in each["points"]]}) for each in saved["found"]]
    else:
        about = {"samples": options.samples, "bounds": BOUNDS}
        for each in measured(_posed(options, USUAL), options.steps or [25, 50, 100, 200], options.methods):
            found.append(each)
            write(options.json, None, **about, found=[asdict(each) for each in found])
    print(f"{options.samples} samples")
    show(found)
    if options.picture is not None:
        steps = max((each.steps for each in found if each.steps <= 100), default=max(each.steps for each in found))
        shown = [each for each in found if (each.problem, each.steps) == (found[0].problem, steps)]
        lines = {each.method: [(point.difference, point.waves) for point in each.points] for each in shown}
        waves_picture(f"{found[0].problem}, N = {steps}", steps, lines, options.picture)


if __name__ == "__main__":
    main()
