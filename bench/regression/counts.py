"""What every method does, in counts that are gated: tests/bench/test_counts.py compares them with a committed file.

    python -m bench.regression.counts             # the table
    python -m bench.regression.counts --check     # differences from bench/results/counts.json; exits 1 if there are any
    python -m bench.regression.counts --write     # writes the file anew, when a difference was meant

Pipelines run eagerly on the CPU, 12 steps, the methods as `fixed_methods` has them. Of a call: waves, rows, rows of the
widest wave, and what is done from the return of one network call to the next call: all of it together, and "a wave",
the lower median. `dispatched` says what each count is.

How many operations torch dispatches depends on its version: under another minor version than the file's, only waves,
rows and the bytes that `wave_update` moves are compared.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import srds_fast
from bench.command import parser
from bench.speed.host_time import Turns
from bench.workloads import pipelines
from bench.workloads.methods import fixed_methods
from srds_fast import zoo
from srds_fast.cli.output import show_table

from .dispatched import NAMES, Dispatched

FILE = Path(__file__).parents[1] / "results" / "counts.json"
# decided by programs and tables alone
ALWAYS = ("waves", "rows", "peak_rows", "bytes_moved", "bytes_moved_a_wave")
REWRITE = "python -m bench.regression.counts --write"
STEPS = 12
# 2.13.0+cpu -> 2.13
MINOR = ".".join(torch.__version__.split(".")[:2])
Found = dict[str, dict[str, dict[str, int]]]
"""pipeline -> method -> count -> number"""


def _with_text(pipe: Any, size: int) -> tuple[Any, dict[str, Any]]:
    return pipe, {**pipelines.embedded_text(pipe), "output_type": "latent", "height": size, "width": size}


# latents of 8 x 8: of 4 channels, but for Flux, whose 64 tokens are of 2 x 2 of them
PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "digits, DDIM": lambda: (zoo.load("digits"), {"prompt": "a seven", "output_type": "latent"}),
    "SDXL, Euler": lambda: _with_text(pipelines.stable_diffusion_xl(), 64),
    "Flux, flow": lambda: _with_text(pipelines.flux(), 128),
}


def measured(names: tuple[str, ...] = tuple(PIPELINES)) -> Found:
    """The counts of these pipelines."""
    found: Found = {}
    for name in names:
        pipe, arguments = PIPELINES[name]()
        pipe.set_progress_bar_config(disable=True)
        turns = Turns(pipelines.network_of(pipe), int)
        found[name] = {
            method: _counted(pipe, turns, arguments, settings) for method, settings in fixed_methods(STEPS).items()
        }
    return found


def _counted(pipe: Any, turns: Turns, arguments: dict[str, Any], settings: dict[str, Any]) -> dict[str, int]:
    fast = srds_fast.compile(pipe, engine="eager", **settings)

    def call() -> list[tuple[Any, Any]]:
        fast(**arguments, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        return turns.take()

    call()  # fills caches
    with Dispatched() as dispatched:
        turns.clock = dispatched.around_calls
        waves = [after - before for before, after in call()]
    report = fast.report
    found = {"waves": report.waves, "rows": report.rows, "peak_rows": report.peak_rows}
    for name in NAMES:
        each = [wave[name] for wave in waves]
        found[name], found[f"{name}_a_wave"] = sum(each), statistics.median_low(each)
    return found


def read() -> tuple[Found, tuple[str, ...] | None]:
    """The counts of the file, and the names of those that can be compared with the torch here; None: all."""
    try:
        written = json.loads(FILE.read_text())
        return written["counts"], None if written["torch"] == MINOR else ALWAYS
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{FILE} cannot be read: {error!r}. It holds the counts. Write it with `{REWRITE}`.") from None


def differences(before: Found, after: Found, only: tuple[str, ...] | None = None) -> list[str]:
    """A line for every count (or: of those in `only`) that has changed, is new or is gone."""
    old, new = (
        {
            (pipeline, method, name): number
            for pipeline, methods in found.items()
            for method, counts in methods.items()
            for name, number in counts.items()
            if only is None or name in only
        }
        for found in (before, after)
    )
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ["{}, {}: {} was {}, is {}".format(*key, old.get(key), new.get(key)) for key in changed]


def explained(lines: list[str]) -> str:
    """Differences as an error."""
    advice = f"They are part of what a call costs. If that was meant, run `{REWRITE}` and commit the file."
    return "\n".join([f"{len(lines)} counts are not those of {FILE.relative_to(FILE.parents[2])}:", *lines, advice])


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    options_of = parser("bench.regression.counts", __doc__, json=False)
    does = options_of.add_mutually_exclusive_group()
    does.add_argument("--write", action="store_true", help="write the file anew")
    does.add_argument("--check", action="store_true", help="exit with 1 if anything differs from it")
    options = options_of.parse_args(arguments)
    before, only = read() if options.check else ({}, None)
    found = measured()
    if options.write:
        FILE.write_text(json.dumps({"torch": MINOR, "counts": found}, indent=1) + "\n")
    elif options.check:
        if only is not None:
            print(f"The file is of another torch than {torch.__version__}: only {', '.join(only)} are compared.")
        if lines := differences(before, found, only):
            sys.exit(explained(lines))
        print("No count differs.")
    else:
        shown = ("waves", "rows", "peak_rows", *(f"{name}_a_wave" for name in NAMES))
        for pipeline, methods in found.items():
            rows = [
                {"method": method, **{name.removesuffix("_a_wave").replace("_", " "): counts[name] for name in shown}}
                for method, counts in methods.items()
            ]
            show_table(rows, text=["method"], title=f"\n{pipeline}")


if __name__ == "__main__":
    main()
