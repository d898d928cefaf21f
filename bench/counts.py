"""What every method does, in counts that are gated exactly: tests/test_counts.py holds them to a committed file.

    python -m bench.counts             # the table
    python -m bench.counts --check     # what differs from bench/results/counts.json; exits 1 if anything does
    python -m bench.counts --write     # the file anew, when a difference was meant

Real pipelines with their real networks, run eagerly on the CPU, 12 steps, the methods as `fixed` has them. Of a call:
waves, rows, rows of the widest wave, and what is done from one network call to the next, all of it together, and "a
wave": in the middle of all waves, put in order. What each count is stands in `dispatched`.

What is dispatched for an operation is torch's own affair: under another minor version than the file's, only waves, rows
and the bytes that `wave_update` moves are compared.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import srds_fast
from srds_fast import zoo
from srds_fast.cli.table import Table
from tests import tiny

from .committed import FILE, Found, comparable, differences, explained, read, write
from .dispatched import NAMES, Counts, Dispatched
from .fixed import methods

STEPS = 12
_TEXT = {"prompt": "a cat", "output_type": "latent", "height": 16, "width": 16}
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "digits, DDIM": (lambda: zoo.load("digits"), {"prompt": "a seven", "output_type": "latent"}),
    "SDXL, Euler": (tiny.stable_diffusion_xl, _TEXT),
    "Flux, flow": (tiny.flux, {**_TEXT, "max_sequence_length": 16}),
}


@contextmanager
def _turns(network: Any, dispatched: Dispatched) -> Iterator[list[Counts]]:
    """What is counted from each return of a network to its next call."""
    turns: list[Counts] = []
    returned: Counts | None = None
    forward = network.forward

    @functools.wraps(forward)
    def between(*args: Any, **kwargs: Any) -> Any:
        nonlocal returned
        if returned is not None:
            turns.append(dispatched.counts - returned)
        with dispatched.unseen():
            output = forward(*args, **kwargs)
        returned = dispatched.counts
        return output

    network.forward = between
    try:
        yield turns
    finally:
        network.forward = forward


def counted(pipe: Any, arguments: dict[str, Any], settings: dict[str, Any]) -> dict[str, int]:
    """All counts of one method on a pipeline."""
    fast = srds_fast.compile(pipe, engine="eager", **settings)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def call() -> None:
        fast(**arguments, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))

    call()  # what is computed once and kept is made here
    with Dispatched() as dispatched, _turns(network, dispatched) as turns:
        call()
    report = fast.report
    found = {"waves": report.waves, "rows": report.rows, "peak_rows": report.peak_rows}
    whole = sum(turns, Counts()).to_dict()
    for name in NAMES:
        found[name] = whole[name]
        found[f"{name}_a_wave"] = statistics.median_low(getattr(turn, name) for turn in turns)
    return found


def measured() -> Found:
    """Pipeline -> method -> counts."""
    found: Found = {}
    for name, (make, arguments) in PIPELINES.items():
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        found[name] = {method: counted(pipe, arguments, settings) for method, settings in methods(STEPS).items()}
    return found


def show(found: Found) -> None:
    """One line for each method; what is between two network calls is that of a wave."""
    shown = ("waves", "rows", "peak_rows", *(f"{name}_a_wave" for name in NAMES))
    headings = [name.removesuffix("_a_wave").replace("_", " ") for name in shown]
    table = Table([("", -32), *((heading, 0) for heading in headings)])
    print(table.heading())
    for pipeline, by_method in found.items():
        for method, counts in by_method.items():
            print(table.line(f"{pipeline}, {method}", *(counts[name] for name in shown)))


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--write", action="store_true", help="write the file anew")
    does.add_argument("--check", action="store_true", help="exit with 1 if anything differs from it")
    parser.add_argument("--file", type=Path, default=FILE, help="the file to write or to check, %(default)s")
    options = parser.parse_args(arguments)
    found = measured()
    if options.write:
        write(found, options.file)
        return
    if not options.check:
        show(found)
        return
    version, before = read(options.file)
    only = comparable(version)
    if only is not None:
        print(f"The file is of torch {version}, this is {torch.__version__}: only {', '.join(only)} are compared.")
    lines = differences(before, found, only)
    if lines:
        sys.exit(explained(lines))
    print("No count differs.")


if __name__ == "__main__":
    main()
