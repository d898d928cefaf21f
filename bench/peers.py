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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srds_fast.cli.table import Table
from srds_fast.telemetry.environment import environment

from . import demonstrations
from .entrants import AUTO, BOUND, COMPILED, SEQUENTIAL, STOCK, Entrant, entrants, reason
from .layout import revision
from .peers_result import Result
from .policy import trained
from .reaching import difference
from .rows import DEVICE, SMALL, to_write
from .timing import Stopwatch
from .workloads import SAMPLES, WORKLOADS, Workload, policy

STEPS = (25, 50, 100)
# training steps of all pipelines' schedulers
MOST_STEPS = 1000
TRAINED = ("digits", "policy")
NOT_TIMED = "it was not timed: the run ended before"


class _Timed:
    """Calls of one of them so far, and samples that it is compared with where they are its own."""

    def __init__(self, entrant: Entrant) -> None:
        self.entrant = entrant
        self.left_out = entrant.why_not
        self.first_calls = 0.0
        self.seconds: list[float] = []
        self.answers: list[Tensor] = []
        self.expected: list[Tensor] = []
        self.ran: list[Any] = []

    def begin(self) -> None:
        """Two calls, which compile, plan and record."""
        assert self.entrant.loop is not None
        with Stopwatch(DEVICE) as watch:
            for _ in range(2):
                self.entrant.loop.call()
        self.first_calls = watch.seconds

    def round(self, sample: int) -> None:
        """One call."""
        assert self.entrant.loop is not None
        with Stopwatch(DEVICE) as watch:
            answer = self.entrant.loop.call(sample)
        self.answers.append(answer.double().cpu())
        self.ran.append(self.entrant.loop.ran())
        if self.entrant.reference is not None:
            self.expected.append(self.entrant.reference.call(sample).double().cpu())
        self.seconds.append(watch.seconds)


def measured(
    name: str, workload: Workload, steps: int, samples: int, every: Sequence[Entrant]
) -> Iterator[list[Result]]:
    """All of them, the fastest first, those that did not run last: before the first round, and after each.

    What compiles takes longest: it begins when the others have had their first round, so that a run that is cut short
    then has them.
    """
    timed = [_Timed(each) for each in every]
    for compiles in sorted({each.entrant.compiles for each in timed}):
        now = [each for each in timed if each.entrant.compiles == compiles]
        for call in (_Timed.begin, lambda each: each.round(0)):
            for each in _running(now):
                _or_left_out(each, call)
            yield _results(name, workload, steps, timed)
    for sample in range(1, samples):
        for each in _running(timed):
            _or_left_out(each, _Timed.round, sample)
        yield _results(name, workload, steps, timed)


def _running(timed: Iterable[_Timed]) -> list[_Timed]:
    return [each for each in timed if each.left_out is None]


def _or_left_out(timed: _Timed, call: Callable[..., None], *arguments: int) -> None:
    try:
        call(timed, *arguments)
    except Exception as why:  # whatever a compiler or a device raises: the others run
        timed.left_out = reason(why)


def _results(name: str, workload: Workload, steps: int, timed: Sequence[_Timed]) -> list[Result]:
    running = {each.entrant.name: each for each in _running(timed) if each.seconds}
    medians = {peer: statistics.median(each.seconds) for peer, each in running.items()}
    sequential = min((seconds for peer, seconds in medians.items() if peer.startswith(SEQUENTIAL)), default=None)
    results = []
    for peer, each in running.items():
        seconds, entrant = medians[peer], each.entrant
        expected = each.expected or (running[STOCK].answers if STOCK in running else [])
        off = None
        if workload.problem is not None and expected:
            off = float(difference(torch.cat(each.answers), torch.cat(expected)).quantile(0.95))
        results.append(
            Result(
                workload=name,
                steps=steps,
                peer=peer,
                setting=entrant.setting,
                over_stock=medians[STOCK] / seconds if STOCK in medians else None,
                over_sequential=None if sequential is None else sequential / seconds,
                difference=off,
                within=entrant.bound,
                waves=statistics.mean(one.waves for one in each.ran),
                rows=statistics.mean(one.rows for one in each.ran),
                peak_rows=max(one.peak_rows for one in each.ran),
                seconds=seconds,
                lower=_quantile(each.seconds, 0.25),
                upper=_quantile(each.seconds, 0.75),
                compile_seconds=max(0.0, each.first_calls - 2 * seconds) if entrant.compiles else None,
                engine=each.ran[-1].engine,
                engine_reason=each.ran[-1].reason,
                method=each.ran[-1].method,
            )
        )
    results.sort(key=lambda result: result.seconds or 0.0)
    return results + [
        Result(name, steps, each.entrant.name, each.entrant.setting, left_out=each.left_out or NOT_TIMED)
        for each in timed
        if each.entrant.name not in running
    ]


def _quantile(seconds: list[float], share: float) -> float:
    return float(torch.tensor(seconds, dtype=torch.float64).quantile(share))


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
        None if each.over_stock is None else f"{each.over_stock:.2f}",
        None if each.over_sequential is None else f"{each.over_sequential:.2f}",
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
    parser.add_argument("--json", type=to_write)
    parser.add_argument("--picture", type=to_write, help="PNG: latency against difference")
    parser.add_argument(
        "--from", dest="saved", nargs="*", type=_saved, default=[], help="JSON of this command; runs nothing"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny size: 5 steps, 2 samples, nothing compiled")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples, options.training_steps, options.no_compile = [5], 2, 3, True
    if not 2 <= options.samples <= SAMPLES:
        parser.error(
            f"--samples is {options.samples}. A workload has {SAMPLES}, and quartiles need 2. Pass 2 to {SAMPLES}."
        )
    for steps in options.steps:
        for name in options.workloads:
            most = demonstrations.scheduler().config.num_train_timesteps if name == "policy" else MOST_STEPS
            if not 1 <= steps <= most:
                parser.error(f"--steps is {steps}. The scheduler of {name} has {most}. Pass 1 to {most}.")
    return options


def _saved(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}: name one that --json has written")
    return path


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    options = _options(arguments)
    if options.saved:
        about, results = _read(options.saved)
        print(about["where"], *table(results), sep="\n")
    else:
        called_with = sys.argv[1:] if arguments is None else arguments
        about = {
            "environment": environment(),
            "where": f"{where()}, {options.samples} samples",
            # the working folder: the code may have been laid out elsewhere
            "runs": [{"commit": revision(Path.cwd()), "arguments": called_with}],
        }
        print(about["where"], flush=True)
        with _nothing_compiled():
            results = _run(options, about)
    if options.json is not None:
        _write(options.json, about, results)
    if options.picture is not None:
        from .peers_picture import picture

        picture(about["where"], results, BOUND, options.picture)


def _run(options: argparse.Namespace, about: dict[str, Any]) -> list[Result]:
    results: list[Result] = []
    left_out = "--smoke or --no-compile leaves it out" if options.no_compile else None
    for name in options.workloads:
        workload = _workload(name, options)
        networks, not_compiled = compiled(workload, left_out)
        for steps in options.steps:
            every = list(entrants(workload, steps, options.samples, networks, not_compiled))
            found: list[Result] = []
            for found in measured(name, workload, steps, options.samples, every):
                if options.json is not None:  # after each round, so that a run cut short leaves what it has
                    _write(options.json, about, results + found)
            results += found
            print(*table(found), sep="\n", flush=True)
    return results


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """torch.compile begins with an empty cache: it would take what an earlier run has compiled from disk."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    # compile workers may still write into it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ[name] = cache
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _read(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Result]]:
    """Of several files that were written on one machine: environment, where, runs, and all results."""
    saved = [json.loads(path.read_text()) for path in paths]
    headings = {each["where"] for each in saved}
    if len(headings) > 1:
        raise SystemExit(
            f"The files were written in different places: {'; '.join(sorted(headings))}. Their times cannot stand in "
            "one table. Read them one at a time."
        )
    runs = [run for each in saved for run in each.get("runs", [])]
    about = {"environment": saved[0]["environment"], "where": headings.pop(), "runs": runs}
    return about, [Result(**each) for one in saved for each in one["results"]]


def _write(path: Path, about: dict[str, Any], results: Sequence[Result]) -> None:
    whole = {**about, "bound": BOUND, "results": [asdict(each) for each in results]}
    path.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
