"""Quality against seconds: this package, and what people use today to make one image sooner.

    python -m bench.quality.tradeoff --json tradeoff.json --picture tradeoff.png
    python -m bench.quality.tradeoff --from tradeoff.json --picture tradeoff.png     # drawn anew, nothing is run

On the bundled digits pipeline, one image a call, guidance 5. The question: someone samples with 50 steps of DDIM and
wants that image sooner. How near to it does each way come, and in how many seconds? The ways: fewer steps of DDIM;
another sampler that needs fewer steps (DPM-Solver++ 2M); torch.compile of the network, with 50 and fewer steps; this
package, as `compile(pipe)` runs after a warm-up, and SRDS with a fixed number of iterations.

The difference is the one to the 50-step DDIM image from the same noise, not a rating of how good an image looks: of
each image the mean absolute difference in grey levels, before rounding to 8 bits, and of these the mean. A sampler of
fewer steps ends in another image, which may look as good; what it is not is the same one. All are called in turn in one
process, each round with another prompt and other noise. The times hold neither encoding nor decoding nor compiling.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

import srds_fast
from bench.command import parser, revision, writable, write, written
from bench.pictures import tradeoff_picture
from bench.runner import STOCK, Entrant, Row, measured
from bench.workloads.networks import DEVICE
from bench.workloads.samplers import SAMPLES, Loop, PipelineWorkload, digits, one_by_one
from srds_fast.cli.measure import grey_levels
from srds_fast.cli.output import show_table

from .contestants import CONTESTANTS, SRDS

STEPS = 50
# of DDIM, of DPM-Solver++ 2M, and of DDIM with a compiled network
FEWER = (10, 15, 25, 35)
FEWER_2M = (10, 15, 25, 50)
COMPILED = (25, 50)
ITERATIONS = (0, 1, 2)
DDIM, SECOND, INDUCTOR = "fewer steps of DDIM", "DPM-Solver++ 2M", "DDIM, torch.compile"
FIXED, AUTO = "srds_fast, SRDS iterations", "srds_fast, auto"


def entrants(workload: PipelineWorkload, steps: int, compiles: bool) -> Iterator[tuple[str, str, Entrant]]:
    """(its line in the picture, its setting, who is timed), the loop that all are compared with first."""
    yield DDIM, f"{steps} steps", Entrant(STOCK, partial(workload.stock, steps))
    for fewer in FEWER:
        yield DDIM, f"{fewer} steps", Entrant(f"{DDIM}, {fewer}", partial(workload.stock, fewer))
    other = copy.copy(workload.pipe)
    other.scheduler = DPMSolverMultistepScheduler.from_config(workload.pipe.scheduler.config)
    for fewer in FEWER_2M:
        yield SECOND, f"{fewer} steps", Entrant(f"{SECOND}, {fewer}", partial(_stock_of, workload, other, fewer))
    yield AUTO, "auto", Entrant(AUTO, partial(_warmed, workload, steps))
    for iteration in ITERATIONS:
        plan = CONTESTANTS[SRDS].plan(steps, iteration=iteration)
        name = f"{FIXED}, {iteration}"
        yield FIXED, f"iteration {iteration}", Entrant(name, partial(workload.ours, steps, {"plan": plan}))
    if compiles:
        network = torch.compile(workload.network, mode="default", dynamic=False)
        for number in COMPILED:
            make = partial(workload.stock, number, network)
            yield INDUCTOR, f"{number} steps", Entrant(f"{INDUCTOR}, {number}", make, compiles=True)


def _stock_of(workload: PipelineWorkload, pipe: Any, steps: int) -> Loop:
    return one_by_one(partial(workload.called, pipe, steps), "stock", steps)


def _warmed(workload: PipelineWorkload, steps: int) -> Loop:
    """A loop as a user makes it: compiled, and warmed up before it serves."""
    fast = srds_fast.compile(workload.pipe)
    fast.warmup(**workload.arguments(steps))
    return Loop(partial(workload.called, fast, steps), lambda: fast.report, list)


@torch.no_grad()
def images_of(pipe: Any, latents: Tensor) -> Tensor:
    """Latents decoded to [n, channels, height, width] in [0, 1]."""
    decoded = pipe.vae.decode(latents.to(pipe.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    found: Tensor = pipe.image_processor.postprocess(decoded, output_type="pt")
    return found


def run(steps: int, samples: int, compiles: bool) -> Iterator[list[dict[str, Any]]]:
    """Time everyone; a row for each: line, setting, seconds (median), lower and upper quartile, grey_levels.

    Yields:
        All rows so far, after every round.
    """
    workload = digits()
    every = list(entrants(workload, steps, compiles))
    for rows in measured("digits", workload, steps, samples, [entrant for _, _, entrant in every]):
        yield _compared(workload, every, {row["peer"]: row for row in rows})


def _compared(
    workload: PipelineWorkload, every: Sequence[tuple[str, str, Entrant]], by_name: dict[str, Row]
) -> list[dict[str, Any]]:
    reference = every[0][2].answers
    found = []
    for line, setting, entrant in every:
        row = by_name[entrant.name]
        each: dict[str, Any] = {"line": line, "setting": setting, "left_out": row["left_out"]}
        if row["left_out"] is None:
            count = len(entrant.answers)  # those that compile come later, and have made fewer calls
            expected = images_of(workload.pipe, torch.cat(reference[:count]))
            off = grey_levels(images_of(workload.pipe, torch.cat(entrant.answers)), expected)
            names = ("seconds", "lower", "upper", "waves", "rows", "method")
            each |= {"grey_levels": off, **{name: row[name] for name in names}}
        found.append(each)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print everyone who ran, the fastest first, and who did not."""
    ran = [row for row in rows if row["left_out"] is None]
    cells = [
        {
            "ms": f"{1e3 * row['seconds']:.0f} ({1e3 * row['lower']:.0f}..{1e3 * row['upper']:.0f})",
            "grey levels": f"{row['grey_levels']['mean']:.3f}",
            "p95": f"{row['grey_levels']['p95']:.3f}",
            "waves": f"{row['waves']:.1f}",
            "way": row["line"],
            "at": row["setting"] + (f", ran {row['method']}" if row["line"] == AUTO else ""),
        }
        for row in sorted(ran, key=lambda row: row["seconds"])
    ]
    show_table(cells, text=("way", "at"), title="to the image of the whole DDIM loop; times: median and quartiles")
    for row in rows:
        if row["left_out"] is not None:
            print(f"left out: {row['line']}, {row['setting']}: {row['left_out']}")


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    told = parser("bench.quality.tradeoff", __doc__)
    told.add_argument("--samples", type=int, default=SAMPLES, help=f"rounds, each another sample; at most {SAMPLES}")
    told.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    told.add_argument("--picture", type=writable, help="PNG: difference against seconds")
    told.add_argument("--from", dest="saved", type=written, help="JSON of this command: nothing is run")
    told.add_argument("--smoke", action="store_true", help="a tiny size: 2 samples, nothing compiled")
    options = told.parse_args(arguments)
    document = options.saved if options.saved is not None else _measured(options, arguments)
    print(document["where"])
    show(document["results"])
    if options.picture is not None:
        tradeoff_picture(document, options.picture)


def _measured(options: argparse.Namespace, arguments: list[str] | None) -> dict[str, Any]:
    if options.smoke:
        options.samples, options.no_compile = 2, True
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU ({platform.machine()})"
    document: dict[str, Any] = {
        "where": f"{device}, {torch.get_num_threads()} thread, {options.samples} images",
        "commit": revision(Path.cwd()),
        "arguments": sys.argv[1:] if arguments is None else arguments,
        "steps": STEPS,
        "samples": options.samples,
    }
    for document["results"] in run(STEPS, options.samples, not options.no_compile):
        write(options.json, **document)
    return document


if __name__ == "__main__":
    main()
