"""c(rows): the time of one batched network call by its rows, the curve that every plan is priced by.

    python -m bench.speed.rows                                  # every network, rows 1 to 32, eager and replayed
    python -m bench.speed.rows --networks digits policy --rows 1 2 4
    python -m bench.speed.rows --json rows.json --picture rows.png

Where c(rows) / c(1) stays near 1 rows are free and parallel-in-time wins; where it grows as the rows do, one row keeps
the device busy. Under guidance a row is two entries of the batch. A curve ends with the first call that takes longer
than two seconds, or that does not fit into memory. On a CUDA device times are medians by events; on a CPU nothing is
replayed, the networks are tiny, and the figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.command import parser, writable, write
from bench.pictures import rows_picture
from bench.workloads.networks import SMALL
from bench.workloads.samplers import WORKLOADS

from .timing import called_seconds, device_seconds

ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)
# seconds: calls of more rows than one that takes so long would change no plan
LONGEST = 2.0


@torch.no_grad()
def curve(name: str, rows: Sequence[int], longest: float = LONGEST) -> dict[str, Any]:
    """Seconds of a call from few rows to many: eager, and replayed from a graph (None on a CPU)."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]()
    seen, eager, replayed = [], [], []
    for each in sorted(rows):
        try:
            call = workload.network_call(each)
            seconds = called_seconds(call, calls=1)
            calls = max(1, min(20, int(0.3 / seconds)))
            eager.append(seconds if calls == 1 else called_seconds(call, calls))
            replayed.append(device_seconds(call, replays=calls, calls=1, warm_up=1))
        except torch.cuda.OutOfMemoryError:
            break
        seen.append(each)
        if eager[-1] > longest:
            break
    return {
        "network": name,
        "parameters": workload.parameters,
        "entries_per_row": workload.entries,
        "dtype": str(next(workload.network.parameters()).dtype),
        "rows": seen,
        "eager": eager[: len(seen)],
        "replayed": None if SMALL else replayed,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A curve in words: milliseconds of one row, and how many times that more rows take."""
    yield f"{found['network']}, {found['parameters'] / 1e6:.1f} M parameters, {found['dtype']}"
    for how in ("eager", "replayed"):
        if found[how]:
            first = found[how][0]
            times = (f"{n}: {s / first:.2f}" for n, s in zip(found["rows"], found[how], strict=True) if n > 1)
            yield f"  {how:9}{1e3 * first:8.3f} ms a row; times that, {'  '.join(times)}"


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.rows", __doc__)
    found.add_argument("--networks", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    found.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    found.add_argument("--picture", type=writable, help="PNG: c(rows) / c(1) against rows")
    options = found.parse_args(arguments)
    if any(each < 1 for each in options.rows):
        found.error(f"--rows has {min(options.rows)}. A call has at least one row. Pass 1 or more.")
    gpu = None if SMALL else torch.cuda.get_device_name()
    curves: list[dict[str, Any]] = []
    for name in options.networks:
        curves.append(curve(name, options.rows))
        print(*lines(curves[-1]), sep="\n", flush=True)
        write(options.json, gpu=gpu, curves=curves)
        if options.picture is not None:
            where = gpu or "tiny networks on a CPU: the figures mean nothing"
            rows_picture(f"{where}, torch {torch.__version__}", curves, options.picture)


if __name__ == "__main__":
    main()
