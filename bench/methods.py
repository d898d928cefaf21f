"""Methods side by side: how many waves and rows each needs to be within half a grey level, and within a twentieth.

    python -m bench.methods                                 # every method and problem, N = 25, 50, 100, 200
    python -m bench.methods --problems digits --steps 100 --json methods.json --picture methods.png
    python -m bench.methods --measure --curves rows.json    # and what that is in time, by c(rows) of bench/rows.py
    python -m bench.methods --from methods.json --picture methods.png    # the table again, nothing is run

Two problems: the bundled digits pipeline under guidance (ten prompts in turn), and a Gaussian mixture in closed form.
The difference is the mean absolute one to the sequential sample, of each sample; its 95th percentile over the samples
must be within the bound. 1 grey level is 1 / 127.5 in units of x.

A method that has a sample after every iteration runs all samples together and is stopped from outside: the first
iteration counts from which on the percentile stays within the bound, and its waves, rows and widest wave are those of a
run that is told before to end with it. Where samples stop by themselves ("stops itself", and all that have a window)
there is a run for each of several tolerances, from loose to tight, and one more between the two on either side of a
bound; the cheapest within the bound counts, with the mean of its waves and rows over the samples. Windows slide by what
they find, so there each sample runs alone.

The first columns are ratios over N sequential calls: where a call costs the same whatever its rows (N / waves), where
it costs as much as its rows (N / rows), and by measured curves. A dash: not within the bound before N waves, or with
none of the tolerances.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from srds_fast.cli.table import Table
from srds_fast.telemetry.environment import environment

from . import curves, rows
from .contestants import CONTESTANTS, DEFAULT, PAPER, SELF_STOPPING
from .curves import Curve
from .problems import PROBLEMS, Problem, problem
from .reaching import Line, Point, cheapest, line, sequential

STEPS = (25, 50, 100, 200)
BOUNDS = (0.5, 0.05)
MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 50, 100)
MEASURED = "this CPU"


@dataclass(frozen=True)
class Found:
    """All points of a method on a problem for a number of steps."""

    problem: str
    steps: int
    method: str
    points: Line

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Found:
        """What `asdict` made, read from JSON."""
        points = [
            Point(each["setting"], each["difference"], tuple(map(tuple, each["widths"]))) for each in found["points"]
        ]
        return cls(found["problem"], found["steps"], found["method"], points)


def measured(problems: Sequence[Problem], steps: Sequence[int], methods: Sequence[str]) -> Iterator[Found]:
    """Every method on every problem, the steps in turn; told on stderr as it goes."""
    for each in steps:
        for posed in problems:
            reference = sequential(posed, each)
            for method in methods:
                started = time.perf_counter()
                points = line(CONTESTANTS[method], posed, each, reference, BOUNDS)
                print(f"{posed.name}, {each} steps, {method}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
                yield Found(posed.name, each, method, points)


def table(found: Sequence[Found], known: Sequence[Curve]) -> Iterator[str]:
    """Lines: for every problem, number of steps and bound the methods, fewest waves first."""
    columns = Table(
        [
            ("N/waves", 7),
            ("N/rows", 6),
            *((curve.name, 6) for curve in known),
            ("waves", 6),
            ("rows", 6),
            ("peak", 4),
            ("p95", 6),
            ("method", -36),
            ("at", -1),
        ]
    )
    for posed, steps in dict.fromkeys((each.problem, each.steps) for each in found):
        of_both = [each for each in found if (each.problem, each.steps) == (posed, steps)]
        for bound in BOUNDS:
            yield f"\n{posed}, N = {steps}, 95th percentile within {bound:g} grey levels"
            yield columns.heading()
            reached = [(each.method, cheapest(each.points, bound)) for each in of_both]
            for method, point in sorted(reached, key=lambda pair: pair[1].waves if pair[1] else float("inf")):
                yield columns.line(*_cells(steps, method, point, known))


def _cells(steps: int, method: str, point: Point | None, known: Sequence[Curve]) -> list[object]:
    if point is None:
        return [None] * (6 + len(known)) + [method, None]
    ratios = [steps / point.waves, steps / point.rows, *(curve.speed_up(steps, point.widths) for curve in known)]
    counts = [f"{each:.0f}" if each == int(each) else f"{each:.1f}" for each in (point.waves, point.rows)]
    return [
        *(f"{each:.2f}" for each in ratios),
        *counts,
        point.peak_rows,
        f"{point.difference:.3f}",
        method,
        point.setting,
    ]


def verdict(found: Sequence[Found]) -> Iterator[str]:
    """Our default against the paper's SRDS, at the looser bound: how many times fewer waves."""
    for posed in dict.fromkeys(each.problem for each in found):
        for ours in (DEFAULT, SELF_STOPPING):
            ratios = []
            for steps in dict.fromkeys(each.steps for each in found):
                points = {
                    each.method: cheapest(each.points, BOUNDS[0])
                    for each in found
                    if (each.problem, each.steps) == (posed, steps)
                }
                paper, own = points.get(PAPER), points.get(ours)
                if paper and own:
                    ratios.append(f"{paper.waves / own.waves:.2f} at N={steps} ({paper.waves:.0f}/{own.waves:.1f})")
            if ratios:
                what = "default" if ours == DEFAULT else "default, stopping each sample by itself,"
                yield f"{what} against the paper's SRDS, {posed}, waves within {BOUNDS[0]:g}: {', '.join(ratios)}"


def _curves(paths: Sequence[Path], measure: bool) -> list[Curve]:
    known = [curve for path in paths for curve in curves.read(path)]
    if measure:
        known.append(curves.measure(MEASURED, rows.digits().call, MEASURED_ROWS))
    return known


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="*", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="METHOD")
    parser.add_argument("--steps", nargs="*", type=int, default=list(STEPS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=5.0, help="of digits")
    parser.add_argument("--curves", nargs="*", type=Path, default=[], help="JSON of bench/rows.py")
    parser.add_argument("--measure", action="store_true", help="measure c(rows) of digits on this CPU first")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--from", dest="saved", nargs="*", type=Path, default=[], help="JSON of this command; runs nothing"
    )
    parser.add_argument("--picture", type=Path, help="PNG: difference against speed, for the most steps up to 100")
    parser.add_argument("--smoke", action="store_true", help="a tiny size: 5 steps, 2 samples, to see that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples = [5], 2
    return options


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    options = _options(arguments)
    known = _curves(options.curves, options.measure)
    found: list[Found] = []
    for path in options.saved:
        saved = json.loads(path.read_text())
        found += map(Found.of_json, saved["found"])
        known += map(Curve.from_dict, saved["curves"])
        options.samples = saved["samples"]
    if not options.saved:
        problems = [problem(name, options.samples, options.guidance) for name in options.problems]
        for each in measured(problems, options.steps, options.methods):
            found.append(each)
            if options.json is not None:  # after each, so that a run cut short leaves what it has
                _write(options, found, known)
    print(f"{options.samples} samples", *table(found, known), "", *verdict(found), sep="\n")
    if options.picture is not None:
        from .picture import picture

        steps = max((each.steps for each in found if each.steps <= 100), default=max(each.steps for each in found))
        shown = found[0].problem
        lines = {each.method: each.points for each in found if (each.problem, each.steps) == (shown, steps)}
        picture(f"{shown}, N = {steps}", steps, lines, known, options.picture)


def _write(options: argparse.Namespace, found: Sequence[Found], known: Sequence[Curve]) -> None:
    whole = {
        "environment": environment(),
        "samples": options.samples,
        "guidance": options.guidance,
        "bounds": BOUNDS,
        "curves": [curve.to_dict() for curve in known],
        "found": [asdict(each) for each in found],
    }
    options.json.write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
