"""c(rows): the time of one batched network call by its rows, the curve that every plan is priced by.

    python -m bench.speed.rows                                  # every network, rows 1 to 32, eager and replayed
    python -m bench.speed.rows --networks digits policy --rows 1 2 4
    python -m bench.speed.rows --json rows.json --picture rows.png
    python -m bench.speed.rows --from rows.json --picture rows.png   # or from gpu_check.json; nothing is run

Where c(rows) / c(1) stays near 1 rows are free and parallel-in-time wins; where it grows as the rows do, one row keeps
the device busy. Under guidance a row is two entries of the batch. A curve ends with the first call that takes longer
than --longest, or that does not fit into memory. On a CUDA device times are medians by events; on a CPU the networks
are small, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.command import environment, parser, writable, write
from bench.workloads.networks import DEVICE, NETWORKS, SMALL, Network

from . import timing

ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)
# seconds: calls of more rows than one that takes so long would change no plan
LONGEST = 2.0


class Measured(NamedTuple):
    """Seconds of a call of so many rows: eager, and replayed from a graph (None on a CPU)."""

    rows: int
    eager: float
    replayed: float | None


@torch.no_grad()
def points(network: Network, rows: Sequence[int], longest: float) -> Iterator[Measured]:
    """From few rows to many, until a call takes longer than so many seconds or does not fit into memory."""
    for each in sorted(rows):
        try:
            call = network.call(each)
            once = timing.called_seconds(call, DEVICE, calls=1, warm_up=1)
            calls = 2 if SMALL else max(1, min(20, int(0.3 / once)))
            eager = timing.called_seconds(call, DEVICE, calls, warm_up=0)
            replayed = None if SMALL else timing.gpu_seconds(call, replays=calls, calls=1, warm_up=1)
        except torch.cuda.OutOfMemoryError:
            return
        yield Measured(each, eager, replayed)
        if eager > longest:
            return


def curve(name: str, rows: Sequence[int], longest: float = LONGEST) -> dict[str, Any]:
    """All points of a network."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    found = list(points(network, rows, longest))
    return {
        "network": name,
        "parameters": network.parameters,
        "entries_per_row": network.entries,
        "dtype": str(network.dtype),
        "rows": [each.rows for each in found],
        "eager": [each.eager for each in found],
        "replayed": None if SMALL else [each.replayed for each in found],
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A curve in words: milliseconds of one row, and how many times that more rows take."""
    yield f"{found['network']}, {found['parameters'] / 1e6:.1f} M parameters, {found['dtype']}"
    for how in ("eager", "replayed"):
        if found[how]:
            first = found[how][0]
            times = (f"{n}: {s / first:.2f}" for n, s in zip(found["rows"], found[how], strict=True) if n > 1)
            yield f"  {how:9}{1e3 * first:8.3f} ms a row; times that, {'  '.join(times)}"


def read(path: Path) -> dict[str, Any]:
    """What this command has written, alone or as a part of gpu_check.json.

    Raises:
        SystemExit: the file holds no curves.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        whole: dict[str, Any] = found["parts"]["rows"]["result"] if "parts" in found else found
        assert whole["curves"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as why:
        raise SystemExit(
            f"{path} holds no curves ({type(why).__name__}). Name a file that --json has written, or the "
            "gpu_check.json of a run with the part rows."
        ) from None
    return whole


def _draw(whole: dict[str, Any], path: Path) -> None:
    from .rows_picture import picture

    gpu = whole.get("gpu") or "small networks on a CPU: the figures mean nothing"
    picture(f"{gpu}, torch {whole['environment']['torch']}", whole["curves"], path)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    found = parser("bench.speed.rows", __doc__)
    found.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    found.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    found.add_argument("--longest", type=float, default=LONGEST, help="seconds of a call at which a curve ends")
    found.add_argument("--json", type=writable)
    found.add_argument("--picture", type=writable, help="PNG: c(rows) / c(1) against rows")
    found.add_argument("--from", dest="saved", type=Path, help="JSON of this command, or of gpu_check: runs nothing")
    options = found.parse_args(arguments)
    if options.picture is not None and find_spec("matplotlib") is None:
        found.error("--picture needs matplotlib, which is not installed. Install the extra `plot`.")
    if options.saved is not None and options.picture is None:
        found.error("--from draws what was measured. Name the picture: --picture rows.png")
    if any(each < 1 for each in options.rows):
        found.error(f"--rows has {min(options.rows)}. A call has at least one row. Pass 1 or more.")
    return options


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    options = _options(arguments)
    if options.saved is not None:
        _draw(read(options.saved), options.picture)
        return
    gpu = None if SMALL else torch.cuda.get_device_name()
    curves: list[dict[str, Any]] = []
    for name in options.networks:
        curves.append(curve(name, options.rows, options.longest))
        print(*lines(curves[-1]), sep="\n", flush=True)
        write(options.json, gpu=gpu, curves=curves)
        if options.picture is not None:
            _draw({"environment": environment(), "gpu": gpu, "curves": curves}, options.picture)


if __name__ == "__main__":
    main()
