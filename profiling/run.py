"""A few calls of a workload, to be looked at by a profiler.

    python -m profiling.run digits
    python -m profiling.run sd15 --engine graph --steps 25 --calls 5
    python -m profiling.run digits --trace trace.json      # a Chrome trace, without any profiler

What a call needs once is done before: weights, compiled kernels, caches. Only then cudaProfilerStart is called where
there is a CUDA device, and the ranges are switched on. Graphs are made anew first, in the captured part: the profiler
then sees in which wave each of their nodes was recorded. A profiler of kernels has no use for that (--only-replays:
they are made before). `nsys.sh` and `ncu.sh` run this command. On a CPU the networks of all workloads but digits are
small.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

import srds_fast
from bench.command import parser, writable, write
from bench.speed.timing import timed
from bench.workloads.networks import SMALL
from bench.workloads.samplers import WORKLOADS
from srds_fast.errors import SrdsFastError

ENGINES = ("eager", "graph", "network-graphs")


def main(arguments: list[str] | None = None) -> None:
    found = parser("profiling.run", __doc__)
    found.add_argument("workload", choices=WORKLOADS)
    found.add_argument("--method", default="srds", help="of srds_fast.compile (default: srds)")
    found.add_argument("--engine", choices=ENGINES, default="eager")
    found.add_argument("--overlap", choices=("batch", "streams"), help="of coarse rows with fine ones")
    found.add_argument("--steps", type=int, default=50)
    found.add_argument("--calls", type=int, default=3, help="captured, beside the one that records graphs")
    found.add_argument("--trace", type=writable, metavar="FILE.json", help="write a Chrome trace as well")
    found.add_argument("--only-replays", action="store_true", help="make graphs before what is captured")
    options = found.parse_args(arguments)
    if options.calls < 1 or options.steps < 1:
        found.error(f"--calls {options.calls} and --steps {options.steps}: there is something to see from 1 on")
    if SMALL:
        print("There is no CUDA device: networks run on the CPU, and all but that of digits are small.")
        torch.set_num_threads(1)  # of which they have no use for more
    torch.manual_seed(0)
    workload = WORKLOADS[options.workload]()
    settings: dict[str, Any] = {"method": options.method, "engine": options.engine}
    if options.overlap is not None:
        settings["overlap"] = options.overlap
    try:
        warm = workload.ours(options.steps, settings)
    except SrdsFastError as error:
        found.error(str(error))
    warm.call()
    warm.call()
    # graphs belong to a loop: those of this one are thrown away
    anew = options.engine != "eager" and not options.only_replays
    loop = workload.ours(options.steps, settings) if anew else warm
    with nullcontext() if SMALL else torch.cuda.profiler.profile(), srds_fast.profile(options.trace):
        # the device is waited for before and after
        timed(lambda: [loop.call() for _ in range(options.calls + anew)])
    print(loop.report())
    write(options.json, workload=options.workload, report=loop.report().to_dict(), widths=loop.widths())


if __name__ == "__main__":
    main()
