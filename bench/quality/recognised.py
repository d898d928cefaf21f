"""The bundled digits: are those that a method draws recognised as often as the sequential sampler's?

    python -m bench.quality.recognised --json bench/results/digits-ddpm.json

DDPM adds noise in every step, so `method="speculative"` draws other digits than the sequential sampler, which are to
have the same law. A support vector machine, trained on real digits, reads every image; it is recognised where the
machine finds the digit that the prompt asks for. Without guidance some are not, so the share can go down and up.

Intervals are of 95 %: Wilson's of a share, and "more", Newcombe's of a share less that of the first method, in points.
Batches of all methods have the same seeds. The file is written after every batch.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

import srds_fast
from bench.command import parser, revision, write
from bench.runner import SEQUENTIAL
from bench.speed.timing import timed
from bench.workloads.networks import DEVICE
from srds_fast import zoo
from srds_fast.cli.output import show_table
from srds_fast.methods import METHODS
from srds_fast.zoo.train_digits import recognised, sample

from .intervals import apart, percent, wilson

DIGITS = 10
Row = dict[str, Any]


def drawn(fast: Any, row: Row, options: Any, seed: int) -> None:
    """Draw one more batch, and count what is recognised."""
    seconds, images = timed(lambda: sample(fast, options.at_once, seed, options.steps, options.guidance))
    count = DIGITS * options.at_once
    row["images"] += count
    row["recognised"] += round(count * recognised(images))
    row["lower"], row["upper"] = wilson(row["recognised"], row["images"])
    row["waves"].append(fast.report.waves)
    row["rows"].append(fast.report.rows)
    row["seconds"].append(seconds)


def show(rows: list[Row]) -> None:
    first, shown = rows[0], []
    for row in rows:
        counts = ((row[name], first[name]) for name in ("recognised", "images"))
        shown.append(
            {
                "method": row["method"],
                "recognised": f"{row['recognised']} of {row['images']}",
                "95 %": percent((row["lower"], row["upper"])),
                "more": None if row is first else percent(apart(*counts), signed=True),
                "waves": f"{statistics.mean(row['waves']):.1f}",
                "s a batch": f"{statistics.median(row['seconds']):.1f}",
            }
        )
    show_table(shown, text=("method", "95 %", "more"))


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.quality.recognised", __doc__)
    found.add_argument("--steps", type=int, default=100)
    found.add_argument("--guidance", type=float, default=1.0)
    found.add_argument("--images", type=int, default=1000, help="of each method, at least")
    found.add_argument("--at-once", type=int, default=5, help="images of each digit in a batch")
    found.add_argument("--methods", nargs="+", choices=METHODS, default=[SEQUENTIAL, "speculative"], metavar="METHOD")
    options = found.parse_args(arguments)
    pipe: Any = zoo.load("digits").to(DEVICE)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    ways = {method: srds_fast.compile(pipe, method=method) for method in options.methods}
    rows: dict[str, Row] = {
        method: {"method": method, "images": 0, "recognised": 0, "waves": [], "rows": [], "seconds": []}
        for method in ways
    }
    about = {"commit": revision(Path.cwd()), "scheduler": "DDPM", "steps": options.steps}
    about |= {"guidance": options.guidance, "device": str(DEVICE), "threads": torch.get_num_threads()}
    for seed in range(-(-options.images // (DIGITS * options.at_once))):
        for method, fast in ways.items():
            drawn(fast, rows[method], options, seed)
        write(options.json, **about, results=list(rows.values()))
    print(f"digits, DDPM, N = {options.steps}, guidance {options.guidance:g}")
    show(list(rows.values()))


if __name__ == "__main__":
    main()
