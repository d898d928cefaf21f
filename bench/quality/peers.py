"""Peers side by side: stock loops, diffusers' ParaDiGMS and every method of ours, as fast as each is at one quality.

    python -m bench.quality.peers                                       # digits and policy, 25, 50 and 100 steps
    python -m bench.quality.peers --workloads digits --steps 50 --json peers.json --picture peers.png
    python -m bench.quality.peers --from peers.json --picture peers.png     # the table again, nothing is run

All are timed in one process on the same network, one sample a call, in turn; every round is another prompt (or
observation) and other noise. Nothing is encoded or decoded. The first column is how many times faster than the stock
loop of diffusers the median call is, the second the same against our sequential loop (on a GPU the faster of its two
engines). In brackets behind the median milliseconds are the quartiles.

"p95" is the difference to the stock loop's samples: of each sample the mean absolute one in grey levels (1 / 127.5), of
these the 95th percentile. Where "within" says yes, the setting in the last column is the method's cheapest (iterations,
or a tolerance of its own) that keeps it within half a grey level for these samples; nobody knows it beforehand.
"stops itself" finds it on the way, "its own stop" is the test of the SRDS paper, "auto" has its default tolerance.
diffusers' ParaDiGMS always ends at an alpha of one: it is compared with a stock loop whose scheduler does.

torch.compile is of the network, in the stock loop; what its first two calls take beyond later ones is shown apart, once
for all numbers of steps, with nothing compiled before (but "reduce-overhead" finds what "default" has compiled). The
policy is trained here in a minute. Workloads with random weights run fixed numbers of iterations and show no
difference, which would mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.command import environment, parser, writable, write
from bench.revision import revision
from bench.workloads import demonstrations
from bench.workloads.networks import DEVICE, SMALL
from bench.workloads.samplers import SAMPLES, WORKLOADS, Workload, policy

from .entrants import BOUND, COMPILED, entrants
from .runner import Result, measured, table

STEPS = (25, 50, 100)
# training steps of all pipelines' schedulers
MOST_STEPS = 1000
TRAINED = ("digits", "policy")


def compiled(workload: Workload, left_out: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The network compiled in each mode, by its first call; and why not, of the others.

    Args:
        left_out: why none is.
    """
    if left_out is not None:
        return {}, dict.fromkeys(COMPILED, left_out)
    why_not = {"reduce-overhead": "it is the default with CUDA graphs, and this is a CPU"} if SMALL else {}
    modes = [mode for mode in COMPILED if mode not in why_not]
    return {mode: torch.compile(workload.network.module, mode=mode, dynamic=False) for mode in modes}, why_not


def about(arguments: Sequence[str], samples: int) -> dict[str, Any]:
    """What a run is of: device, versions, commit."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "environment": environment(),
        "where": f"{device}, {torch.get_num_threads()} CPU thread, {samples} samples",
        # of the working folder: the code may have been laid out elsewhere
        "runs": [{"commit": revision(Path.cwd()), "arguments": list(arguments)}],
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    found = parser("bench.quality.peers", __doc__)
    found.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(TRAINED))
    found.add_argument("--steps", nargs="*", type=int, default=list(STEPS), help="policy: 100 at most")
    found.add_argument("--samples", type=int, default=SAMPLES, help=f"rounds, each another sample; at most {SAMPLES}")
    found.add_argument("--weights", type=Path, help="of policy: kept there, trained only if the file does not exist")
    found.add_argument("--training-steps", type=int, default=demonstrations.TRAINING_STEPS, help="of policy")
    found.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute each")
    found.add_argument("--json", type=writable)
    found.add_argument("--picture", type=writable, help="PNG: latency against difference")
    found.add_argument("--from", dest="saved", nargs="*", type=_saved, default=[], help="JSON of this command")
    found.add_argument("--smoke", action="store_true", help="a tiny size: 5 steps, 2 samples, nothing compiled")
    options = found.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples, options.training_steps, options.no_compile = [5], 2, 3, True
    if not 2 <= options.samples <= SAMPLES:
        found.error(
            f"--samples is {options.samples}. A workload has {SAMPLES}, and quartiles need 2. Pass 2 to {SAMPLES}."
        )
    for steps in options.steps:
        for name in options.workloads:
            most = demonstrations.scheduler().config.num_train_timesteps if name == "policy" else MOST_STEPS
            if not 1 <= steps <= most:
                found.error(f"--steps is {steps}. The scheduler of {name} has {most}. Pass 1 to {most}.")
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
        run, results = _read(options.saved)
        print(run["where"], *table(results), sep="\n")
    else:
        run = about(sys.argv[1:] if arguments is None else arguments, options.samples)
        print(run["where"], flush=True)
        with _nothing_compiled():
            results = _run(options, run)
    _write(options.json, run, results)
    if options.picture is not None:
        from .pictures import latency_picture

        latency_picture(run["where"], results, BOUND, options.picture)


def _run(options: argparse.Namespace, run: dict[str, Any]) -> list[Result]:
    results: list[Result] = []
    left_out = "--smoke or --no-compile leaves it out" if options.no_compile else None
    for name in options.workloads:
        torch.manual_seed(0)
        if name == "policy":
            workload: Workload = policy(demonstrations.trained(options.weights, options.training_steps))
        else:
            workload = WORKLOADS[name]()
        networks, not_compiled = compiled(workload, left_out)
        for steps in options.steps:
            every = list(entrants(workload, steps, options.samples, networks, not_compiled))
            found: list[Result] = []
            for found in measured(name, workload, steps, options.samples, every):
                _write(options.json, run, results + found)
            results += found
            print(*table(found), sep="\n", flush=True)
    return results


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """torch.compile begins with an empty cache: it would read from disk what an earlier run has compiled."""
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
    """What a run is of, and all results, of several files that were written on one machine."""
    saved = [json.loads(path.read_text()) for path in paths]
    headings = {each["where"] for each in saved}
    if len(headings) > 1:
        raise SystemExit(
            f"The files were written in different places: {'; '.join(sorted(headings))}. Their times cannot stand in "
            "one table. Read them one at a time."
        )
    runs = [run for each in saved for run in each.get("runs", [])]
    of_all = {"environment": saved[0]["environment"], "where": headings.pop(), "runs": runs}
    return of_all, [Result(**each) for one in saved for each in one["results"]]


def _write(path: Path | None, run: dict[str, Any], results: Sequence[Result]) -> None:
    write(path, **run, bound=BOUND, results=[asdict(each) for each in results])


if __name__ == "__main__":
    main()
