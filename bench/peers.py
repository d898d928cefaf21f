"""Peers side by side: stock loops, diffusers' ParaDiGMS and every method of ours, as fast as each is at one quality.

    python -m bench.peers                                       # digits and policy, 25, 50 and 100 steps
    python -m bench.peers --workloads digits --steps 50 --json peers.json --picture peers.png
    python -m bench.peers --from peers.json --picture peers.png     # the table again, nothing is run

All are timed in one process on the same network, one sample a call, taking turns; every round is another prompt (or
observation) and other noise. Nothing is encoded or decoded. The first column is how many times faster than the stock
loop of diffusers the median call is, the second the same against our sequential loop (on a GPU the faster of its two
engines). In brackets behind the median milliseconds are the quartiles.

"p95" is the difference to the stock loop's samples, of each sample the mean absolute one in grey levels (1 / 127.5), of
these the 95th percentile. Where "within" is marked, the setting in the last column is the cheapest of the method's
(iterations, or a tolerance of its own) that keeps it within half a grey level for these samples; nobody knows it
beforehand. "stops itself" finds it on the way; "its own stop" is the test of the SRDS paper, and "auto" its default
tolerance, what `compile` does if told nothing. diffusers' ParaDiGMS always ends at an alpha of one: it is compared with
a stock loop whose scheduler does.

torch.compile is of the network, in the stock loop; what its first two calls take beyond later ones is shown apart, once
for all numbers of steps, with nothing compiled before (but "reduce-overhead" finds what "default" has compiled). The
policy is that of bench/demonstrations.py, trained here in a minute; the workloads with random weights, which are small
on a CPU, run fixed numbers of iterations, and no difference is shown: it would mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srds_fast.cli.environment import environment
from srds_fast.cli.table import Table
from srds_fast.errors import SrdsFastError

from . import demonstrations
from .entrants import AUTO, BOUND, COMPILED, SEQUENTIAL, STOCK, Entrant, entrants
from .policy import trained
from .reaching import difference
from .rows import DEVICE, SMALL
from .timing import Stopwatch
from .workloads import SAMPLES, WORKLOADS, Workload, policy

STEPS = (25, 50, 100)
TRAINED = ("digits", "policy")


@dataclass(frozen=True)
class Result:
    """What one of them took.

    Attributes:
        workload, steps, peer, setting: who.
        left_out: why it did not run; all below is None then.
        over_stock, over_sequential: how many times faster than these the median call is.
        difference: p95 over the samples in grey levels; None: the weights are random.
        within: its setting was looked for to keep the difference within `entrants.BOUND`.
        waves, rows: of a call, means; peak_rows: the most.
        seconds: of a call, the median; lower, upper: quartiles.
        compile_seconds: what its first calls took beyond later ones; None: nothing was compiled.
        engine: that ran; engine_reason: why it was no faster one.
        method: that ran.
    """

    workload: str
    steps: int
    peer: str
    setting: str
    left_out: str | None = None
    over_stock: float | None = None
    over_sequential: float | None = None
    difference: float | None = None
    within: bool = False
    waves: float | None = None
    rows: float | None = None
    peak_rows: int | None = None
    seconds: float | None = None
    lower: float | None = None
    upper: float | None = None
    compile_seconds: float | None = None
    engine: str | None = None
    engine_reason: str | None = None
    method: str | None = None


def measured(name: str, workload: Workload, steps: int, samples: int, every: Sequence[Entrant]) -> list[Result]:
    """All of them, the fastest first, those that did not run last."""
    left_out = {each.name: each.why_not for each in every if each.why_not is not None}
    first_calls: dict[str, float] = {}
    for each in every:
        if each.loop is not None:
            found = _first_calls(each)
            if isinstance(found, str):
                left_out[each.name] = found
            else:
                first_calls[each.name] = found
    running = [each for each in every if each.name in first_calls]
    times: dict[str, list[float]] = {each.name: [] for each in running}
    answers: dict[str, list[Tensor]] = {each.name: [] for each in running}
    counts: dict[str, list[Any]] = {each.name: [] for each in running}
    for sample in range(samples):
        for each in running:
            with Stopwatch(DEVICE) as watch:
                answer = each.loop.call(sample)
            times[each.name].append(watch.seconds)
            answers[each.name].append(answer.double().cpu())
            counts[each.name].append(each.loop.ran())
    medians = {each: statistics.median(of_each) for each, of_each in times.items()}
    sequential = min(seconds for each, seconds in medians.items() if each.startswith(SEQUENTIAL))
    results = []
    for each in running:
        ran, seconds = counts[each.name], medians[each.name]
        off = None
        if workload.problem is not None:
            expected = answers[STOCK]
            if each.reference is not None:
                expected = [each.reference.call(sample).double().cpu() for sample in range(samples)]
            off = float(difference(torch.cat(answers[each.name]), torch.cat(expected)).quantile(0.95))
        lower, _, upper = statistics.quantiles(times[each.name], n=4, method="inclusive")
        results.append(
            Result(
                workload=name,
                steps=steps,
                peer=each.name,
                setting=each.setting,
                over_stock=medians[STOCK] / seconds,
                over_sequential=sequential / seconds,
                difference=off,
                within=each.bound,
                waves=statistics.mean(one.waves for one in ran),
                rows=statistics.mean(one.rows for one in ran),
                peak_rows=max(one.peak_rows for one in ran),
                seconds=seconds,
                lower=lower,
                upper=upper,
                compile_seconds=max(0.0, first_calls[each.name] - 2 * seconds) if each.compiles else None,
                engine=ran[-1].engine,
                engine_reason=ran[-1].reason,
                method=ran[-1].method,
            )
        )
    results.sort(key=lambda result: result.seconds or 0.0)
    return results + [
        Result(name, steps, each.name, each.setting, left_out=left_out[each.name])
        for each in every
        if each.name in left_out
    ]


def _first_calls(entrant: Entrant) -> float | str:
    """Seconds of two calls, which compile, plan and record; or why it cannot run."""
    assert entrant.loop is not None
    try:
        with Stopwatch(DEVICE) as watch:
            for _ in range(2):
                entrant.loop.call()
    except (SrdsFastError, torch.cuda.OutOfMemoryError) as why:
        return f"{type(why).__name__}: {why}"
    except Exception as why:  # whatever a compiler raises
        if not entrant.compiles:
            raise
        return f"{type(why).__name__}: {' '.join(str(why).split())[:200]}"
    return watch.seconds


def table(results: Sequence[Result]) -> Iterator[str]:
    """Lines: for every workload and number of steps the peers, the fastest first."""
    columns = Table(
        [
            ("x stock", 0),
            ("x sequential", 0),
            ("p95", 6),
            ("within", 0),
            ("waves", 6),
            ("rows", 6),
            ("ms", 26),
            ("compile s", 0),
            ("engine", -10),
            ("peer", -36),
            ("at", -1),
        ]
    )
    for workload, steps in dict.fromkeys((each.workload, each.steps) for each in results):
        of_both = [each for each in results if (each.workload, each.steps) == (workload, steps)]
        yield f"\n{workload}, N = {steps}"
        yield columns.heading()
        yield from (columns.line(*_cells(each)) for each in of_both if each.left_out is None)
        yield from (f"left out: {each.peer}: {each.left_out}" for each in of_both if each.left_out is not None)


def _cells(each: Result) -> list[object]:
    seconds, lower, upper = (1e3 * (time or 0.0) for time in (each.seconds, each.lower, each.upper))
    return [
        f"{each.over_stock:.2f}",
        f"{each.over_sequential:.2f}",
        None if each.difference is None else f"{each.difference:.3f}",
        "yes" if each.within else None,
        f"{each.waves:.1f}",
        f"{each.rows:.1f}",
        f"{seconds:.1f} ({lower:.1f}..{upper:.1f})",
        None if each.compile_seconds is None else f"{each.compile_seconds:.0f}",
        each.engine,
        each.peer,
        f"ran {each.method}" if each.peer == AUTO else each.setting,
    ]


def compiled(workload: Workload, left_out: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The network compiled in each mode, by its first call; and why not, of the others.

    Args:
        left_out: why none is.
    """
    if left_out is not None:
        return {}, dict.fromkeys(COMPILED, left_out)
    modes: dict[str, str] = {}
    if SMALL:
        modes["reduce-overhead"] = "it is the default with CUDA graphs, and this is a CPU"
    network = workload.network.network
    return (
        {mode: torch.compile(network, mode=mode, dynamic=False) for mode in COMPILED if mode not in modes},
        modes,
    )


def where() -> str:
    """What it is run on, in words."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU ({platform.machine()})"
    return f"{device}, {torch.get_num_threads()} CPU thread"


def _workload(name: str, options: argparse.Namespace) -> Workload:
    torch.manual_seed(0)
    return policy(trained(options.weights, options.training_steps)) if name == "policy" else WORKLOADS[name]()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(TRAINED))
    parser.add_argument("--steps", nargs="*", type=int, default=list(STEPS), help="policy: 100 at most")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"rounds, each another sample; at most {SAMPLES}")
    parser.add_argument("--weights", type=Path, help="of policy: kept there, trained only if there are none")
    parser.add_argument("--training-steps", type=int, default=demonstrations.TRAINING_STEPS, help="of policy")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG: latency against difference")
    parser.add_argument(
        "--from", dest="saved", nargs="*", type=Path, default=[], help="JSON of this command; runs nothing"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny size: 5 steps, 2 samples, nothing compiled")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples, options.training_steps, options.no_compile = [5], 2, 3, True
    if not 2 <= options.samples <= SAMPLES:
        raise SystemExit(
            f"--samples is {options.samples}. A workload has {SAMPLES}, and quartiles need 2. Pass 2 to {SAMPLES}."
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    options = _options(arguments)
    if options.saved:
        measured_on, heading, results = _read(options.saved)
        print(heading, *table(results), sep="\n")
    else:
        measured_on, heading = environment(), f"{where()}, {options.samples} samples"
        print(heading, flush=True)
        with _nothing_compiled():
            results = _run(options, measured_on, heading)
    if options.json is not None:
        _write(options.json, measured_on, heading, results)
    if options.picture is not None:
        from .peers_picture import picture

        picture(heading, results, BOUND, options.picture)


def _run(options: argparse.Namespace, measured_on: dict[str, Any], heading: str) -> list[Result]:
    results: list[Result] = []
    left_out = "--smoke or --no-compile leaves it out" if options.no_compile else None
    for name in options.workloads:
        workload = _workload(name, options)
        networks, not_compiled = compiled(workload, left_out)
        for steps in options.steps:
            every = list(entrants(workload, steps, options.samples, networks, not_compiled))
            found = measured(name, workload, steps, options.samples, every)
            results += found
            print(*table(found), sep="\n", flush=True)
            if options.json is not None:  # after each, so that a run cut short leaves what it has
                _write(options.json, measured_on, heading, results)
    return results


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """torch.compile begins with an empty cache: it would take what an earlier run has compiled from disk."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as cache:
        os.environ[name] = cache
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _read(paths: Sequence[Path]) -> tuple[dict[str, Any], str, list[Result]]:
    """Of several files that were written on one machine: environment, where, and all results."""
    saved = [json.loads(path.read_text()) for path in paths]
    headings = {each["where"] for each in saved}
    if len(headings) > 1:
        raise SystemExit(
            f"The files were written in different places: {'; '.join(sorted(headings))}. Their times cannot stand in "
            "one table. Read them one at a time."
        )
    return saved[0]["environment"], headings.pop(), [Result(**each) for one in saved for each in one["results"]]


def _write(path: Path, measured_on: dict[str, Any], heading: str, results: Sequence[Result]) -> None:
    whole = {
        "environment": measured_on,
        "where": heading,
        "bound": BOUND,
        "results": [asdict(each) for each in results],
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
