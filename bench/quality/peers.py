"""Peers side by side: stock loops, diffusers' ParaDiGMS and every method of ours, as fast as each is at one quality.

    python -m bench.quality.peers                                       # digits and policy, 25, 50 and 100 steps
    python -m bench.quality.peers --workloads digits --steps 50 --json peers.json --picture peers.png

All are timed in one process on the same network, one sample a call, in turn; every round has another prompt (or
observation) and other noise. Nothing is encoded or decoded. "x first": times faster than the stock loop of diffusers,
medians; "x sequential": than our sequential loop (on a GPU the faster of its two engines); in brackets the quartiles.

"p95": the difference to the stock loop's samples: of each sample the mean absolute one in grey levels (1 / 127.5), of
these the 95th percentile. "within": the setting in the last column is the method's cheapest that keeps p95 within half
a grey level for these samples; nobody knows it beforehand. "stops itself" finds it on the way, "auto" has its default
tolerance. diffusers' ParaDiGMS has the tolerance that was found for ours with the same window. It always ends at an
alpha of one, so it is compared with a stock loop whose scheduler does.

torch.compile is of the network, in the stock loop, with nothing compiled before (but "reduce-overhead" finds what
"default" has compiled); what its first two calls take beyond later ones is shown apart. The policy is trained here in a
minute. Workloads with random weights run fixed numbers of iterations, and their differences would mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from bench.command import parser, revision, writable, write, written
from bench.pictures import latency_picture
from bench.runner import Row, measured, show
from bench.workloads import demonstrations
from bench.workloads.networks import DEVICE
from bench.workloads.samplers import SAMPLES, WORKLOADS, policy

from .entrants import BOUND, entrants

STEPS = (25, 50, 100)
# training steps of all pipelines' schedulers
MOST_STEPS = 1000


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.quality.peers", __doc__)
    found.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=["digits", "policy"])
    found.add_argument("--steps", nargs="*", type=int, default=list(STEPS), help="policy: 100 at most")
    found.add_argument("--samples", type=int, default=SAMPLES, help=f"rounds, each another sample; at most {SAMPLES}")
    found.add_argument("--training-steps", type=int, default=demonstrations.TRAINING_STEPS, help="of policy")
    found.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute each")
    found.add_argument("--picture", type=writable, help="PNG: latency against difference")
    found.add_argument("--from", dest="saved", type=written, help="JSON of this command: nothing is run")
    found.add_argument("--smoke", action="store_true", help="a tiny size: 5 steps, 2 samples, nothing compiled")
    options = found.parse_args(arguments)
    if options.smoke:
        options.steps, options.samples, options.training_steps, options.no_compile = [5], 2, 3, True
    if not 2 <= options.samples <= SAMPLES:
        found.error(f"--samples is {options.samples}. Quartiles need 2, a workload has {SAMPLES}. Pass 2 to {SAMPLES}.")
    for steps in options.steps:
        for name in options.workloads:
            most = demonstrations.scheduler().config.num_train_timesteps if name == "policy" else MOST_STEPS
            if not 1 <= steps <= most:
                found.error(f"--steps is {steps}. The scheduler of {name} has {most}. Pass 1 to {most}.")
    if options.saved is not None:
        run, results = options.saved, options.saved["results"]
        print(run["where"])
        show(results)
    else:
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU ({platform.machine()})"
        run = {
            "where": f"{device}, {torch.get_num_threads()} CPU thread, {options.samples} samples",
            # of the working folder: the code may have been laid out elsewhere
            "runs": [{"commit": revision(Path.cwd()), "arguments": sys.argv[1:] if arguments is None else arguments}],
            "bound": BOUND,
        }
        print(run["where"], flush=True)
        results = _run(options, run)
    if options.picture is not None:
        latency_picture(run["where"], results, BOUND, options.picture)


def _run(options: argparse.Namespace, run: dict[str, Any]) -> list[Row]:
    results: list[Row] = []
    for name in options.workloads:
        torch.manual_seed(0)
        trained = name == "policy"
        workload = policy(demonstrations.train(options.training_steps)) if trained else WORKLOADS[name]()
        # with an empty cache: torch.compile would read from disk what an earlier run has compiled
        with nullcontext() if options.no_compile else fresh_cache():
            for steps in options.steps:
                every = list(entrants(workload, steps, options.samples, not options.no_compile))
                found: list[Row] = []
                for found in measured(name, workload, steps, options.samples, every):
                    write(options.json, **run, results=results + found)
                results += found
                show(found)
    return results


if __name__ == "__main__":
    main()
