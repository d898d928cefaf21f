"""The matrix of support: every popular class of diffusers, with its schedulers, by every method, against stock.

    python -m bench.quality.support --write                    # all of it, about half an hour on one idle core
    python -m bench.quality.support --only Flux Wan            # some of the cases, printed as they come
    python -m bench.quality.support --only Flux Wan --write    # the rest of the committed file stays
    python -m bench.quality.support --own --write              # every pipeline with its own scheduler, about half of it

`--write` puts the figures into bench/results/support.json, and what they say into the page
srds_fast/pipelines/SUPPORT.md and into the file srds_fast/pipelines/known_classes.json. What stays is marked there as
of an earlier run. The words of a verdict are explained in `verdicts.py`. With few steps each case runs by every method,
exact and with the default tolerance, and by two methods with the other schedulers of its kind; with many steps it runs
by two methods, which shows the waves.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from bench.command import parser
from bench.quality.every_scheduler import verdicts
from bench.quality.support_page import PAGE, page
from bench.quality.verdicts import FAILED, WRONG, Cell, at_length, by_every_method, by_scheduler, varied
from bench.workloads.classes import CASES, VARIATIONS
from srds_fast.environment import environment
from srds_fast.pipelines import known_classes
from srds_fast.pipelines.lockstep.rehearsal import ORDER

FILE = Path(__file__).parents[1] / "results" / "support.json"
STEPS, LENGTH = 9, 50


def cells(names: Sequence[str], steps: int, length: int, own: bool = False) -> Iterator[Cell]:
    """All cells of these cases. A case that this installation cannot build is told on stderr. own: see `--own`."""
    for name in names:
        case = CASES[name]
        try:
            yield by_every_method(case, steps)
        except ImportError as why:
            print(f"left out: {why}", file=sys.stderr)
            continue
        if length:
            yield at_length(case, length)
        if not own:
            yield from by_scheduler(case, steps)
            yield from (varied(each, steps) for each in VARIATIONS if each.case == name)


def line(found: Cell) -> str:
    """A cell as text."""
    runs = [
        f"{name}: {run.verdict} {run.difference} {run.error or ''} {run.waves or ''}"
        for name, run in found.runs.items()
    ]
    reasons = dict.fromkeys(run.reason for run in found.runs.values() if run.reason)
    head = f"{found.case} | {found.change} | {found.scheduler} | N = {found.steps}, {found.turns} turns"
    return "\n    ".join([head, "; ".join(runs), *reasons, *([found.reason] if found.reason else [])])


def to_json(found: dict[str, Any]) -> str:
    """JSON with a line for every cell, so that a difference is read line by line."""
    lists = {name: value for name, value in found.items() if isinstance(value, list)}
    head = json.dumps({name: value for name, value in found.items() if name not in lists}, indent=1).removesuffix("\n}")
    for name, value in lists.items():
        body = ",\n".join(f"  {json.dumps(each)}" for each in value)
        head += f',\n "{name}": [\n{body}\n ]'
    return head + "\n}\n"


def written(found: Sequence[Cell], names: Collection[str], own: bool) -> dict[str, Any]:
    """The content of the committed file with these cells in the place of those of the cases that ran. own: see `--own`.

    Those that stay are of an earlier run.
    """
    before = json.loads(FILE.read_text()) if FILE.exists() else {"cells": [], "schedulers": []}
    kept = [
        each
        for each in map(Cell.from_dict, before["cells"])
        if each.case in CASES and not (each.case in names and (each.as_shipped or not own))
    ]
    every = [*(replace(each, earlier=True).to_dict() for each in kept), *(each.to_dict() for each in found)]
    order = list(CASES)
    every.sort(key=lambda each: order.index(each["case"]))
    versions = {**environment(), "diffusers": diffusers.__version__}
    return {"environment": versions, "cells": every, "schedulers": before["schedulers"]}


@contextmanager
def rehearsed_in_full() -> Iterator[None]:
    """In the block no class is known."""
    known = known_classes.digests()
    kept = dict(known)
    known.clear()
    try:
        yield
    finally:
        known.update(kept)


def known_good(cells: Sequence[Cell]) -> dict[str, str]:
    """Digests by class, of those that run in turns, in no call of which a turn depended on the order of turns."""
    reasons, runs_in_turns = dict[str, set[str]](), dict[str, bool]()
    for each in cells:
        name = each.case.partition(",")[0]
        reasons.setdefault(name, set()).update(run.reason or "" for run in each.runs.values())
        runs_in_turns[name] = runs_in_turns.get(name, False) or any(
            run.path in ("takeover", "drive") for run in each.runs.values()
        )
    good = [name for name, of in reasons.items() if runs_in_turns[name] and not any(ORDER in why for why in of)]
    return {name: known_classes.digest_of(getattr(diffusers, name)) for name in sorted(good)}


def write(content: dict[str, Any]) -> None:
    """Write what follows from the content of the committed file: the page, and the classes that are known."""
    PAGE.write_text(page(content))
    versions = {"diffusers": content["environment"]["diffusers"]}
    if versions["diffusers"] == diffusers.__version__:
        classes = known_good([Cell.from_dict(each) for each in content["cells"]])
        known_classes.FILE.write_text(json.dumps({**versions, "classes": classes}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    options_of = parser("bench.quality.support", __doc__, json=False)
    options_of.add_argument("--only", nargs="*", metavar="PART", help="cases whose names contain one of these")
    options_of.add_argument("--own", action="store_true", help="only with a pipeline's own scheduler and call")
    options_of.add_argument("--steps", type=int, default=STEPS, help="few steps, for the products")
    options_of.add_argument("--length", type=int, default=LENGTH, help="many steps, for the waves; 0: none")
    options_of.add_argument("--write", action="store_true", help="write the committed file and the page anew")
    options_of.add_argument("--schedulers", action="store_true", help="only the table of schedulers; written")
    options_of.add_argument("--page", action="store_true", help="only write what follows from the committed file")
    options = options_of.parse_args(arguments)
    if options.page or options.schedulers:
        content = json.loads(FILE.read_text())
        if options.schedulers:
            content["schedulers"] = verdicts()
            FILE.write_text(to_json(content))
        write(content)
        return
    names = [name for name in CASES if not options.only or any(part in name for part in options.only)]
    found, ran = list[Cell](), set[str]()
    with rehearsed_in_full():
        for each in cells(names, options.steps, options.length, options.own):
            found.append(each)
            ran.add(each.case)
            print(line(each), flush=True)
            if options.write:
                FILE.write_text(to_json(written(found, ran, options.own)))
    if options.write:
        content = written(found, ran, options.own)
        if not options.only:
            content["schedulers"] = verdicts()
        FILE.write_text(to_json(content))
        write(content)
    bad = [each for each in found if any(run.verdict in (WRONG, FAILED) for run in each.runs.values())]
    for each in bad:
        print(f"wrong or failed: {each.case}, {each.change}, {each.scheduler}")


if __name__ == "__main__":
    # what each of some thousand calls would tell
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("srds_fast").setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    main()
