"""A few calls of a workload, to be looked at by a profiler.

    python -m profiling.run digits
    python -m profiling.run sd15 --engine graph --steps 25 --calls 5
    python -m profiling.run digits --trace trace.json      # a Chrome trace, without any profiler

What a call needs once is done before: weights are there, kernels compiled, caches filled. Only then cudaProfilerStart
is called where there is a CUDA device, and the ranges are switched on. If the engine is one of graphs, they are made
anew first, in the captured part: so the profiler sees in which wave each of their nodes was recorded. A profiler of
kernels has no use for that (--only-replays: made before). `nsys.sh` and `ncu.sh` run this command. On the CPU the
networks of all workloads but digits are small.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import srds_fast
from bench.rows import SMALL
from bench.workloads import WORKLOADS
from srds_fast.errors import SrdsFastError

ENGINES = ("eager", "graph", "network-graphs")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--method", default="srds", help="of srds_fast.compile (default: srds)")
    parser.add_argument("--engine", choices=ENGINES, default="eager")
    parser.add_argument("--overlap", choices=("batch", "streams"), help="of coarse rows with fine ones")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calls", type=int, default=3, help="captured, beside the one that records graphs")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write a Chrome trace as well")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write what the last call reports of itself")
    parser.add_argument("--only-replays", action="store_true", help="make graphs before what is captured")
    options = parser.parse_args(arguments)
    if options.calls < 1 or options.steps < 1:
        parser.error(f"--calls {options.calls} and --steps {options.steps}: there is something to see from 1 on")
    for path in (options.trace, options.json):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.parent}. Make it first.")
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
        parser.error(str(error))
    warm.call()
    warm.call()
    # graphs belong to a loop: those of this one are thrown away
    anew = options.engine != "eager" and not options.only_replays
    loop = workload.ours(options.steps, settings) if anew else warm
    with _captured(options.trace):
        if loop is not warm:
            loop.call()
        for _ in range(options.calls):
            loop.call()
    found = {"workload": options.workload, "steps": options.steps, **loop.ran()._asdict(), "widths": loop.widths()}
    print("the last call:")
    for name, value in found.items():
        print(f"  {name:<11}{value}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def _captured(trace: Path | None) -> Iterator[None]:
    """The part that profilers look at."""
    if not SMALL:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    try:
        with srds_fast.profile(trace):
            yield
            if not SMALL:
                torch.cuda.synchronize()
    finally:
        if not SMALL:
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
