"""Two commits against each other, in one job on one machine: is the second one slower?

    python -m bench.compare BASE HEAD                     # e.g. origin/main WORKTREE
    python -m bench.compare HEAD~1 HEAD --only 'host/*' --rounds 9 --json compare.json

WORKTREE, or a dot, is the files as they are. Of each commit only the library is taken, srds_fast/ and kernels/; the
benches are those of this checkout for both, so that a base which had none of them can be measured too.

Each commit has one process, kept all along: to import and to warm up takes as long as many samples, and would be done
under other conditions each time. Samples are taken in turn, base head, head base, and so on: a machine that gets slower
or busier meets both. A round is one sample of each, and what is compared is their ratio, within the round. Of the
ratios the median counts, between two of them that hold the median of all rounds there could be with at least 90 %
(no distribution is assumed: of 5 rounds these are the lowest and the highest). What a process has for itself all along,
where its memory lies for one, is not in there; it is of the order of a few per cent, and what the threshold is for.

A bench is slower if even the lower of the two lies above the threshold, faster if the upper lies below its inverse,
and unclear if the threshold lies between them: it then gets as many rounds again, twice at most. What is still unclear
would take more --rounds, or a machine that is less busy. Otherwise it is the same: not slower, as far as this threshold
goes. Counts (`bench.counts`) do not jitter: every difference is shown; they are gated by tests/test_counts.py.

Exit status: 0, also where a bench is unclear; 1 if a bench is slower, or fails at HEAD; 2 if what was asked for cannot
be done; 130 if it was interrupted. A bench that fails at BASE and runs at HEAD is new.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from srds_fast.cli.table import Table
from srds_fast.telemetry.environment import environment

from .committed import differences
from .layout import BadInput, commit, lay_out
from .registry import REGISTRY
from .worker import Failed, Worker

CONFIDENCE = 0.9
# fewer hold no such interval
FEWEST_ROUNDS = 5
# a verdict is looked for so many times, each time with as many rounds more
LOOKS = 3
BAD = ("slower", "fails")
TABLE = Table([("", -44), ("base ms", 9), ("head ms", 9), ("ratio", 6), ("90 %", 13), ("", -7)])


@dataclass(frozen=True)
class Verdict:
    """What was found of one bench.

    Attributes:
        bench: its name.
        verdict: "same", "slower", "faster", "unclear", "new" (fails at base) or "fails" (at head).
        base, head: seconds of a call in each round.
        ratio: median of head over base; low, high: see above.
        why: of what failed.
    """

    bench: str
    verdict: str
    base: tuple[float, ...] = ()
    head: tuple[float, ...] = ()
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    why: str | None = None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with `CONFIDENCE` at least, whatever they follow."""
    ordered, size = sorted(values), len(values)
    outside, rank = 0.0, 0
    # each value lies on either side of the median like a coin
    while outside + 2 * math.comb(size, rank) / 2**size <= 1 - CONFIDENCE:
        outside += 2 * math.comb(size, rank) / 2**size
        rank += 1
    return ordered[rank - 1], ordered[size - rank]


def judge(bench: str, base: Sequence[float], head: Sequence[float], threshold: float) -> Verdict:
    """The verdict of rounds that ran on both sides."""
    ratios = [of_head / of_base for of_base, of_head in zip(base, head, strict=True)]
    low, high = interval(ratios)
    if high > threshold:
        verdict = "slower" if low > threshold else "unclear"
    else:
        verdict = "faster" if high < 1 / threshold else "same"
    return Verdict(bench, verdict, tuple(base), tuple(head), statistics.median(ratios), low, high)


def compared(bench: str, base: Worker, head: Worker, rounds: int, threshold: float) -> Verdict:
    """Time one bench on both sides, in so many rounds, or in up to `LOOKS` times as many."""
    calls: dict[Worker, int] = {}
    # head first: what fails on both sides is not new
    for verdict, worker in (("fails", head), ("new", base)):
        try:
            calls[worker] = worker.prepare(bench)
        except Failed as why:
            return Verdict(bench, verdict, why=str(why))
    times: dict[Worker, list[float]] = {base: [], head: []}
    for number in range(LOOKS * rounds):
        if number in range(rounds, LOOKS * rounds, rounds):
            found = judge(bench, times[base], times[head], threshold)
            if found.verdict != "unclear":
                return found
        for worker in (base, head) if number % 2 == 0 else (head, base):
            try:
                times[worker].append(worker.sample(calls[worker]))
            except Failed as why:
                return Verdict(bench, "fails" if worker is head else "new", why=str(why))
    return judge(bench, times[base], times[head], threshold)


def count_differences(base: Worker, head: Worker) -> list[str]:
    """A line for every count that differs, or for why they cannot be compared."""
    for worker in (base, head):  # both at once: no times are taken
        worker.begin_counts()
    found, failed = [], []
    for name, worker in (("base", base), ("head", head)):
        try:
            found.append(worker.counts())
        except Failed as why:
            failed.append(f"They cannot be taken at {name}: {why}")
    return failed or differences(*found)


def chosen(only: Sequence[str]) -> list[str]:
    """Names of benches: those that are compared unless told otherwise, or all that fit a pattern.

    Raises:
        BadInput: none does.
    """
    if not only:
        return [name for name, bench in REGISTRY.items() if bench.compared]
    found = [name for name in REGISTRY if any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in only)]
    if not found:
        raise BadInput(
            f"No bench fits {' or '.join(map(repr, only))}. Names are like {next(iter(REGISTRY))!r}. "
            "`python -m bench.registry` prints them all."
        )
    return found


def runnable(names: Sequence[str]) -> list[str]:
    """Those that need no device which is not here.

    Raises:
        BadInput: all do.
    """
    if torch.cuda.is_available():
        return list(names)
    found = [name for name in names if "gpu" not in REGISTRY[name].marks]
    if not found:
        raise BadInput(
            f"{names[0]}{' and all others that fit need' if len(names) > 1 else ' needs'} a CUDA device. Torch finds "
            "none here. Compare on a machine that has one, or choose others: `python -m bench.registry` marks them."
        )
    return found


def run(options: argparse.Namespace, say: Callable[[str], object] = print) -> int:
    """Compare, print and write; returns the exit status."""
    fitting = chosen(options.only or ())
    names = runnable(fitting)
    if len(names) < len(fitting):
        say(f"{len(fitting) - len(names)} of {len(fitting)} benches are left out: they need a CUDA device.")
    base, head = commit(options.base), commit(options.head)
    say(f"base: {base.title}\nhead: {head.title}")
    with tempfile.TemporaryDirectory(prefix="srds_fast_compare_") as folder, ExitStack() as stack:
        sites = Path(folder) / "base", Path(folder) / "head"
        for side, site in zip((base, head), sites, strict=True):
            lay_out(side, site)
        of_base, of_head = (stack.enter_context(Worker(site)) for site in sites)
        say("\n" + TABLE.heading())
        verdicts = []
        for name in names:
            verdict = compared(name, of_base, of_head, options.rounds, options.threshold)
            verdicts.append(verdict)
            say(line(verdict))
        counts = None if options.no_counts else count_differences(of_base, of_head)
    if counts is not None:
        say("\ncounts: " + ("\n  ".join(["", *counts]) if counts else "no difference"))
    status = concluded(verdicts, say)
    if options.json is not None:
        found = {
            "environment": environment(),
            "base": base._asdict(),
            "head": head._asdict(),
            "threshold": options.threshold,
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "count_differences": counts,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return status


def concluded(verdicts: Sequence[Verdict], say: Callable[[str], object]) -> int:
    """Say what is to be looked at; returns the exit status."""
    bad = [verdict for verdict in verdicts if verdict.verdict in BAD]
    for verdict in bad:
        what = f"{verdict.ratio:.2f} times as long" if verdict.verdict == "slower" else verdict.why
        say(f"{verdict.verdict}: {verdict.bench}, {what}")
    unclear = [verdict for verdict in verdicts if verdict.verdict == "unclear"]
    for verdict in unclear:
        say(f"unclear: {verdict.bench}, {verdict.low:.2f} to {verdict.high:.2f} after {len(verdict.base)} rounds")
    status = 1 if bad else 0
    if unclear:
        say(f"More --rounds would tell whether they are slower. The exit status, {status}, says nothing of them.")
    return status


def line(verdict: Verdict) -> str:
    """Of the table."""
    if verdict.ratio is None:
        return TABLE.line(verdict.bench, None, None, None, None, f"{verdict.verdict}: {verdict.why}")
    return TABLE.line(
        verdict.bench,
        *(f"{1e3 * statistics.median(times):.3f}" for times in (verdict.base, verdict.head)),
        f"{verdict.ratio:.2f}",
        f"{verdict.low:.2f} to {verdict.high:.2f}",
        verdict.verdict,
    )


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not {FEWEST_ROUNDS} or more; fewer say nothing with 90 %")
    return int(text)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio of 1 or more, as 1.10")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no folder {path.parent}. Make it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder. Name a file in it")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="benches whose names fit, e.g. host, 'host/*srds'")
    parser.add_argument(
        "--rounds",
        type=_rounds,
        default=FEWEST_ROUNDS,
        help="at least, and by default, %(default)s; up to three times as many where it is unclear",
    )
    parser.add_argument("--threshold", type=_threshold, default=1.10, help="ratio above which a bench is slower")
    parser.add_argument("--no-counts", action="store_true", help="leave the counts out")
    parser.add_argument("--json", type=_file, help="write what was found, every time included")
    options = parser.parse_args(arguments)
    try:
        # what was found is seen at once, through a pipe as well
        sys.exit(run(options, partial(print, flush=True)))
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted: no verdict, and nothing is written.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
